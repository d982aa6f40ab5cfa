"""A model, a loss and data as one smooth function of the weights, and its derivatives."""
