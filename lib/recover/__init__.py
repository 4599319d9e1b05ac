"""Recovering images from a frozen teacher (SRe2L, WMDD): the teacher, and blocks of images."""
