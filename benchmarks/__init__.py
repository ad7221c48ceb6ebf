"""Measurements, one script each; every one prints a JSON line that names its surroundings."""
