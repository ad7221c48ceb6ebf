"""Conditions of a transformer: prompt, portrait, motion, pose and speech, and the pose rule."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_avatar.models.config import DiTConfig
from jax_avatar.shapes import Array

__all__ = ["POSES", "Conditions", "still_pose"]

AnyArray = Array | np.ndarray

POSES = ("zeros", "reference")
"""Pose inputs without a pose video: zeros, or the portrait's latent at every frame."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True, kw_only=True)
class Conditions:
    """Conditions of a stream, a clip or a batch; leading axes of clips are allowed under `vmap`.

    Every form of the transformer takes `(noisy, timestep, conditions, ...)` and reads the fields it
    needs; the others may be None. Speech is one of them, so that guidance replaces fields of one
    value. A stream keeps everything but speech, and adds the speech of a block with `with_audio`.

    Attributes:
        text: prompt states, `b p f`, at most `text_len` rows.
        reference: the portrait's latent, `b 1 h w c`.
        motion: latents before the clip, `b past h w c`, of which the last 19 count; None leaves
            their tokens out.
        pose: pose latents, `b t h w c`, or one frame that holds for all, see `still_pose`.
        audio: speech features, `b u T k a`, four video frames per latent frame.
        null_text: states of the negative prompt, for classifier-free guidance.
        speaker_mask: routing mask on the token grid, `b u t h/2 w/2`; needed for several speakers.
    """

    text: Any = None
    reference: Any = None
    motion: Any = None
    pose: Any = None
    audio: Any = None
    null_text: Any = None
    speaker_mask: Any = None

    @classmethod
    def of_portrait(
        cls,
        config: DiTConfig,
        reference: AnyArray,
        *,
        pose: str,
        text: AnyArray | None = None,
        **more: Any,
    ) -> "Conditions":
        """Conditions of a portrait without a pose video.

        Args:
            config: size of the transformer.
            reference: the portrait's latent, `b 1 h w c`; fields made here live where it does.
            pose: one of `POSES`.
            text: prompt states; zeros if not given.
            **more: other fields.
        """
        if text is None:
            text = _zeros(reference, (len(reference), 1, config.text_width))
        pose = still_pose(pose, reference, config.pose_channels)
        return cls(text=text, reference=reference, pose=pose, **more)

    def with_reference(self, reference: AnyArray) -> "Conditions":
        """The same with another reference latent."""
        return replace(self, reference=reference)

    def with_text(self, text: AnyArray) -> "Conditions":
        """The same with another prompt."""
        return replace(self, text=text)

    def with_audio(self, audio: AnyArray) -> "Conditions":
        """The same with other speech features."""
        return replace(self, audio=audio)


def still_pose(rule: str, reference: AnyArray, channels: int) -> AnyArray:
    """Pose input without a pose video: one latent frame that holds for all.

    Args:
        rule: one of `POSES`.
        reference: the portrait's latent, `b 1 h w c`.
        channels: of the pose input.

    Raises:
        ValueError: the rule is unknown.
    """
    if rule not in POSES:
        raise ValueError(f"pose {rule!r} must be one of {', '.join(POSES)}.")
    if rule == "reference":
        return reference
    return _zeros(reference, (*reference.shape[:-1], channels))


def _zeros(like: AnyArray, shape: tuple[int, ...]) -> AnyArray:
    # Host arrays stay on the host: data is prepared in processes without a device.
    return (np if isinstance(like, np.ndarray) else jnp).zeros(shape, np.float32)
