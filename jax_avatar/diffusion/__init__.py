"""Public names of `jax_avatar.diffusion`."""
