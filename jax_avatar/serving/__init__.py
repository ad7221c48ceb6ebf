"""Public names of `jax_avatar.serving`."""
