"""Public names of `jax_avatar.models`."""
