"""Filters of clips: each returns a reason for rejection, or None.

A filter is any `clip -> reason or None`. What is here needs nothing but the clip. Judges that come
with weights of their own (SyncNet's confidence and offset, Q-Align's quality, a finder of burnt-in
text) are filters, too: wrap them in a function and pass it along; this project ships none.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jax_avatar.data.records import ClipRecord
from jax_avatar.data.videos.footage import SAMPLE_RATE

__all__ = ["Filter", "HasSound", "HasSpeech", "speech_share"]

Filter = Callable[[ClipRecord], str | None]
"""Reason to reject a clip, or None to keep it."""

_FRAME = SAMPLE_RATE * 30 // 1000  # samples that the detector judges at once


@dataclass(frozen=True)
class HasSound:
    """Rejects digital silence, and sound that ends before the picture.

    Attributes:
        level: of the loudest sample, of 1.
    """

    level: float = 0.01

    def __call__(self, clip: ClipRecord) -> str | None:
        """The reason, or None."""
        needed = len(clip.frames) * SAMPLE_RATE // clip.fps
        if len(clip.wave) < needed:
            return f"sound ends after {len(clip.wave) / SAMPLE_RATE:.1f} s"
        loudest = np.abs(clip.wave[:needed].astype(np.float32)).max() / 32768
        return None if loudest >= self.level else f"silent (loudest sample {loudest:.4f})"


@dataclass(frozen=True)
class HasSpeech:
    """Rejects clips with too many pauses, music or noise.

    Attributes:
        least: share of the time with speech.
        strictness: 0 to 3 of the detector; 3 takes the least for speech.
    """

    least: float = 0.7
    strictness: int = 2

    def __call__(self, clip: ClipRecord) -> str | None:
        """The reason, or None."""
        share = speech_share(clip.wave, self.strictness)
        return None if share >= self.least else f"speech in {share:.0%} of the time"


def speech_share(wave: np.ndarray, strictness: int = 2) -> float:
    """Share of the time with speech in it.

    Args:
        wave: `[n]` int16, 16 kHz.
        strictness: 0 to 3; 3 takes the least for speech.

    Source: the voice activity detector of WebRTC.
    """
    import webrtcvad

    detector = webrtcvad.Vad(strictness)
    parts = [wave[i : i + _FRAME] for i in range(0, len(wave) - _FRAME + 1, _FRAME)]
    if not parts:
        return 0.0
    return float(np.mean([detector.is_speech(p.tobytes(), SAMPLE_RATE) for p in parts]))
