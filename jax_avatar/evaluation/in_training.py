"""Evaluation of a transformer in training: held-out clips, streamed, scored, written as videos.

weights, averaged and raw --the real streaming sampler, on the run's mesh--> frames --> scores
                                              +--> samples/step_000250/0.mp4 ...
"""

import functools
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from jax_avatar.data.encoded import read_index
from jax_avatar.data.records import ClipRecord
from jax_avatar.evaluation.kit import write_clips
from jax_avatar.evaluation.motion_kit import MotionClips
from jax_avatar.evaluation.mouth_probe import MouthProbe
from jax_avatar.evaluation.scores import Truth, fit_probe, has_lips, score
from jax_avatar.models.vae.anchored import GROUP
from jax_avatar.shapes import PyTree
from jax_avatar.streaming.batch import BatchStream
from jax_avatar.training.run.placement import on_first_host
from jax_avatar.training.stages.build import HELD_OUT, load_clips, load_latents
from jax_avatar.training.teacher import SamplerConfig, make_sampler
from jax_avatar.weights.folder import AvatarModel, fitting_stream, load_settings
from jax_avatar.weights.networks import kind_of, load_network

__all__ = ["ClipEvaluation", "MotionEvaluation", "make_evaluation"]

_PROBE_CLIPS, _PROBE_STEPS = 150, 8  # clips that the mouth's probe is fitted on, steps per clip
_LONGEST_S = 5  # of a clip
_logger = logging.getLogger(__name__)


