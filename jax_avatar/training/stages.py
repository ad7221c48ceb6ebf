"""The stages of training by name: plain settings -> a task for the loop.

speech --> speech.safetensors --+
vae -----> vae.safetensors -----+--> latents and features --> dit --> dit.safetensors --> dmd
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from flax import nnx

from jax_avatar.data.records import ClipSource, read_clips
from jax_avatar.io.checkpoint import load_header, load_json, load_weights
from jax_avatar.models.audio import SpeechConfig, SpeechEncoder
from jax_avatar.models.config import DiTConfig
from jax_avatar.models.light_vae import LightVAE, LightVAEConfig
from jax_avatar.models.params import abstract, merge
from jax_avatar.training.diffusion_forcing import ForcingConfig, ForcingTask
from jax_avatar.training.distillation import DistillConfig
from jax_avatar.training.distillation_task import DistillTask, DistillWeights
from jax_avatar.training.evaluate import ClipSampler, Truth, fit_probe, score
from jax_avatar.training.latents import LatentClips, encode_clips, random_clips
from jax_avatar.training.loop import LoopConfig, OwnStepTask, Task
from jax_avatar.training.rollout import RolloutConfig
from jax_avatar.training.speech import SpeechTask, SpeechTaskConfig
from jax_avatar.training.state import build_section
from jax_avatar.training.vae import FaceWindows, VAELossConfig, VAETask

__all__ = ["SHOWN_SPLIT", "SIGMAS", "build_stage", "load_encoders", "load_latents"]

SIGMAS = (1.0, 0.9, 0.75, 0.5, 0.0)
"""Noise levels of the small model's sampler: evenly spaced, then shifted by 3."""

SHOWN_SPLIT = "held_out_person"
"""Clips that are scored during training."""

_KEYS = {
    "speech": {"stage", "seed", "model", "task", "loop"},
    "vae": {"stage", "seed", "data", "model", "task", "loop"},
    "dit": {"stage", "seed", "data", "latents", "weights", "model", "task", "loop"},
    "dmd": {"stage", "seed", "data", "latents", "weights", "model", "rollout", "task", "loop"},
}


def build_stage(settings: Mapping[str, Any]) -> tuple[Callable[[], Task | OwnStepTask], LoopConfig]:
    """Checks the settings of a stage.

    Args:
        settings: plain values, from a config file.

    Returns:
        What makes the task (this reads data and weights), and the settings of the loop.

    Raises:
        ValueError: an unknown stage or setting, or values that do not fit together.
    """
    stage = settings.get("stage")
    if stage not in _KEYS:
        raise ValueError(f"stage {stage!r} is unknown; one of {', '.join(_KEYS)} is expected.")
    if set(settings) != _KEYS[stage]:
        odd = sorted(set(settings) ^ _KEYS[stage])
        raise ValueError(
            f"stage {stage} expects the sections {', '.join(sorted(_KEYS[stage]))}; "
            f"{', '.join(odd)} is missing or unknown."
        )
    loop = build_section(LoopConfig, {"seed": settings["seed"], **settings["loop"]}, "loop")
    kinds = {
        "speech": (SpeechConfig, SpeechTaskConfig, _speech),
        "vae": (LightVAEConfig, VAELossConfig, _vae),
        "dit": (DiTConfig, ForcingConfig, _dit),
        "dmd": (DiTConfig, DistillConfig, _dmd),
    }
    model_kind, task_kind, build = kinds[stage]
    values = settings["model"]
    if stage == "dmd":
        build_section(RolloutConfig, settings["rollout"], "rollout")
        values = _of_teacher(build_section(DistillWeights, settings["weights"], "weights"), values)
    model = build_section(model_kind, values, "model")
    task = build_section(task_kind, settings["task"], "task")
    return lambda: build(settings, model, task), loop


