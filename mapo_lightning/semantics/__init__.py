"""Semantic actions: from frames to phrases, and from phrases to vectors."""
