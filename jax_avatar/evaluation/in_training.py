"""How a transformer in training does: held-out clips, streamed, scored and written as videos.

averaged weights --the real streaming sampler--> frames --> scores
                                                    +-----> samples/step_000250/0.mp4 ...
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jax_avatar.data.records import ClipRecord
from jax_avatar.evaluation.mouth_probe import MouthProbe
from jax_avatar.evaluation.scores import Truth, fit_probe, score
from jax_avatar.io.checkpoint import load_json
from jax_avatar.io.video import VideoWriter
from jax_avatar.shapes import PyTree
from jax_avatar.streaming.batch import BatchStream
from jax_avatar.streaming.model import AvatarModel, Network, load_network, load_settings
from jax_avatar.training.stages import load_clips
from jax_avatar.training.teacher import SamplerConfig, make_sampler

__all__ = ["ClipEvaluation", "make_evaluation", "write_clip"]

HELD_OUT = "held_out_person"
"""Clips that are shown during training."""

_PROBE_CLIPS, _PROBE_STEPS = 150, 8  # clips that the mouth's probe is fitted on, steps per clip


class ClipEvaluation:
    """Makes clips with the weights of the moment; everything is set up and compiled once."""

    def __init__(
        self,
        stream: BatchStream,
        clips: Sequence[ClipRecord],
        probe: MouthProbe,
        folder: str | Path,
        *,
        num_videos: int = 3,
    ):
        """Binds everything but the weights.

        Args:
            stream: of the model in training.
            clips: held-out clips of equal length; their portraits and voices are streamed.
            probe: reads the opening of the mouth.
            folder: for the videos.
            num_videos: written per call, the first clips.
        """
        self.stream, self.clips, self.probe = stream, clips, probe
        self.folder, self.num_videos = Path(folder), num_videos
        self._truth = Truth.from_clips(clips)

    def __call__(self, params: PyTree, step: int) -> dict[str, float]:
        """Scores of the clips; the first of them are written as videos.

        Args:
            params: of the transformer.
            step: of training, for the folder's name.
        """
        self.stream.params = params
        portraits = np.stack([clip.portrait for clip in self.clips])
        waves = np.stack([clip.wave for clip in self.clips]).astype(np.float32) / 32768
        frames = self.stream(portraits, waves, len(self.clips[0].frames))
        folder = self.folder / f"step_{step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        rate = self.stream.model.speech.config.sample_rate
        for i in range(min(self.num_videos, len(frames))):
            clip = self.clips[i]
            write_clip(folder / f"{i}.mp4", clip.portrait, frames[i], waves[i], clip.fps, rate)
        return score(frames, self._truth, self.probe)


def make_evaluation(
    settings: Mapping[str, Any], task: Any, folder: str | Path, *, num_clips: int = 8
) -> ClipEvaluation:
    """The evaluation of a stage that trains a transformer.

    Args:
        settings: of the run, plain values, from its config file.
        task: of the stage: has `graphdef` and `model`, and `whole`, which makes parameters of the
            transformer from what is trained.
        folder: for the videos.
        num_clips: held-out clips that are made.
    """
    weights, rollout = settings["weights"], settings.get("rollout", {})
    folders = {n: weights.get(n) or weights["model"] for n in ("vae", "speech")}
    changes = {n: rollout[n] for n in ("sigmas", "sink_distance") if n in rollout}
    kinds = load_json(Path(weights["model"]) / "config.json")
    model = AvatarModel(
        name=settings["stage"],
        dit=Network(task.graphdef, {}, task.model, {}),
        settings=load_settings(weights["model"], **changes),
        **{name: load_network(path, name, kinds[name]) for name, path in folders.items()},
    )
    sample = None
    if "sampler" in settings:
        sampler = SamplerConfig(**settings["sampler"])
        sample = make_sampler(task.graphdef, task.model, sampler, pose=model.settings.pose)
    train, held_out = (load_clips(settings["data"], split) for split in ("train", HELD_OUT))
    few = [train[i] for i in range(0, len(train), -(-len(train) // _PROBE_CLIPS))]
    probe = fit_probe(few, num_steps=_PROBE_STEPS * len(few))
    clips = [held_out[i] for i in range(min(num_clips, len(held_out)))]
    return ClipEvaluation(BatchStream(model, sample=sample), clips, probe, folder)


def write_clip(
    path: str | Path,
    portrait: np.ndarray,
    frames: np.ndarray,
    wave: np.ndarray,
    fps: int,
    sample_rate: int,
) -> None:
    """Writes a video with sound, the portrait beside it.

    Args:
        path: .mp4.
        portrait: `[H W 3]` uint8, or `[T H W 3]`, a video of the same length.
        frames: `[T H W 3]` uint8.
        wave: mono in [-1, 1].
        fps: frames per second.
        sample_rate: of the wave.
    """
    still = np.broadcast_to(portrait, frames.shape)
    both = np.concatenate([still, frames], axis=2)
    height, width = both.shape[1:3]
    with VideoWriter(path, width, height, fps, sample_rate) as video:
        video.write_audio(np.asarray(wave, np.float32))
        video.write_frames(both)
