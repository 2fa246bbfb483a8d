"""Generators of other kinds beside the family: one pass of a decoder or a GAN, a few of a masked transformer."""
