"""Systems composed from the parts, one a file."""
