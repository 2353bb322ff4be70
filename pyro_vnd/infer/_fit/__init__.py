"""The machinery of `fit`: data, steps, effect handlers, sources of masks, held-out scores, checkpoints."""
