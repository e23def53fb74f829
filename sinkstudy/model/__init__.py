"""Vision-language models: loading, the layout of their tokens, and what a forward pass shows."""
