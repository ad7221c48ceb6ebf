"""The stages of training by name: plain settings -> a task for the loop.

speech, vae --> latents and features --> teacher --> diffusion_forcing --> dmd
"""

import difflib
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax_avatar.data.encode import EncodeConfig, encode_clips, encode_data
from jax_avatar.data.encoded import is_complete, read_index
from jax_avatar.data.latents import StoredClips, load_encoded
from jax_avatar.data.records import ClipRecord, read_clips
from jax_avatar.data.talking_people.moved_portraits import MovedPortraitsConfig
from jax_avatar.data.toy import toy_clips
from jax_avatar.data.windows import check_fit
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.network import Network
from jax_avatar.models.speech.mel import SpeechConfig
from jax_avatar.models.vae.anchored import AnchoredVAEConfig
from jax_avatar.models.vae.light import LightVAEConfig
from jax_avatar.training.base_weights import (
    StageWeights,
    check_not_merged,
    merge_record,
    trained_fps,
)
from jax_avatar.training.distill_state import DistillConfig
from jax_avatar.training.rollout_plan import RolloutConfig
from jax_avatar.training.run.state import build_section
from jax_avatar.training.run.step import LoopConfig
from jax_avatar.training.stages.anchored_vae import AnchoredTask, AnchoredTaskConfig
from jax_avatar.training.stages.distill import DistillTask, DistillWeights
from jax_avatar.training.stages.flow import ForcingConfig, ForcingFiles, ForcingTask
from jax_avatar.training.stages.light_vae import FaceWindows, VAELossConfig, VAETask
from jax_avatar.training.stages.speech import SpeechTask, SpeechTaskConfig
from jax_avatar.training.stages.task import Task
from jax_avatar.training.teacher import SamplerConfig
from jax_avatar.weights.encoders import Encoders
from jax_avatar.weights.files import load_header
from jax_avatar.weights.folder import export_model, load_settings
from jax_avatar.weights.kinds import KINDS
from jax_avatar.weights.networks import network_config, read_dit
from jax_avatar.weights.settings import read_config

__all__ = [
    "HELD_OUT",
    "build_stage",
    "held_out_clips",
    "load_clips",
    "load_latents",
    "read_sections",
]

HELD_OUT = "held_out_person"
"""Clips that are evaluated and validated on during training."""

_logger = logging.getLogger(__name__)
_STABLE_BATCH, _SMALL_NETWORK = 32, 50_000_000  # clips per update; weights
_FLOW = {"weights": StageWeights, "model": DiTConfig, "task": ForcingConfig}
_SECTIONS: dict[str, dict[str, Any]] = {
    "speech": {"model": SpeechConfig, "task": SpeechTaskConfig},
    "vae": {"data": None, "model": LightVAEConfig, "task": VAELossConfig},
    "anchored_vae": {
        "people": MovedPortraitsConfig,
        "model": AnchoredVAEConfig,
        "task": AnchoredTaskConfig,
    },
    "teacher": {"fps": None, "data": None, "latents": None, **_FLOW, "sampler": SamplerConfig},
    "diffusion_forcing": {"fps": None, "data": None, "latents": None, **_FLOW},
    "dmd": {
        "fps": None,
        "data": None,
        "latents": None,
        "weights": DistillWeights,
        "model": DiTConfig,
        "rollout": RolloutConfig,
        "task": DistillConfig,
    },
}


def build_stage(
    settings: Mapping[str, Any], *, small_batch: bool = False
) -> tuple[Callable[[], Task], LoopConfig]:
    """Checks the settings of a stage.

    Args:
        settings: plain values, from a config file.
        small_batch: distil a large network on fewer clips per update than are known to be stable.

    Returns:
        What makes the task (this reads data and weights), and the settings of the loop.

    Raises:
        ValueError: an unknown stage or setting, or values that do not fit together.
    """
    sections, loop = read_sections(settings)
    if "fps" in settings:
        _check_fps(settings["fps"], sections["weights"])
    if settings["stage"] == "dmd" and not small_batch:
        _check_batch(sections["model"], sections["task"])
    if "weights" in sections:
        check_not_merged(sections["weights"])
    if settings["stage"] in ("teacher", "diffusion_forcing"):
        _check_base(sections["weights"], sections["task"])
    own = {"speech": _speech, "vae": _vae, "anchored_vae": _anchored_vae, "dmd": _dmd}
    build = own.get(settings["stage"], _flow)
    return functools.partial(build, settings, **sections), loop


