"""Draws random programs that train by the package, and judges what it computes by dense oracles: `make fuzz`."""
