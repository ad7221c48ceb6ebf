"""The ablations of Live Avatar's tables, by name.

    python launch/train.py --config=configs/ablations.py:clean_history --workdir runs/clean_history
    python launch/train.py --config=configs/ablations.py:steps_2,tiny --workdir runs/tiny/steps_2

After the colon stand the name, then the size ("tiny", "small" or "wan_s2v_14b"; "small" if not
given). Names that begin with "stage1_" are of `configs/diffusion_forcing.py`, all others of
`configs/dmd.py`; `baseline` and `stage1_baseline` change nothing there. A student keeps its levels,
sampler and history, so `stream.py` and `evaluate.py` need no flag. A student with other blocks
starts from a stage 1 with the same, in `runs/NAME`, which is trained first:

    CONFIG=configs/ablations.py
    python launch/train.py --config=$CONFIG:stage1_block_1 --workdir runs/stage1_block_1
    python launch/train.py --config=$CONFIG:block_1 --workdir runs/block_1

`levels_released` is for the 14B only: its last level lies below those of the small network, whose
run is refused.

Ablations of inference alone train nothing: `INFERENCE` names them with the command that sets each,
and `train.py` answers such a name with that command.

Source: Live Avatar (arXiv 2512.04677), tables 3 to 6 and 10 of version 5.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ml_collections import ConfigDict

from configs import diffusion_forcing, dmd

__all__ = ["ABLATIONS", "INFERENCE", "Ablation", "get_config"]

Settings = Mapping[str, Any]
Change = Any | Callable[[Settings], Any]
STAGE_1 = "stage1_"


@dataclass(frozen=True)
class Ablation:
    """Settings that a run changes.

    Attributes:
        where: table of the paper, or another question.
        changes: `section.setting` -> its value, or a function of all settings of the size.
    """

    where: str
    changes: Mapping[str, Change] = field(default_factory=dict)


def times(
    factor: float, section: str, setting: str, default: float | None = None
) -> Callable[[Settings], float]:
    """The size's own value of a setting, or its default, times a factor."""
    return lambda settings: factor * settings[section].get(setting, default)


