"""Public names of `jax_avatar.streaming`."""
