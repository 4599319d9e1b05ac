"""Distances between S and T: of gradients, features, distributions and transport plans."""
