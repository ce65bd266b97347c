"""Gram matrices, made or kept, and the weights that follow from them."""
