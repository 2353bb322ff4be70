"""Predictions, codes and samples scored."""