class ClipEvaluation:
    """Makes clips with the weights of the moment; everything is set up and compiled once.

    An `Evaluation` of the training loop.
    """

    def __init__(
        self,
        stream: BatchStream,
        clips: Sequence[ClipRecord],
        folder: str | Path,
        *,
        bind: Callable[[PyTree], PyTree] = lambda weights: weights,
        make_probe: Callable[[], MouthProbe] | None = None,
        num_videos: int = 3,
    ):
        """Binds everything but the weights.

        Args:
            stream: of the model in training.
            clips: held-out clips; their portraits and voices are streamed, as long as the shortest.
            folder: for the videos.
            bind: parameters of the streamed transformer from what is trained.
            make_probe: of the opening of the mouth; called when first needed, on the first host;
                lips are not scored if not given.
            num_videos: written per call, the first clips.
        """
        self.stream, self.clips = stream, clips
        self.folder, self.num_videos, self._bind = Path(folder), num_videos, bind
        self._probe = functools.cache(make_probe or (lambda: None))
        frames = min(_LONGEST_S * clips[0].fps, *(len(clip.frames) for clip in clips))
        self._truth = Truth.from_clips(clips, stop=frames)

    def check(self, state: PyTree) -> None:
        """Streams, scores and writes one block of the clips, and throws it away."""
        block = 4 * self.stream.model.dit.config.frames_per_block
        with tempfile.TemporaryDirectory() as folder:
            self._scores(state.ema, self._truth.cut(block), Path(folder))
        on_first_host(lambda: self.folder.mkdir(parents=True, exist_ok=True))

    def __call__(self, state: PyTree, step: int) -> dict[str, float]:
        """Scores of the averaged weights, and as `raw/...` of those that are trained.

        The first clips of either are written as videos.

        Args:
            state: of training.
            step: of training, for the folder's name.
        """
        folder = self.folder / f"step_{step:06d}"
        scores = self._scores(state.ema, self._truth, folder)
        raw = self._scores(state.params, self._truth, folder / "raw")
        return scores | {f"raw/{name}": value for name, value in raw.items()}

    def _scores(self, weights: PyTree, truth: Truth, folder: Path) -> dict[str, float]:
        self.stream.params = self._bind(weights)
        count = truth.frames.shape[1]
        frames = self.stream(truth.portrait, self._waves(count), count)
        self.stream.release()

        def finish():
            self._write(folder, frames)
            return score(frames, truth, self._probe())

        return on_first_host(finish)

    def _waves(self, frames: int) -> np.ndarray:
        """Sound of so many frames and a second after, padded with silence."""
        rate, fps = self.stream.model.speech.config.sample_rate, self.clips[0].fps
        samples = (frames + fps) * rate // fps
        waves = [clip.wave[:samples] for clip in self.clips]
        padded = [np.pad(wave, (0, samples - len(wave))) for wave in waves]
        return np.stack(padded).astype(np.float32) / 32768

    def _write(self, folder: Path, frames: np.ndarray) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        rate, fps = self.stream.model.speech.config.sample_rate, self.clips[0].fps
        count = frames.shape[1]
        write_clips(
            [folder / f"{i}.mp4" for i in range(self.num_videos)],
            *(self._truth.portrait, frames, self._waves(count)[:, : count * rate // fps]),
            fps=fps,
            sample_rate=rate,
        )


class MotionEvaluation:
    """Makes motion with the weights of the moment, for VAEs whose latents are nothing else.

    An `Evaluation` of the training loop.
    """

    def __init__(self, stream: BatchStream, clips: MotionClips, bind: Callable[[PyTree], PyTree]):
        """Binds everything but the weights.

        Args:
            stream: of the model in training.
            clips: held-out speech and its motion.
            bind: parameters of the streamed transformer from what is trained.
        """
        self.stream, self.clips, self._bind = stream, clips, bind

    def check(self, state: PyTree) -> None:
        """Makes the clips, and scores them, once."""
        self(state, 0)

    def __call__(self, state: PyTree, step: int) -> dict[str, float]:
        """Scores of the averaged weights, see `motion_scores`.

        Args:
            state: of training.
            step: of training.
        """
        del step
        self.stream.params = self._bind(state.ema)
        made = self.clips.make(self.stream)
        self.stream.release()

        def scores():
            found = self.clips.scores(made)
            return {name: value for name, value in found.items() if name != "interval"}

        return on_first_host(scores)


def make_evaluation(
    settings: Mapping[str, Any], task: Any, mesh: Mesh, folder: str | Path, *, num_clips: int = 8
) -> ClipEvaluation | MotionEvaluation | None:
    """The evaluation of a stage that trains a transformer.

    Args:
        settings: of the run, plain values, from its config file.
        task: a `Task` whose `streamed` is a transformer; it also has `bound(weights, mesh)`, the
            transformer's parameters, and `stream_settings`.
        mesh: of the run.
        folder: for the videos.
        num_clips: held-out clips that are made.

    Returns:
        None where there are no raw clips to compare with, which is logged.

    Raises:
        ValueError: the clips or the networks around the transformer cannot be read.
    """
    if settings["latents"] and not settings["data"]:
        if _latents_are_motion(settings) and HELD_OUT in read_index(settings["latents"])["splits"]:
            return _motion_evaluation(settings, task, mesh, num_clips)
        _logger.warning(
            "no clips are streamed while training: config.data is empty, and encoded clips have no "
            "frames to compare with; give the folder of the raw ones."
        )
        return None
    data = settings["data"]
    if Path(data).is_dir() and data and not any(Path(data).glob(f"{HELD_OUT}-*.array_record")):
        _logger.warning(
            f"no clips are streamed while training: {data} has none of split {HELD_OUT}; prepare "
            "some to have them."
        )
        return None
    model = _model(settings, task.streamed, task.stream_settings)
    train, held_out = (load_clips(settings["data"], split) for split in ("train", HELD_OUT))
    clips = [held_out[i] for i in range(min(num_clips, len(held_out)))]
    few = range(0, len(train), -(-len(train) // _PROBE_CLIPS))
    make_probe = None
    if has_lips(train[0]) and all(map(has_lips, clips)):

        def make_probe():
            return fit_probe([train[i] for i in few], num_steps=_PROBE_STEPS * len(few))

    else:
        _logger.warning(
            f"lips are not scored while training: clips in {settings['data']} do not say where the "
            "mouth is and how far it is open, as rendered ones do."
        )
    return ClipEvaluation(
        _stream(settings, model, mesh),
        clips,
        folder,
        bind=lambda weights: task.bound(weights, mesh),
        make_probe=make_probe,
    )


def _stream(settings, model: AvatarModel, mesh: Mesh) -> BatchStream:
    """Streams a model in training, or samples it where it is a teacher."""
    sample = None
    if "sampler" in settings:
        sampler, pose = SamplerConfig(**settings["sampler"]), model.settings.pose
        sample = make_sampler(model.dit, sampler, pose=pose, mesh=mesh)
    return BatchStream(model, sample=sample, mesh=mesh)


def _encoder_folders(settings) -> dict[str, str]:
    weights = settings["weights"]
    return {name: weights.get(name) or weights["model"] for name in ("vae", "speech")}


def _latents_are_motion(settings) -> bool:
    return kind_of(_encoder_folders(settings)["vae"], "vae") == "anchored"


def _motion_evaluation(settings, task, mesh, num_clips) -> MotionEvaluation:
    model = _model(settings, task.streamed, task.stream_settings)
    clips = load_latents({**settings, "weights": _encoder_folders(settings)}, HELD_OUT)
    seconds = settings["task"]["latents"] * GROUP / clips.fps
    block = model.dit.config.frames_per_block
    motion = MotionClips(
        clips, model.vae.bind(), count=num_clips, seconds=seconds, block=block, seeds=2
    )
    return MotionEvaluation(
        _stream(settings, model, mesh), motion, lambda weights: task.bound(weights, mesh)
    )


def _model(settings, dit, changes) -> AvatarModel:
    """The transformer in training among the networks of the model that will be exported."""
    weights = settings["weights"]
    folders = _encoder_folders(settings)
    # As this network is trained, whatever that of the folder was.
    stream = load_settings(
        weights["model"], force_sampler=True, **fitting_stream(changes, dit.config)
    )
    networks = {name: load_network(path, name, fps=stream.fps) for name, path in folders.items()}
    dit = dit.with_params({})
    return AvatarModel(name=settings["stage"], dit=dit, settings=stream, **networks)
