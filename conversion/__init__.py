"""PyTorch weights in, golden parity out; never imported by jax_avatar."""
