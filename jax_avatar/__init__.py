"""Live Avatar in JAX: a portrait and a voice become a streamed talking avatar."""

__version__ = "0.1.0"
