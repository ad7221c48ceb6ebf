"""`config.json` of a model folder: kinds of its networks, settings of its stream."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_avatar.diffusion.sampling import Sampling
from jax_avatar.diffusion.schedule import euler_schedule
from jax_avatar.weights.checksums import locked
from jax_avatar.weights.files import load_json, save_json
from jax_avatar.weights.kinds import KINDS, find_kind

__all__ = ["LIVE_AVATAR", "StreamSettings", "add_to_config", "read_config"]

_WHOLE = ("name", "dit", "vae", "speech", "stream")
# As in training, or forced.
_TRAINED = ("sigmas", "sampler", "cache", "refresh", "refresh_sigma", "audio_context")


@dataclass(frozen=True, kw_only=True)
class StreamSettings(Sampling):
    """Streaming settings of a model; those of `Sampling` are of its training.

    Attributes:
        fps: video frames per second, of the speech encoder's features, too.
        size: pixel height and width the model is made for, or None to fit `max_area`.
        max_area: most pixels of a frame where the size is free.
        multiple: sides are multiples of this where the size is free.
        aas_after_blocks: see `StreamPlan`.
        pose: what the pose input carries: "zeros", or "reference", the portrait at every frame.
        motion: what the motion packer sees: "still", the portrait standing still, or "none".
        warmup_latents: latents of the still portrait decoded before the stream, and thrown away.
        decode_latents: latents that are decoded at once; None decodes whole blocks. With fewer the
            first frames of a block are there sooner, and more programs are started.
        portrait_error: reconstruction error (RMS, pixels in [-1, 1]) above which a portrait
            triggers a warning, as unlike the training data; 0 disables it.
        audio_window: "rolling", audio is encoded block by block as it comes, or "whole", all of it
            at once after its end, as the official pipelines treat files.
        framing: "picture", the portrait is the middle of a picture, or "face", eyes and mouth of a
            face are brought to the places of training.
        speech_device: where audio is encoded: "host", a CPU device of its own, or "vae", with the
            decoder, for encoders that are too large for the CPU.
    """

    fps: int
    size: tuple[int, int] | None
    max_area: int = 0
    multiple: int = 64
    aas_after_blocks: int = 4
    pose: str = "zeros"
    motion: str = "none"
    warmup_latents: int = 7
    decode_latents: int | None = None
    portrait_error: float = 0.0
    audio_window: str = "rolling"
    framing: str = "picture"
    speech_device: str = "host"

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "size", None if self.size is None else tuple(self.size))
        if self.pose not in ("zeros", "reference") or self.motion not in ("still", "none"):
            raise ValueError(
                f"pose {self.pose!r} must be zeros or reference, motion {self.motion!r} still or "
                "none."
            )
        if self.audio_window not in ("rolling", "whole"):
            raise ValueError(f"audio_window {self.audio_window!r} must be rolling or whole.")
        if self.framing not in ("picture", "face"):
            raise ValueError(f"framing {self.framing!r} must be picture or face.")
        if self.speech_device not in ("host", "vae"):
            raise ValueError(f"speech_device {self.speech_device!r} must be host or vae.")
        if self.size is None and self.max_area <= 0:
            raise ValueError("stream settings need a size, or a max_area to fit a size to.")
        if self.fps < 1 or (self.size and min(self.size) < 1):
            raise ValueError(
                f"fps {self.fps} and size {self.size} must be at least 1, size also None."
            )
        if self.warmup_latents < 1:
            raise ValueError(f"warmup_latents {self.warmup_latents} must be at least 1.")

    def piece_latents(self, block: int) -> int:
        """Latents decoded at once, of `block` latents that are denoised together.

        Raises:
            ValueError: they do not divide it.
        """
        latents = self.decode_latents or block
        if latents < 1 or block % latents:
            raise ValueError(
                f"decode_latents {self.decode_latents} must divide the {block} latents of a block."
            )
        return latents

    def check_training(self, changed: "StreamSettings") -> None:
        """Refuses to stream a model otherwise than it was trained.

        Args:
            changed: the settings to stream with.

        Raises:
            ValueError: their noise levels, sampler, history or audio context are others.
        """
        wrong = [name for name in _TRAINED if getattr(self, name) != getattr(changed, name)]
        if wrong:
            of = lambda settings: ", ".join(f"{n} {getattr(settings, n)}" for n in wrong)  # noqa: E731
            raise ValueError(
                f"the model was trained with {of(self)}; this stream has {of(changed)}. Leave "
                f"stream.{wrong[0]} as the model has it, or, for an ablation, pass --force_sampler "
                "(force_sampler=True)."
            )


LIVE_AVATAR = StreamSettings(
    fps=25,
    size=None,
    # Euler with shift 3, applied twice, as the release does; see `euler_schedule`.
    sigmas=euler_schedule(4, shift=3.0).sigmas,
    max_area=720 * 400,
    warmup_latents=7,
    motion="still",
    # wav2vec 2.0 is too slow for most hosts.
    speech_device="vae",
)
"""How the released 14B model is streamed.

Source: github.com/Alibaba-Quark/LiveAvatar, its multi-GPU script.
"""


def read_config(folder: str | Path, needed: tuple[str, ...] = _WHOLE) -> dict[str, Any]:
    """`config.json` of a model folder: name, kinds of the networks, settings of the stream.

    Args:
        folder: of the model.
        needed: keys that must be there; those of a whole model by default.

    Raises:
        ValueError: it cannot be read, lacks a key, or a value is none that a model can have.
    """
    path = Path(folder) / "config.json"
    content = load_json(path)
    missing = [key for key in needed if key not in content]
    if missing:
        raise ValueError(
            f"{path} lacks {missing}; convert the missing networks into it (python -m "
            "conversion.convert --help), or name another folder."
        )
    strings = [key for key in ("name", *KINDS, "lora") if key in content]
    wrong = [key for key in strings if not isinstance(content[key], str)]
    if wrong or not isinstance(content.get("stream", {}), dict):
        raise ValueError(
            f"{path}: {wrong or 'stream'} is no {'string' if wrong else 'object'}; copy it again, "
            "or restore it."
        )
    for part in KINDS:
        if part in content:
            find_kind(part, content[part], path)
    return content


def add_to_config(folder: str | Path, changes: Mapping[str, Any], **defaults: Any) -> None:
    """Adds to the `config.json` of a model folder.

    Args:
        folder: of the model.
        changes: keys to set.
        **defaults: keys to set where they are missing.
    """
    path = Path(folder) / "config.json"
    with locked(folder):
        present = load_json(path) if path.exists() else {}
        save_json(path, {**defaults, **present, **changes})
