"""Commands: `jax-avatar NAME` runs the module that `python launch/NAME.py` does."""
