"""Decoded sound of any sample format and layout -> mono samples in [-1, 1], one way for all.

frame --float_channels--> channels --Mixer--> mono, and remarks on what is odd about the sound
"""

import math
import warnings
from collections.abc import Callable, Iterator, Sequence

import av
import numpy as np

from jax_avatar.shapes import Float

__all__ = ["Mixer", "float_channels", "is_silent"]

_SILENT = 1e-4  # largest sample of inaudible sound
_ACROSS = math.sqrt(0.5)
# Shares before they are normalised. Source: ITU-R BS.775-4, table 2, the stereo mix added up.
_SHARES = {"FL": 1.0, "FR": 1.0, "FC": 2 * _ACROSS, "LFE": 0.0, "LFE2": 0.0}
_SURROUND = _ACROSS
# Floats far beyond [-1, 1] are integers that were never divided by their range.
_TOO_LARGE = 16.0
_INTEGER_RANGES = (2.0**15, 2.0**23, 2.0**31)
_CANCELLED, _WHOLE = 0.25, 0.5  # power of the mix over that of its parts, if they had no relation
_MEMORY_S = 1.0  # over which powers are compared
_ONE_SIDED = 1e-4  # power of all other channels over that of the loudest
_LISTEN_S = 30.0  # of sound, before the whole is judged
_QUIET = 10 ** (-40 / 20)  # RMS of the loudest moment, below which speech is quiet
_MOMENT_S = 0.1
_NOISE = 10 ** (-8 / 20)  # RMS of the whole, above which it is no speech
_CLIPPED = 1.5  # largest sample that a lossy codec may make of full scale
_PLANES = 8  # of a frame that PyAV cannot read; one plane fewer it can


def is_silent(samples: Float[np.ndarray, " N"], level: float = _SILENT) -> bool:
    """True if nothing can be heard."""
    return bool(np.abs(samples).max(initial=0) < level)


def float_channels(frame: av.AudioFrame) -> Float[np.ndarray, "c N"]:
    """Channels of a decoded frame, packed or planar, of integers or floats; full scale is 1."""
    data = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(-1, frame.layout.nb_channels).T
    if data.dtype.kind == "u":
        return (data.astype(np.float64) - 128) / 128
    if data.dtype.kind == "i":
        return data / -float(np.iinfo(data.dtype).min)
    return data.astype(np.float64)


class Mixer:
    """Channels -> mono, piece by piece.

    Channels in which nothing was heard yet do not count. The others are mixed as ITU-R BS.775 has
    it. Where the mix cancels itself (one channel is the other upside down) the loudest channel is
    taken alone. Floats in the range of integers are divided by it. Each of these is told once, as
    are speech in a single channel, quiet sound and sound too loud for speech; all of it without
    looking ahead.
    """

    def __init__(self, name: str, warn: Callable[[str], None] = warnings.warn):
        """Starts at the beginning of a sound.

        Args:
            name: of the sound, in remarks.
            warn: called with one line for each remark.
        """
        self._name, self._warn = name, warn
        self._told: set[str] = set()
        self._divisor = 1.0
        self._layout: tuple[str, ...] = ()
        self._levels = _Levels()
        self._pack: av.AudioResampler | None = None

    def frame(self, frame: av.AudioFrame) -> Float[np.ndarray, " N"]:
        """Mono samples of a decoded frame."""
        # Channels of no known place are numbered.
        names = [channel.name for channel in frame.layout.channels]
        layout = ["" if name == "NONE" else name for name in names]
        rate = frame.sample_rate
        if not frame.format.is_planar or len(layout) < _PLANES:
            return self(float_channels(frame), rate, layout)
        if self._pack is None or rate != self._pack.rate:
            self._pack = av.AudioResampler(frame.format.packed.name, frame.layout, rate)
        packed = [float_channels(part) for part in self._pack.resample(frame)]
        return self(np.concatenate(packed, axis=1), rate, layout)

    def __call__(
        self, channels: Float[np.ndarray, "c N"], rate: int, layout: Sequence[str] = ()
    ) -> Float[np.ndarray, " N"]:
        """Mono samples of the next piece.

        Args:
            channels: full scale is 1.
            rate: samples per second.
            layout: FFmpeg's name of each channel; all count alike if not given.
        """
        if not channels.shape[1]:
            return np.zeros(0, np.float32)
        channels = self._in_range(channels)
        layout = tuple(layout) or ("",) * len(channels)
        if layout != self._layout:
            self._begin(layout)
        self._active |= np.abs(channels).max(1) > _SILENT
        shares = self._shares()
        mono = shares @ channels
        if len(channels) > 1:
            self._compare(channels, mono, shares, rate)
            if self._alone is not None:
                shares = np.eye(len(channels))[self._alone]
                mono = channels[self._alone]
            if not np.array_equal(shares, self._before) and self._before is not None:
                # Over the length of a piece: a step would be heard as a click.
                ramp = np.linspace(0, 1, len(mono))
                mono = (1 - ramp) * (self._before @ channels) + ramp * mono
            self._before = shares
        self._levels.add(channels, mono, rate)
        if self._levels.heard_s >= _LISTEN_S:
            self.finish()
        return mono.astype(np.float32)

    def finish(self) -> None:
        """Reports what only the whole shows, unless it was reported before."""
        for kind, text in self._levels.judge(self._layout):
            self._tell(kind, text)

    def _tell(self, kind: str, text: str) -> None:
        if kind not in self._told:
            self._told.add(kind)
            self._warn(f"{self._name}: {text}.")

    def _in_range(self, channels: np.ndarray) -> np.ndarray:
        peak = float(np.abs(channels).max())
        if math.isfinite(peak) and peak > self._divisor * _TOO_LARGE:
            self._divisor = next((r for r in _INTEGER_RANGES if peak <= 2 * r), peak)
            self._tell(
                "range",
                f"holds floats of up to {peak:.4g}, expected [-1, 1]; divided by "
                f"{self._divisor:.0f}, the range of integers",
            )
        return channels / self._divisor if self._divisor != 1 else channels

    def _begin(self, layout: tuple[str, ...]) -> None:
        self._layout = layout
        shares = np.array([_SHARES.get(name, _SURROUND) for name in layout])
        self._all = shares if shares.any() else np.ones(len(layout))
        self._active = np.zeros(len(layout), bool)
        self._recent, self._recent_mix = np.zeros(len(layout)), 0.0
        self._levels.total = np.zeros(len(layout))
        self._alone: int | None = None
        self._before: np.ndarray | None = None

    def _shares(self) -> np.ndarray:
        heard = self._all * self._active
        if not heard.any():  # silence so far, or sound in the bass channel only
            heard = np.where(self._active, 1.0, 0.0) if self._active.any() else self._all
        return heard / heard.sum()

    def _compare(self, channels: np.ndarray, mono: np.ndarray, shares: np.ndarray, rate: int):
        """Notices whether the channels cancel each other."""
        kept = math.exp(-len(mono) / rate / _MEMORY_S)
        self._recent = kept * self._recent + (channels**2).sum(1)
        self._recent_mix = kept * self._recent_mix + float((mono**2).sum())
        parts = float(shares**2 @ self._recent)
        if parts < rate * _MEMORY_S * _SILENT**2:
            return
        if self._recent_mix < _CANCELLED * parts and self._alone is None:
            self._alone = int((shares**2 * self._recent).argmax())
            named = self._layout[self._alone] or str(self._alone + 1)
            self._tell(
                "phase",
                "its channels are out of phase and cancel each other; channel "
                f"{named} is used alone",
            )
        elif self._recent_mix > _WHOLE * parts:
            self._alone = None


