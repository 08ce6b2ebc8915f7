"""Looking at labels, judging them, and taking them in and out of the store."""
