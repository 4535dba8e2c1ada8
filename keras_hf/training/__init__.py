"""From `fit` to one update of a compiled model."""
