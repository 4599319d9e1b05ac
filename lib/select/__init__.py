"""Coreset selection: which real images to keep."""
