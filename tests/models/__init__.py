"""Tests of loading and quantising the model."""