def blocks_of(count: int) -> dict[str, Change]:
    """Blocks of so many latents; the window keeps as many past latents, rounded up to blocks."""

    def ring(settings: Settings) -> int:
        past = 3 * (settings["model"]["ring_blocks"] - 1)
        return 1 - (-past // count)

    def latents(settings: Settings) -> int:
        return settings["task"]["latents"] // count * count

    return {
        "model.frames_per_block": count,
        "model.ring_blocks": ring,
        "task.latents": latents,
    }


def started_from(name: str) -> dict[str, Change]:
    """A student that starts from another stage 1, in sizes where one starts from any."""

    def folder(settings: Settings) -> str:
        return f"runs/{name}" if settings["weights"]["student"] else ""

    return {"weights.student": folder}


_HISTORY = {
    "baseline": Ablation("tables 4 to 6, ours: history at the noise level of the same step"),
    "clean_history": Ablation(
        "table 6, clean; table 4, w/o History Corrupt", {"rollout.refresh": "clean"}
    ),
    "fixed_history": Ablation("table 6, fixed noise t = 557", {"rollout.refresh": "fixed"}),
    "kv_noise": Ablation("History Corrupt as noise on keys and values", {"rollout.kv_noise": 0.1}),
    "algorithm_1": Ablation(
        "Algorithm 1 as printed",
        {"rollout.cache": "exit_only", "rollout.sampler": "renoise", "rollout.gradient": "clip"},
    ),
    "exit_only": Ablation(
        "Algorithm 1's one history for all steps", {"rollout.cache": "exit_only"}
    ),
    "renoise": Ablation("Algorithm 1's sampler", {"rollout.sampler": "renoise"}),
    "window_3": Ablation("the released ring of 3 past blocks", {"model.ring_blocks": 4}),
    "heard_clip": Ablation(
        "speech of earlier blocks is heard, too", {"rollout.audio_context": "clip"}
    ),
    "sink_per_clip": Ablation("one sink distance per clip", {"rollout.sink_distance_per": "clip"}),
    "no_shift": Ablation("clips always at position 0", {"rollout.shift_max": 0}),
}
_STEPS = {
    **{
        f"steps_{count}": Ablation(
            f"table 5, {count} steps", {"rollout.sigmas": f"self_forcing:{count}"}
        )
        for count in (4, 3, 2, 1)
    },
    **{
        f"levels_{name}": Ablation("the step set", {"rollout.sigmas": name})
        for name in ("self_forcing", "shift3", "paper_uniform", "released")
    },
}
_BLOCKS = {
    f"block_{count}": Ablation(
        f"table 10, blocks of {count}", blocks_of(count) | started_from(f"stage1_block_{count}")
    )
    for count in (1, 2, 4)
}
_SCORES = {
    "guidance_1": Ablation("no guidance", {"task.guidance_scale": 1.0}),
    "guidance_3": Ablation("less guidance, against over-saturation", {"task.guidance_scale": 3.0}),
    "guidance_6": Ablation("LiveTalk's guidance", {"task.guidance_scale": 6.0}),
    "guidance_apart": Ablation(
        "LiveTalk's prompt and speech guided apart",
        {"task.guidance_scale": 6.0, "task.text_guidance_scale": 3.0},
    ),
    "guidance_band": Ablation(
        "guidance at middle levels only", {"task.guidance_bounds": [0.4, 0.9]}
    ),
    "normalizer_block": Ablation("LongLive 2's normaliser", {"task.normalizer": "block"}),
    "ratio_1": Ablation("one critic update per generator update", {"task.generator_every": 1}),
    "adaptive_critic": Ablation(
        "a critic that lags learns more often", {"task.max_critic_steps": 10}
    ),
    "slow_rates": Ablation(
        "a fifth of both rates, as Self-Forcing's to the paper's",
        {
            "loop.learning_rate": times(0.2, "loop", "learning_rate"),
            "task.critic_learning_rate": times(0.2, "task", "critic_learning_rate", 2e-6),
        },
    ),
    "cosine": Ablation("rates that fall along a cosine", {"loop.schedule": "cosine"}),
    "no_average": Ablation("the last weights instead of their average", {"loop.ema_decay": 0.0}),
}
_STAGE_1 = {
    "baseline": Ablation("stage 1 of the baseline"),
    **{
        f"block_{count}": Ablation(f"table 10, stage 1 of blocks of {count}", blocks_of(count))
        for count in (1, 2, 4)
    },
    "fast_rate": Ablation(
        "the released yaml's rate, five times the paper's",
        {"loop.learning_rate": times(5.0, "loop", "learning_rate")},
    ),
    "gaussian_weight": Ablation("Self-Forcing's weight of levels", {"task.weight": "gaussian"}),
    "one_level": Ablation("one noise level per clip, no forcing", {"task.shared_share": 1.0}),
    "sink_fixed": Ablation("the portrait stays where it is", {"task.sink": "fixed"}),
    "no_shift": Ablation("clips always at position 0", {"task.shift_max": 0}),
    "no_dropout": Ablation(
        "speech and prompt never left out", {"task.audio_dropout": 0.0, "task.text_dropout": 0.0}
    ),
    "window_3": Ablation("the released ring of 3 past blocks", {"model.ring_blocks": 4}),
    "heard_clip": Ablation(
        "speech of earlier blocks is heard, too", {"task.audio_context": "clip"}
    ),
    "scaffold": Ablation(
        "version 5: noised latents before the clip are seen", {"task.motion_frames": "scaffold"}
    ),
}

ABLATIONS: dict[str, Ablation] = {
    **_HISTORY,
    **_STEPS,
    **_BLOCKS,
    **_SCORES,
    **{STAGE_1 + name: ablation for name, ablation in _STAGE_1.items()},
}
"""Those that train, by name."""

INFERENCE: dict[str, str] = {
    "no_tpp": "python benchmarks/stream.py --mesh 1+1",
    "tensor_parallel": "python benchmarks/stream.py --mesh 1x4+1",
    "no_vae_parallel": "python benchmarks/stream.py --mesh 4",
    "tpp": "python benchmarks/stream.py --mesh 5",
    "no_dmd": "python launch/evaluate.py --checkpoint runs/teacher --sampler teacher --steps 40 "
    "--guidance 4",
    "no_aas": "python launch/evaluate.py --noaas",
    "no_rolling_rope": "python launch/evaluate.py --norolling_rope",
}
"""Those of tables 3 and 4 that change the stream alone: name -> command."""


def get_config(text: str = "baseline") -> ConfigDict:
    """Settings of an ablation.

    Args:
        text: its name, and after a comma the size, as in "clean_history,tiny".

    Raises:
        ValueError: the name or the size is unknown, or the ablation trains nothing.
    """
    name, _, size = text.replace(" ", "").partition(",")
    if name in INFERENCE:
        raise ValueError(f"ablation {name!r} trains nothing; run: {INFERENCE[name]}")
    if name not in ABLATIONS:
        known = [*ABLATIONS, *INFERENCE]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"ablation {name!r} is unknown; write one of {', '.join(known)}{hint}")
    stage = diffusion_forcing if name.startswith(STAGE_1) else dmd
    settings = stage.get_config(size or "small").to_dict()
    changes = {
        path: change(settings) if callable(change) else change
        for path, change in ABLATIONS[name].changes.items()
    }
    for path, value in changes.items():
        section, _, setting = path.partition(".")
        settings[section][setting] = value
    return ConfigDict(settings)
