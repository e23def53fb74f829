"""Do language models use the attention sinks of their vision transformer? Helpers of the study."""
