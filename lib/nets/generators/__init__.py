"""Generators: images as codes of a network that was trained on the real data."""
