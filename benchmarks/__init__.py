"""How long sharpscope and its peers take to find the top eigenvalue of a Hessian, and how wrong they are."""
