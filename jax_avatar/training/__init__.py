"""Public names of `jax_avatar.training`."""
