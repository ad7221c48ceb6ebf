"""Public names of `jax_avatar.planning`."""
