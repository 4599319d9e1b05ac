"""Kernels of infinitely wide and random networks, and the kernel ridge regression that stands on them."""
