"""The machinery of `fit`."""
