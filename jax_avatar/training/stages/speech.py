"""Teaches the speech encoder what a face does: waveform -> face units, on synthesised speech.

utterances (kept in a folder) -> crop -> augment -> wave ------> SpeechEncoder -> units
                                                 +-> phones -> mouth_units ---------> squared error
"""

import dataclasses
import functools
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jax_avatar.data.talking_people import speech
from jax_avatar.data.talking_people.speech import Utterance
from jax_avatar.data.talking_people.utterances import (
    Utterances,
    UtterancesConfig,
    load_utterances,
    prepare_utterances,
)
from jax_avatar.models.network import Network
from jax_avatar.models.speech.mel import SpeechConfig, SpeechEncoder, log_mel
from jax_avatar.shapes import Array, PyTree
from jax_avatar.training.run.evaluation import AverageEvaluation
from jax_avatar.training.run.step import LoopConfig
from jax_avatar.training.stages.task import LossTask
from jax_avatar.weights.checksums import keep_checksums
from jax_avatar.weights.files import save_weights

__all__ = ["SpeechTask", "SpeechTaskConfig", "correlations", "load_corpus", "target_units"]

_COLUMN_RATE = 4


@dataclass(frozen=True)
class SpeechTaskConfig:
    """Data and batch of the speech task.

    Attributes:
        cache: folder of utterances; what it lacks is synthesised first, which
            `launch/prepare_data.py utterances` does in several processes.
        flite: training sentences spoken by Flite.
        hibari: training sentences spoken by hibari.
        kokoro: training sentences spoken by Kokoro.
        num_checks: held-out utterances for `evaluate`, per group of voices.
        clip_frames: video frames of a training clip.
        batch: clips per step.
        seed: of the sentences, the voices and the augmentation.
    """

    cache: str = "data/utterances"
    flite: int = UtterancesConfig.flite
    hibari: int = UtterancesConfig.hibari
    kokoro: int = UtterancesConfig.kokoro
    num_checks: int = 36
    clip_frames: int = 41
    batch: int = 16
    seed: int = 0

    @property
    def utterances(self) -> UtterancesConfig:
        """Amounts of the folder."""
        return UtterancesConfig(self.flite, self.hibari, self.kokoro, self.seed)


