"""Public names of `jax_avatar.io`."""
