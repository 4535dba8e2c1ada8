"""The problem that an update sees: cases, network and loss as functions of one flat vector of all weights."""