def read_sections(settings: Mapping[str, Any]) -> tuple[dict[str, Any], LoopConfig]:
    """The sections of a stage's settings as their dataclasses, and that of the loop.

    Argument and errors as of `build_stage`; weights are read for the size of a network only, and
    only where the settings leave it open.
    """
    stage = settings.get("stage")
    if stage not in _SECTIONS:
        raise ValueError(f"stage {stage!r} is unknown; one of {', '.join(_SECTIONS)} is expected.")
    expected = {"stage", "seed", "loop", *_SECTIONS[stage]}
    for name in [*sorted(set(settings) - expected), *sorted(expected - set(settings))]:
        near = difflib.get_close_matches(name, expected - set(settings), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(expected))}."
        what = "is missing" if name in expected else "is unknown"
        raise ValueError(f"config.{name} {what} in stage {stage}; {hint}")
    loop = build_section(LoopConfig, {"seed": settings["seed"], **settings["loop"]}, "loop")
    sections = {
        name: build_section(kind, settings[name], name)
        for name, kind in _SECTIONS[stage].items()
        if kind and name != "model"
    }
    values = _with_size(settings["model"], sections.get("weights"))
    if _SECTIONS[stage]["model"] is DiTConfig and "framepack" not in settings["model"]:
        # The motion packer is there where it is trained with.
        motion = getattr(sections["task"], "motion_latents", 0)
        values = {**values, "framepack": motion > 0}
    sections["model"] = build_section(_SECTIONS[stage]["model"], values, "model")
    return sections, loop


def load_clips(folder: str, split: str) -> Sequence[ClipRecord]:
    """Clips of a split.

    Args:
        folder: written by `launch/prepare_data.py people`; "" draws toy faces.
        split: one of `SPLITS`.
    """
    return read_clips(folder, split) if folder else toy_clips(split)


def load_latents(settings: Mapping[str, Any], split: str) -> StoredClips:
    """Encoded clips of a split: from `settings["latents"]`, where raw clips are encoded first.

    A folder that `launch/prepare_data.py encode` wrote is taken as it is.

    Args:
        settings: has `fps`, `data`, `latents` (without either, toy faces are encoded) and `weights`
            with the folders of VAE and speech encoder.
        split: one of `SPLITS`.
    """
    data, folder = settings["data"], settings["latents"]
    if not folder and data:
        raise ValueError("config.latents is empty; give a folder for the encoded clips.")
    encoders = Encoders.load(settings["weights"], fps=settings["fps"])
    if not folder:
        return encode_clips(toy_clips(split, fps=settings["fps"]), encoders)
    if data and not is_complete(folder):
        encode_data(data, folder, encoders, EncodeConfig(phases=4))
    return load_encoded(
        folder,
        split,
        weights=encoders.hashes,
        encode_speech=encoders.features,
        states=encoders.states,
    )


def _check_fps(fps: Any, weights: StageWeights | DistillWeights) -> None:
    """Compares the rate of a run with that of transformers that an earlier stage has trained.

    The folder of a converted model says how that is streamed. Its transformer may be trained at
    another rate, as the paper trains Wan-S2V at 16.
    """
    if not isinstance(fps, int) or fps < 1:
        raise ValueError(f"config.fps={fps!r} must be a whole number of frames per second.")
    for name in ("start", "teacher", "student"):
        folder = getattr(weights, name, "")
        trained = trained_fps(folder) if folder else None
        if trained not in (None, fps):
            raise ValueError(
                f"config.fps={fps}, but the transformer in config.weights.{name}={folder} was "
                f"trained at {trained} frames per second; set --config.fps={trained} and prepare "
                f"the data at that rate, or name weights trained at {fps}."
            )


def held_out_clips(settings: Mapping[str, Any]) -> StoredClips | None:
    """Encoded clips of people that are not trained on; None, which is logged, without any."""
    folder = settings["latents"]
    if folder and HELD_OUT not in read_index(folder)["splits"]:
        _logger.warning(
            f"no validation loss while training: {folder} has no clips of split {HELD_OUT}; encode "
            "some to have it."
        )
        return None
    return load_latents(settings, HELD_OUT)


