"""Several processes on one or several machines: they meet, start together, and end together."""
