"""Networks that make features of data, one kind of data a file."""
