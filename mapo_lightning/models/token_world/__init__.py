"""The token world model: frames become codes, and a causal transformer predicts them."""
