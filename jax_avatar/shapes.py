"""Dimension letters and array aliases used in every public signature.

========  ==========================================================
letter    meaning
========  ==========================================================
b         batch
t h w c   latent frames, latent rows, latent columns, latent channels
T H W     video frames, pixel rows, pixel columns
n         tokens of a block (or of a whole sequence)
s         cache slots
l         layers
d         model width
m e       attention heads, head size
a         audio feature channels
k         hidden states (layers) of the speech encoder
u         speakers
p         prompt tokens
========  ==========================================================
"""

import numpy as np
from jaxtyping import Array, Float, Int, PyTree

Latent = Float[Array, "b t h w c"]
"""VAE code of video, normalised per channel, channels last."""

Video = Float[Array, "b T H W 3"]
"""RGB video in [-1, 1], channels last."""

Tokens = Float[Array, "b n d"]
"""Hidden states of the transformer."""

AudioFeatures = Float[Array, "b u T k a"]
"""Speech-encoder hidden states per video frame and speaker."""

TextStates = Float[Array, "b p f"]
"""Prompt-encoder states before padding to the text length."""

Scalar = Float[Array, ""] | np.floating | float
"""One number, on the device or on the host."""

IntScalar = Int[Array, ""] | np.integer | int

__all__ = [
    "Array",
    "AudioFeatures",
    "Float",
    "Int",
    "IntScalar",
    "Latent",
    "PyTree",
    "Scalar",
    "TextStates",
    "Tokens",
    "Video",
]
