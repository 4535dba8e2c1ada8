"""What the curvature at trained weights knows: their distribution, that of predictions, and the weight decay that the data ask for."""
