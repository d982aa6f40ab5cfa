"""The measured quantities, one equation each, and rows of them."""
