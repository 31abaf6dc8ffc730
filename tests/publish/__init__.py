"""Tests of `stages/publish`."""
