"""Playing with dreams: a scene beside the dream of it, led by keys or phrases, and its page."""
