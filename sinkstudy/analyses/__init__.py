"""What a token holds, from where it is seen, and what an answer is attributed to."""
