"""Environments: pixels out, normalised actions in, the same interface for every suite."""
