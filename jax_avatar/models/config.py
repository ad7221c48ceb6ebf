"""Sizes and switches of the networks, checked when built; the published sizes by name."""

from dataclasses import dataclass

__all__ = ["DiTConfig"]
