"""The embedded world and the small vision-language models trained in it."""
