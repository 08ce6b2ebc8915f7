"""Judges dreams: how they look, whether they obey actions, whether they can be acted on."""
