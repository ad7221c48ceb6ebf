"""Teaches the speech encoder what a face does: waveform -> face units, on synthesised speech.

corpus (flite, once) -> crop -> augment -> wave ------> SpeechEncoder -> units
                                      +-> phones -> mouth_units ---------> squared error
"""

import dataclasses
import functools
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jax_avatar.data.talking_people import speech
from jax_avatar.data.talking_people.speech import Phone, Utterance
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
        cache: folder for the synthesised corpus; made once, read afterwards.
        num_sentences: training utterances, spread over the training voices.
        num_check_sentences: other sentences for `evaluate`, per group of voices.
        clip_frames: video frames of a training clip.
        batch: clips per step.
        seed: of the sentences, the voices and the augmentation.
    """

    cache: str = "speech_corpus"
    num_sentences: int = 900
    num_check_sentences: int = 36
    clip_frames: int = 41
    batch: int = 16
    seed: int = 0


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
        clips = [self._clip(rng) for _ in range(max(8, task.num_sentences // 8))]
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
            "voices": speech.TRAINING_VOICES,
            "held_out_voice": speech.HELD_OUT_VOICE,
        }
        keep_checksums(folder)
        save_weights(folder, "speech", params, dataclasses.asdict(self.config), metadata)

    def _clip(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        config, frames = self.config, self.task.clip_frames
        duration_s = config.sample_range(0, frames)[1] / config.sample_rate
        utterance = self.corpus[rng.integers(len(self.corpus))]
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


def load_corpus(task: SpeechTaskConfig) -> tuple[list[Utterance], dict[str, list[Utterance]]]:
    """Training utterances, and those of `evaluate` by group; synthesised on the first call."""
    lines = speech.sentences(task.num_sentences + task.num_check_sentences, task.seed)
    train, check = lines[: task.num_sentences], lines[task.num_sentences :]
    jobs = {
        "train": (train, speech.TRAINING_VOICES, task.seed),
        "known_voices": (check, speech.TRAINING_VOICES, None),
        "new_voice": (check, (speech.HELD_OUT_VOICE,), None),
    }
    folder = Path(task.cache)
    folder.mkdir(parents=True, exist_ok=True)
    loaded = {}
    for name, (texts, voices, seed) in jobs.items():
        path = folder / f"{name}_{len(lines)}_{len(texts)}_{task.seed}.npz"
        if not path.exists():
            _write(path, _synthesise_all(texts, voices, seed))
        loaded[name] = _read(path)
    return loaded.pop("train"), loaded


def _synthesise_all(texts, voices, seed) -> list[Utterance]:
    rng = np.random.default_rng(seed)
    settings = [
        dict(voice=voices[i % len(voices)])
        | (
            dict(pitch=rng.uniform(0.92, 1.08), speed=rng.uniform(0.88, 1.15))
            if seed is not None
            else {}
        )
        for i in range(len(texts))
    ]
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda text, kw: speech.synthesise(text, **kw), texts, settings))


def _write(path: Path, utterances: list[Utterance]) -> None:
    notes = [dict(text=u.text, voice=u.voice, phones=u.phones) for u in utterances]
    unfinished = path.with_suffix(".tmp.npz")
    np.savez(
        unfinished,
        wave=np.concatenate([np.round(u.wave * 32767).astype(np.int16) for u in utterances]),
        ends=np.cumsum([len(u.wave) for u in utterances]),
        notes=np.array(json.dumps(notes)),
    )
    unfinished.rename(path)


def _read(path: Path) -> list[Utterance]:
    with np.load(path, allow_pickle=False) as file:
        waves = np.split(file["wave"].astype(np.float32) / 32767, file["ends"][:-1])
        notes = json.loads(str(file["notes"]))
    return [
        Utterance(wave, tuple(Phone(*p) for p in note["phones"]), note["text"], note["voice"])
        for wave, note in zip(waves, notes, strict=True)
    ]
