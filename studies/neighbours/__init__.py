"""What an adapter of one task does for another one, without more training."""
