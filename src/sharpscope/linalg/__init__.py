"""Linear algebra of a symmetric operator: eigenpairs, trace, density, each with bounds."""
