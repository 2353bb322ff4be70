"""A guide whose other latents know the lengths of the masks, and its evaluation at all lengths at once."""
