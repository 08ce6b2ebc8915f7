"""Composes a run from dataclasses, YAML files and command-line words; knows nothing of MAPO."""