class _Levels:
    """Levels of a sound since its beginning, and what is odd about them as a whole."""

    def __init__(self):
        self.total: np.ndarray | None = None  # power of each channel
        self.heard_s = self.peak = self.loudest = 0.0
        self.power, self.num = 0.0, 0  # of the mix
        self.is_judged = False

    def add(self, channels: np.ndarray, mono: np.ndarray, rate: int) -> None:
        """Adds a piece."""
        self.total += (channels**2).sum(1)
        self.peak = max(self.peak, float(np.abs(mono).max()))
        self.power, self.num = self.power + float((mono**2).sum()), self.num + len(mono)
        size = max(1, round(_MOMENT_S * rate))
        for start in range(0, len(mono), size):
            part = mono[start : start + size]
            # The end of a piece may be a moment too short to say anything.
            power = float((part**2).sum()) / max(len(part), size // 4)
            self.loudest = max(self.loudest, math.sqrt(power))
        if not is_silent(mono):
            self.heard_s += len(mono) / rate

    def judge(self, layout: Sequence[str]) -> Iterator[tuple[str, str]]:
        """Kind and text of each remark on the whole; none the second time.

        Args:
            layout: names of the channels.
        """
        if self.is_judged or self.total is None:
            return
        self.is_judged = True
        loud = int(self.total.argmax())
        others = self.total.sum() - self.total[loud]
        is_one_sided = len(self.total) > 1 and others < _ONE_SIDED * self.total[loud]
        if is_one_sided and self.peak > _SILENT:
            named = layout[loud] or str(loud + 1)
            yield "side", f"only channel {named} of {len(self.total)} carries sound; it is used"
        rms = math.sqrt(self.power / max(1, self.num))
        if rms > _NOISE:
            yield (
                "noise",
                f"is as loud as noise ({20 * math.log10(rms):.0f} dB on the whole); speech is not: "
                "it is clipped, or raw samples of another format than was told",
            )
        elif self.peak > _CLIPPED:
            yield (
                "clipped",
                f"goes up to {self.peak:.3g}, full scale is 1; the sound of the video is clipped",
            )
        if self.peak > _SILENT and self.loudest < _QUIET:
            yield (
                "quiet",
                f"is very quiet ({20 * math.log10(max(self.loudest, 1e-9)):.0f} dB at its loudest)"
                "; the face hears it louder, the sound of the video stays as it is",
            )