class SpeechTask(LossTask):
    """Training of the speech encoder.

    The input statistics are measured on the augmented corpus and become part of `config`.
    """

    name = "speech"

    def __init__(self, config: SpeechConfig, task: SpeechTaskConfig):
        unknown = set(config.units) - set(speech.MOUTH_UNITS)
        if unknown:
            raise ValueError(
                f"units {sorted(unknown)}: speech moves only {', '.join(speech.MOUTH_UNITS)}."
            )
        self.task = task
        self.corpus, self.checks = load_corpus(task)
        self.config = config
        # Statistics of the input and of the targets, over clips that no step will see.
        rng = np.random.default_rng([task.seed, 2**32 - 1])
        clips = [self._clip(rng) for _ in range(max(8, len(self.corpus) // 8))]
        columns = np.concatenate(
            [np.asarray(log_mel(jnp.asarray(wave), config)) for wave, _ in clips]
        )
        self.config = dataclasses.replace(
            config,
            mel_mean=tuple(np.round(columns.mean(0), 4).tolist()),
            mel_std=tuple(np.round(columns.std(0) + 1e-3, 4).tolist()),
        )
        targets = np.concatenate([units for _, units in clips])
        self.unit_std = (targets.std(0) + 0.02).astype(np.float32)
        self.network = Network.abstract(SpeechEncoder, self.config)

    def init(self, key: Array) -> PyTree:
        """Fresh weights."""
        return Network.of(SpeechEncoder(self.config, rngs=nnx.Rngs(key))).params

    def loss(self, params: PyTree, batch: dict, key: Array) -> tuple[Array, dict[str, Array]]:
        """Squared error of the units at every mel column, each unit by its own variance."""
        encoder = self.network.bind(params)
        predicted = encoder.dense_units(batch["wave"], self.task.clip_frames)
        error = (predicted - batch["units"]) / self.unit_std[None, None, None]
        loss = jnp.mean(error**2)
        return loss, {"jaw_error": jnp.mean(error[..., self.config.units.index("jawOpen")] ** 2)}

    def batches(self, step: int) -> dict[str, np.ndarray]:
        """Random crops of the corpus, augmented: `wave [b 1 N]`, `units [b 1 C n]`."""
        rng = np.random.default_rng([self.task.seed, step])
        clips = [self._clip(rng) for _ in range(self.task.batch)]
        wave, units = (np.stack(parts)[:, None] for parts in zip(*clips, strict=True))
        return {"wave": wave, "units": units}

    def evaluations(self, config: LoopConfig, mesh: Mesh) -> list[AverageEvaluation]:
        """The one that `evaluate` makes."""
        del config, mesh
        return [AverageEvaluation(self.evaluate)]

    def evaluate(self, params: PyTree, step: int) -> dict[str, float]:
        """Pearson correlation per unit, on new sentences of known voices and of a new voice."""
        del step
        encoder = self.network.bind(params)
        found = {}
        for group, utterances in self.checks.items():
            scores = correlations(encoder, utterances)
            found |= {f"{group}/{unit}": score for unit, score in scores.items()}
        return found

    def export(self, params: PyTree, folder: str | Path, metadata: dict) -> None:
        """Writes `speech.safetensors` with the scores of `evaluate` among the metadata."""
        scores = {name: round(value, 3) for name, value in self.evaluate(params, 0).items()}
        metadata = {
            **metadata,
            "task": dataclasses.asdict(self.task) | {"cache": None},
            "pearson_r": scores,
            "voices": self.corpus.voices,
            "held_out_voices": sorted({u.voice for u in self.checks["new_voice"]}),
        }
        keep_checksums(folder)
        save_weights(folder, "speech", params, dataclasses.asdict(self.config), metadata)

    def _clip(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        config, frames = self.config, self.task.clip_frames
        duration_s = config.sample_range(0, frames)[1] / config.sample_rate
        utterance = self.corpus.draw(rng, self.corpus.draw_voice(rng))
        # Some clips start before the first word, like a stream.
        latest = max(0.0, utterance.duration_s - duration_s)
        start_s = rng.uniform(-0.5, latest + 0.3)
        utterance = speech.augment(speech.crop(utterance, start_s, 1.3 * duration_s), rng)
        utterance = speech.crop(utterance, 0.0, duration_s)
        return utterance.wave, target_units(utterance, config, frames, dense=True)


def target_units(
    utterance: Utterance, config: SpeechConfig, num_frames: int, *, dense: bool = False
) -> np.ndarray:
    """True units `[T n]` of the first video frames, or `[C n]` at every mel column between."""
    rate = config.fps * (_COLUMN_RATE if dense else 1)
    length = (num_frames - 1) * (_COLUMN_RATE if dense else 1) + 1
    curves = speech.mouth_units(utterance.phones, length / rate, rate)
    return np.stack([curves[unit] for unit in config.units], axis=1)


def correlations(encoder: SpeechEncoder, utterances: list[Utterance]) -> dict[str, float]:
    """Pearson r between predicted and true units over all video frames of `utterances`."""
    config = encoder.config
    frames = [int(u.duration_s * config.fps) for u in utterances]
    longest = max(frames)
    waves = np.zeros((len(utterances), config.sample_range(0, longest)[1]), np.float32)
    for row, utterance in zip(waves, utterances, strict=True):
        row[: len(utterance.wave)] = utterance.wave[: len(row)]
    network = Network.of(encoder)
    predicted = [
        np.asarray(_read_units(network, longest, wave))[:n]
        for wave, n in zip(waves, frames, strict=True)
    ]
    true = [target_units(u, config, n) for u, n in zip(utterances, frames, strict=True)]
    predicted, true = np.concatenate(predicted), np.concatenate(true)
    return {
        unit: float(np.corrcoef(predicted[:, i], true[:, i])[0, 1])
        for i, unit in enumerate(config.units)
    }


@functools.partial(jax.jit, static_argnums=1)
def _read_units(network, num_frames, wave):
    encoder = network.bind()
    return encoder.units(encoder.encode(wave[None, None], num_frames))[0, 0]


def load_corpus(task: SpeechTaskConfig) -> tuple[Utterances, dict[str, list[Utterance]]]:
    """Training utterances, and those of `evaluate` by group; synthesised on the first call."""
    config = task.utterances
    prepare_utterances(config, task.cache)
    train, known, new = (
        load_utterances(config, task.cache, split)
        for split in ("train", "held_out_person", "held_out_voice")
    )
    return train, {
        "known_voices": _spread(known, task.num_checks),
        "new_voice": _spread(new, task.num_checks),
    }


def _spread(utterances: Utterances, count: int) -> list[Utterance]:
    """At most that many, of all voices."""
    spoken = utterances.all()
    chosen = np.unique(np.linspace(0, len(spoken) - 1, min(count, len(spoken))).astype(int))
    return [spoken[i] for i in chosen]
