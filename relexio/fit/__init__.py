"""Gram matrices, computed or kept, and the weights that follow from them."""
