"""Cases, and the sum over them, as functions of one flat vector of all weights."""