def _check_base(weights: StageWeights, task: ForcingConfig) -> None:
    if task.adapter_rank and not weights.start:
        raise ValueError(
            f"task.adapter_rank={task.adapter_rank} trains an adapter beside weights that stay as "
            "they are, and config.weights.start is empty; give their folder, or set "
            "task.adapter_rank=0."
        )


def _check_batch(model: DiTConfig, task: DistillConfig) -> None:
    d = model.width
    count = model.num_layers * (8 * d * d + 2 * d * model.ffn_width)
    if task.batch_size < _STABLE_BATCH and count > _SMALL_NETWORK:
        raise ValueError(
            f"task.batch_size {task.batch_size}: distilling {count / 1e9:.1f} billion weights on "
            f"fewer than {_STABLE_BATCH} clips per update usually collapses; accumulate to 64 or "
            "more, or pass --small_batch."
        )


def _with_size(
    values: Mapping[str, Any], weights: StageWeights | DistillWeights | None
) -> Mapping[str, Any]:
    """Size of a network; where the config leaves it open, that of the weights it starts from."""
    start = getattr(weights, "start", "") or getattr(weights, "teacher", "")
    if start and "width" not in values:
        return {**load_header(start, "dit")[0], **values}
    return values


def _speech(settings, model, task) -> Task:
    return SpeechTask(model, task)


def _vae(settings, model, task) -> Task:
    def windows(split: str) -> FaceWindows:
        source = load_clips(settings["data"], split)
        return FaceWindows.from_clips(source[i] for i in range(len(source)))

    return VAETask(model, task, windows("train"), windows("held_out_person"), seed=settings["seed"])


def _anchored_vae(settings, people, model, task) -> Task:
    return AnchoredTask(model, task, people, seed=settings["seed"])


def _flow(settings, weights, model, task, sampler=None) -> Task:
    del sampler  # of evaluation
    kind = KINDS["dit"][read_config(weights.model)["dit"]]
    streamed = load_settings(weights.model)
    encoders = {**settings, "weights": {n: weights.folder(n) for n in ("vae", "speech")}}
    expected = Network.abstract(kind.network, model).params
    start = functools.partial(read_dit, weights.start, expected) if weights.start else None

    clips = load_latents(encoders, "train")
    check_fit(clips, model, task.latents, motion=task.motion_latents, fps=settings["fps"])
    stream = {
        "fps": settings["fps"],
        **_size_of(clips.grid, streamed.size, weights.folder("vae")),
        **task.sampling(),
    }
    if task.motion_latents:
        stream["motion"] = "still"

    def export(folder, params, metadata, *, adapter):
        export_model(
            folder,
            weights.model,
            params,
            model,
            {**metadata, "fps": settings["fps"], **merge_record(weights.start)},
            stream=stream,
            name=settings["stage"],
            others=weights.others,
            adapter=adapter,
        )

    return ForcingTask(
        model,
        task,
        clips,
        network=kind.network,
        pose=streamed.pose,
        seed=settings["seed"],
        name=settings["stage"],
        files=ForcingFiles(start, functools.partial(held_out_clips, encoders), stream, export),
    )


def _size_of(
    grid: tuple[int, int], size: tuple[int, int] | None, folder: str
) -> dict[str, list[int]]:
    """Stream setting of the size of clips, if the model is made for one.

    Args:
        grid: latent rows and columns of the clips.
        size: that the model streams.
        folder: of the VAE, for which pictures of many sizes may have the same latents.
    """
    if size is None:
        return {}
    try:
        made = network_config(folder, "vae").latent_grid(*size)
    except ValueError as error:
        raise ValueError(f"stream.size of the model, with the VAE in {folder}: {error}") from None
    return {"size": [s * g // m for s, g, m in zip(size, grid, made, strict=True)]}


def _dmd(settings, weights, model, rollout, task) -> Task:
    encoders = {**settings, "weights": {"vae": weights.model, "speech": weights.model}}
    clips = load_latents(encoders, "train")
    held_out = functools.partial(held_out_clips, encoders)
    options = {"seed": settings["seed"], "fps": settings["fps"], "held_out": held_out}
    return DistillTask(model, rollout, task, weights, clips, **options)
