"""Diagnostics: what is looked at, not judged by - landscapes, spectra, alignment, tangent kernels."""
