"""Posteriors in ArviZ, and whether they can be trusted."""
