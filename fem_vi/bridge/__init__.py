"""Where torch and FEniCSx meet."""
