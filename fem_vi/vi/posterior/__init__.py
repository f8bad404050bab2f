"""Posterior families, one a file; each is a module whose `forward()` is a distribution."""
