"""Judges dreams: their looks, whether actions matter in them, and what decisions they support."""
