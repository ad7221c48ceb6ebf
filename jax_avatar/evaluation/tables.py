"""Scores as rows of a table: values of all clips, and how far other clips would move them."""

from collections.abc import Callable, Mapping
from typing import Any

from jax_avatar.evaluation.scores import Measures, interval, summarise

__all__ = ["COLUMNS", "rows_of", "scored", "table"]

COLUMNS = {
    "lip_r": "lip r",
    "lip_r_other": "of other clips",
    "lip_lag_frames": "lag",
    "lip_amplitude": "lip amplitude",
    "identity": "identity",
    "motion": "motion",
    "flicker": "flicker",
    "latent_jump": "jump",
    "psnr_above_still": "dB above still",
}
"""Scores of a table, and what its columns are called."""


def scored(measures: Measures, *, seed: int = 0) -> dict[str, Any]:
    """The scores of some clips, and as `interval` the ends of their 95 % bootstrap intervals.

    Args:
        measures: of the clips.
        seed: of the draws of clips.
    """
    ends = interval(lambda index: summarise(measures.take(index)), len(measures.own), seed=seed)
    return summarise(measures) | {"interval": {name: list(pair) for name, pair in ends.items()}}


def rows_of(rows: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table, one row each for what `scored` returned, by name."""
    return table(rows, COLUMNS, _cell)


def table(
    rows: Mapping[str, Mapping[str, Any]],
    columns: Mapping[str, str],
    cell: Callable[[Mapping[str, Any], str], str],
) -> list[str]:
    """Lines of a Markdown table.

    Args:
        rows: name -> scores.
        columns: name of a score -> title.
        cell: text of a row's scores in a column.
    """
    lines = ["| | " + " | ".join(columns.values()) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, scores in rows.items():
        lines.append(f"| {name} | " + " | ".join(cell(scores, key) for key in columns) + " |")
    return lines


def _cell(scores: Mapping[str, Any], key: str) -> str:
    if key not in scores:
        return "n/a"
    low, high = scores["interval"][key]
    digits = {"lip_lag_frames": 0, "identity": 3}.get(key, 2)
    value, low, high = (f"{x + 0.0:.{digits}f}" for x in (scores[key], low, high))
    return f"{value} ({low}..{high})"
