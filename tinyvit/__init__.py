"""A Vision Transformer from scratch: every forward and backward pass written by hand, on NumPy or CuPy."""
