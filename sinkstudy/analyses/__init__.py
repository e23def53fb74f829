"""What a token holds, from where it is seen, what of it reaches the decoder, and what an answer is attributed to."""
