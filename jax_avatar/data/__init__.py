"""Public names of `jax_avatar.data`."""
