"""Causal video autoencoders."""
