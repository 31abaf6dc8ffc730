"""Tests of `stages/download`."""
