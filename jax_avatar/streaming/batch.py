"""Many portraits stream side by side: the sampler of `session`, for evaluation."""

from collections.abc import Callable, Iterable

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, UInt8

from jax_avatar.models.sharding import batch_sharding, put_on
from jax_avatar.pixels import from_uint8
from jax_avatar.shapes import Array, AudioFeatures, Latent, PyTree
from jax_avatar.streaming.decode import Decoder
from jax_avatar.streaming.features import DROPPED_FRAMES
from jax_avatar.streaming.plan import StreamPlan
from jax_avatar.streaming.portrait import make_encode, still_conditions
from jax_avatar.streaming.sampler import SequentialStream
from jax_avatar.weights.folder import AvatarModel

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
        mesh: Mesh | None = None,
    ):
        """Binds a model.

        Args:
            model: to stream.
            plan: how; as the model's settings say if not given.
            sample: `(params, reference, features) -> latents`, to make whole clips at once instead
                of streaming them.
            mesh: of a training run: the transformer's weights lie on it, and portraits are spread
                over its "data" axis. All hosts call, and get all frames. One device if not given.
        """
        self.model, self.params = model, model.dit.params
        self._plan = plan or StreamPlan.from_settings(model.settings, 420)
        self._sample, self._streams = sample, {}
        self._mesh, self._device = mesh, mesh or jax.devices()[0]
        whole = NamedSharding(mesh, PartitionSpec()) if mesh else batch_sharding(self._device)
        self._decoder = Decoder(model, whole)
        self._speech_params = put_on(model.speech.params, whole)
        self._fetch = jax.jit(lambda frames: frames, out_shardings=whole)
        self._encode = make_encode(model.vae, model.settings)
        speech = model.speech.without_params()
        self._features = jax.jit(
            lambda p, wave, frames: speech.bind(p).encode(wave, frames), static_argnums=2
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
        model, count = self.model, len(portraits)
        block = 4 * model.dit.config.frames_per_block
        total = -(-(num_frames + DROPPED_FRAMES) // block) * block
        silence = DROPPED_FRAMES * model.speech.config.samples_per_frame
        padded = np.pad(np.asarray(waves, np.float32), ((0, 0), (silence, 0)))[:, None]
        features = self._features(self._speech_params, self._put(padded), total)
        video = self._put(from_uint8(portraits)[:, None])
        still = self._encode(self._decoder.params, video)
        self._decoder.start(video, still[:, : model.settings.warmup_latents])
        parts = []
        for latent in self._latents(still, features):
            frames, _ = self._decoder.decode(latent)
            parts.append(np.asarray(self._fetch(frames))[:count])
        frames = np.concatenate(parts, axis=1)
        return frames[:, DROPPED_FRAMES : DROPPED_FRAMES + num_frames]

    def latents(
        self, still: Float[np.ndarray, "b 1 h w c"], features: Float[np.ndarray, "b u T k a"]
    ) -> Float[np.ndarray, "b t h w c"]:
        """Latents of whole clips, which are not decoded.

        Args:
            still: latents of still portraits.
            features: of the speech, whole blocks.
        """
        parts = [
            np.asarray(self._fetch(part))[: len(still)]
            for part in self._latents(self._put(still), self._put(features))
        ]
        return np.concatenate(parts, axis=1)

    def release(self) -> None:
        """Lets go of the transformer's weights and windows until `params` are given anew."""
        self.params = self._decoder.state = None
        for stream in self._streams.values():
            stream.release()

    def _put(self, rows: np.ndarray) -> Array:
        """Rows where portraits are; on a mesh, the first ones again until they spread evenly."""
        if self._mesh:
            data = self._mesh.shape["data"]
            rows = np.resize(rows, (-(-len(rows) // data) * data, *rows.shape[1:]))
        return put_on(rows, batch_sharding(self._device))

    def _latents(self, still: Latent, features: AudioFeatures) -> Iterable[Latent]:
        reference = still[:, :1]
        if self._sample:
            yield self._sample(self.params, reference, features)
            return
        dit, conditions = self.model.dit, still_conditions(self.model, still)
        if reference.shape in self._streams:
            self._streams[reference.shape].restart(self.params, conditions)
        else:
            self._streams[reference.shape] = SequentialStream(
                dit.with_params(self.params), self._plan, conditions, device=self._device
            )
        stream = self._streams[reference.shape]
        size = 4 * dit.config.frames_per_block
        for start in range(0, features.shape[2], size):
            yield from stream.push(features[:, :, start : start + size])
