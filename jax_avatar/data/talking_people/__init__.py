"""Invented people who talk: rendered faces, synthetic speech and the truth behind both."""
