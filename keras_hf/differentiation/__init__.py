"""Products with curvature matrices and derivatives of any order, of any function."""
