"""What becomes of answers when tokens, keys, neurons or dimensions are changed; no training."""
