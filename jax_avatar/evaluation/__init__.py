"""Public names of `jax_avatar.evaluation`."""
