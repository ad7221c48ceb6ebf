"""Live Avatar in JAX: a portrait and a voice become a streamed talking avatar.

load_model      a model folder's networks and settings; one ships with the package
PortraitView    what of a picture a stream shows
load_image      a portrait, RGB
load_audio      a voice, mono samples in [-1, 1]
AvatarSession   audio samples in, frames out
LiveSession     the same in real time
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_MODULES = {
    "AvatarSession": "jax_avatar.streaming.session",
    "LiveSession": "jax_avatar.live.session",
    "PortraitView": "jax_avatar.portraits.view",
    "load_audio": "jax_avatar.io.audio",
    "load_image": "jax_avatar.io.image",
    "load_model": "jax_avatar.weights.folder",
}

__all__ = [
    "AvatarSession",
    "LiveSession",
    "PortraitView",
    "load_audio",
    "load_image",
    "load_model",
]


def __getattr__(name: str) -> Any:
    """A public name, imported when it is first used: every command imports this file."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
