"""Judges dreams: looks, control, what can be read off them, what decisions they support."""
