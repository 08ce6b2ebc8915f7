"""Semantic actions: from frames to words, and from words to vectors."""