def load_encoders(weights: Mapping[str, str]) -> tuple[LightVAE, SpeechEncoder]:
    """The trained VAE and speech encoder.

    Args:
        weights: folders that hold `vae.safetensors` and `speech.safetensors`.
    """
    params, config, _ = load_weights(weights["vae"], "vae")
    vae_config = LightVAEConfig(**config)
    vae = merge(abstract(lambda: LightVAE(vae_config, rngs=nnx.Rngs(0)))[0], params)
    params, config, _ = load_weights(weights["speech"], "speech")
    speech_config = SpeechConfig(**config)
    speech = merge(abstract(lambda: SpeechEncoder(speech_config, rngs=nnx.Rngs(0)))[0], params)
    return vae, speech


def load_latents(settings: Mapping[str, Any], split: str) -> LatentClips:
    """Encoded clips of a split: read from `settings["latents"]`, or made there first."""
    path = Path(settings["latents"]) / f"{split}.npz"
    if not path.exists():
        vae, speech = load_encoders(settings["weights"])
        source = read_clips(settings["data"], split)
        phases = 4 if split == "train" else 1
        clips = encode_clips(
            (source[i] for i in range(len(source))), vae.encode, speech.encode, phases=phases
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        clips.save(path)
    return LatentClips.load(path)


def _speech(settings, model, task) -> Task:
    return SpeechTask(model, task)


def _vae(settings, model, task) -> Task:
    def windows(source: ClipSource) -> FaceWindows:
        return FaceWindows.from_clips(source[i] for i in range(len(source)))

    train = windows(read_clips(settings["data"], "train"))
    held_out = windows(read_clips(settings["data"], "held_out_person"))
    return VAETask(model, task, train, held_out, seed=settings["seed"])


def _dit(settings, model, task) -> Task:
    train = load_latents(settings, "train")
    built = ForcingTask(model, task, train, seed=settings["seed"])
    built.evaluate = _Evaluation(settings, built)
    return built


def _of_teacher(weights: DistillWeights, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Size of the teacher's transformer with some fields changed; without a teacher, only those."""
    fields = load_header(weights.teacher, "dit")[0] if weights.teacher else {}
    return {**fields, **changes}


def _dmd(settings, model, task) -> OwnStepTask:
    weights = build_section(DistillWeights, settings["weights"], "weights")
    rollout = build_section(RolloutConfig, settings["rollout"], "rollout")
    if not settings["latents"]:
        if weights.teacher:
            raise ValueError("latents is empty; give the folder of encoded clips to distil on.")
        states = (model.audio_layers, model.audio_width)
        size = load_json(Path(weights.model) / "config.json")["stream"]["size"]
        grid = (size[0] // 8, size[1] // 8)
        clips = random_clips(8, task.latents, grid, model.latent_channels, states)
        return DistillTask(model, rollout, task, weights, clips, seed=settings["seed"])
    encoders = {**settings, "weights": {"vae": weights.model, "speech": weights.model}}
    clips = load_latents(encoders, "train")
    built = DistillTask(model, rollout, task, weights, clips, seed=settings["seed"])
    evaluation = _Evaluation(encoders, built, sigmas=rollout.sigmas)
    built.evaluate = lambda params, step: evaluation(built.whole(params), step)
    return built


class _Evaluation:
    """Scores of a few held-out clips during training, set up at the first call."""

    def __init__(self, settings, task, num_clips: int = 8, sigmas=SIGMAS):
        self.settings, self.task, self.num_clips = settings, task, num_clips
        self.sigmas = sigmas
        self._ready = None

    def __call__(self, params, step: int) -> dict[str, float]:
        self._ready = self._ready or self._set_up()
        sampler, conditions, truth, probe = self._ready
        return score(sampler(params, *conditions), truth, probe)

    def _set_up(self):
        vae, _ = load_encoders(self.settings["weights"])
        train, held_out = (read_clips(self.settings["data"], s) for s in ("train", SHOWN_SPLIT))
        probe = fit_probe([train[i] for i in range(0, len(train), max(1, len(train) // 150))])
        clips = [held_out[i] for i in range(self.num_clips)]
        frames = 4 * self.task.settings.latents
        encoded = load_latents(self.settings, SHOWN_SPLIT).take(slice(0, self.num_clips))
        conditions = (encoded.reference, encoded.features[:, :frames])
        sampler = ClipSampler(self.task.graphdef, vae, sigmas=self.sigmas)
        return sampler, conditions, Truth.from_clips(clips, 1, 1 + frames), probe
