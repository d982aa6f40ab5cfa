"""Scale-invariant groups of weights and the spheres they live on."""
