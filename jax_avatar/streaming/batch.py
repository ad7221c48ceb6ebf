"""Many portraits stream side by side on one device: the sampler of `session`, for evaluation."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from jax_avatar.models.params import merge
from jax_avatar.shapes import Array, AudioFeatures, Float, Latent, PyTree
from jax_avatar.streaming.model import AvatarModel
from jax_avatar.streaming.plan import Conditions, StreamPlan
from jax_avatar.streaming.sampler import SequentialStream
from jax_avatar.streaming.session import DROPPED_FRAMES

__all__ = ["BatchStream"]


class BatchStream:
    """Waves in, whole videos out; frame `j` shows time `j / fps`, as in `AvatarSession`.

    Attributes:
        params: of the transformer; may be replaced between calls, nothing is compiled anew.
    """

    def __init__(
        self,
        model: AvatarModel,
        plan: StreamPlan | None = None,
        *,
        sample: Callable[[PyTree, Array, Array], Array] | None = None,
    ):
        """Binds a model that has no motion packer.

        Args:
            model: to stream.
            plan: how; as the model's settings say if not given.
            sample: `(params, reference, features) -> latents`, to make whole clips at once instead
                of streaming them.
        """
        if model.settings.motion != "none":
            raise ValueError(
                f"model {model.name} has motion {model.settings.motion!r}; batches are streamed "
                "for none only."
            )
        self.model, settings = model, model.settings
        self.params = model.dit.params
        self._plan, self._sample, self._streams = plan or settings.plan(420), sample, {}
        vae, speech = model.vae.graphdef, model.speech.graphdef
        self._encode = jax.jit(lambda p, video: merge(vae, p).encode(video))
        self._first = jax.jit(lambda p, latent: merge(vae, p).decode_first(latent))
        self._next = jax.jit(lambda p, state, latent: merge(vae, p).decode_next(state, latent))
        self._features = jax.jit(
            lambda p, wave, frames: merge(speech, p).encode(wave, frames), static_argnums=2
        )

    def __call__(
        self,
        portraits: UInt8[np.ndarray, "b H W 3"],
        waves: Float[np.ndarray, "b N"],
        num_frames: int,
    ) -> UInt8[np.ndarray, "b T H W 3"]:
        """Streams `num_frames` video frames.

        Args:
            portraits: stills in the size of the stream.
            waves: mono in [-1, 1] at the speech encoder's rate; silence follows the end.
            num_frames: video frames wanted.
        """
        model, dit = self.model, self.model.dit
        block = 4 * dit.config.frames_per_block
        total = -(-(num_frames + DROPPED_FRAMES) // block) * block
        silence = DROPPED_FRAMES * model.speech.config.samples_per_frame
        heard = jnp.pad(jnp.asarray(waves, jnp.float32), ((0, 0), (silence, 0)))[:, None]
        features = self._features(model.speech.params, heard, total)
        still = jnp.asarray(portraits, jnp.float32)[:, None] / 127.5 - 1
        reference = self._encode(model.vae.params, still)
        _, state = self._first(model.vae.params, reference)
        parts = []
        for latent in self._latents(reference, features):
            video, state = self._next(model.vae.params, state, latent)
            parts.append(np.asarray(jnp.round((jnp.clip(video, -1, 1) + 1) * 127.5), np.uint8))
        frames = np.concatenate(parts, axis=1)
        return frames[:, DROPPED_FRAMES : DROPPED_FRAMES + num_frames]

    def _latents(self, reference: Latent, features: AudioFeatures) -> Iterable[Latent]:
        if self._sample:
            yield self._sample(self.params, reference, features)
            return
        dit = self.model.dit
        b, _, *grid, channels = reference.shape
        size = dit.config.frames_per_block
        pose = jnp.zeros((b, size, *grid, dit.config.pose_channels))
        if self.model.settings.pose == "reference":
            pose = jnp.broadcast_to(reference, (b, size, *grid, channels))
        text = jnp.zeros((b, 1, dit.config.text_width))
        conditions = Conditions(text, reference, None, pose)
        if reference.shape in self._streams:
            self._streams[reference.shape].restart(self.params, conditions)
        else:
            self._streams[reference.shape] = SequentialStream(
                dit.graphdef, self.params, dit.config, self._plan, conditions
            )
        stream = self._streams[reference.shape]
        for start in range(0, features.shape[2], 4 * size):
            yield from stream.push(features[:, :, start : start + 4 * size])
