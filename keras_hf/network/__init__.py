"""What a trace says of a network, and surgery on it."""
