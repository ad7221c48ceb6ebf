"""Frames and samples -> fragments of MP4 in memory, for a player that appends them as they come."""

from fractions import Fraction
from typing import Any

import av
import numpy as np
from jaxtyping import UInt8

from jax_avatar.io.audio import Resampler
from jax_avatar.io.provenance import COMMENT
from jax_avatar.shapes import Float

__all__ = ["FragmentWriter"]

_SOUND_RATE = 48_000  # the higher, the shorter are AAC's frames, and the wait for the next
_PRIMING = 1024  # samples that AAC puts first; picture and sound both wait for them


class FragmentWriter:
    """H.264 and AAC in fragments of about a frame; the first bytes describe the stream.

    Attributes:
        mime: type and codecs, as `MediaSource` asks for.
        delay_s: time in the stream of video frame 0 and audio sample 0.
    """

    def __init__(self, width: int, height: int, fps: int, audio_rate: int):
        """Opens the encoders.

        Args:
            width: pixels, even.
            height: pixels, even.
            fps: frames per second.
            audio_rate: samples per second of the sound that comes.
        """
        self._out = _Memory()
        options = {
            # A header without samples, then fragments that stand on their own.
            "movflags": "empty_moov+default_base_moof",
            "frag_duration": str(round(1e6 / fps)),
            "flush_packets": "1",
        }
        self._container = av.open(self._out, "w", format="mp4", options=options)
        self._container.metadata["comment"] = COMMENT
        self._rate, self._per_frame = audio_rate, Fraction(_SOUND_RATE, fps)
        self._resample = Resampler(_SOUND_RATE)
        self._video = self._container.add_stream("libx264", rate=fps)
        self._video.width, self._video.height = width, height
        self._video.pix_fmt = "yuv420p"
        # One clock for both, so that neither is rounded to the other.
        self._video.time_base = self._video.codec_context.time_base = Fraction(1, _SOUND_RATE)
        self._video.options = {"crf": "20", "preset": "veryfast", "tune": "zerolatency",
                               "profile": "main"}  # fmt: skip
        self._video.gop_size = fps
        self._audio = self._container.add_stream("aac", rate=_SOUND_RATE, layout="mono")
        self._audio.bit_rate = 64_000
        self._container.start_encoding()
        self.mime = f'video/mp4; codecs="{self._avc()}, mp4a.40.2"'
        self.delay_s = _PRIMING / _SOUND_RATE
        self._frames = self._samples = self._encoded = 0

    def write(self, frames: UInt8[np.ndarray, "T H W 3"], sound: Float[np.ndarray, " N"]) -> bytes:
        """Encodes picture and sound of the same time; returns what has become ready to send."""
        for pixels in frames:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts = _PRIMING + round(self._frames * self._per_frame)
            frame.time_base = Fraction(1, _SOUND_RATE)
            self._frames += 1
            following = _PRIMING + round(self._frames * self._per_frame)
            self._mux(self._video.encode(frame), following - frame.pts)
        self._write_sound(self._resample(sound, self._rate))
        return self._out.take()

    @property
    def offset_s(self) -> float:
        """By how much the picture that was handed out is ahead of the sound."""
        picture = _PRIMING + self._frames * self._per_frame
        return float(picture - self._encoded) / _SOUND_RATE

    def close(self) -> bytes:
        """Ends the stream; returns its last bytes."""
        if self._container is None:
            return b""
        self._write_sound(self._resample.finish())
        container, self._container = self._container, None
        container.mux(self._video.encode(None))
        container.mux(self._audio.encode(None))
        container.close()
        return self._out.take()

    def _write_sound(self, samples: np.ndarray) -> None:
        if len(samples):
            made = av.AudioFrame.from_ndarray(np.clip(samples, -1, 1)[None].copy(), "fltp", "mono")
            made.sample_rate = _SOUND_RATE
            made.pts, made.time_base = _PRIMING + self._samples, Fraction(1, _SOUND_RATE)
            self._samples += len(samples)
            packets = self._audio.encode(made)
            self._encoded += sum(packet.duration for packet in packets)
            self._mux(packets)

    def _mux(self, packets: list[Any], duration: int | None = None) -> None:
        for packet in packets:
            if duration is not None:
                packet.duration = duration
        self._container.mux(packets)

    def _avc(self) -> str:
        """Profile and level, as in RFC 6381, from the sequence parameters."""
        header = bytes(self._video.codec_context.extradata)
        at = header.index(b"\x00\x00\x01\x67") + 4
        return f"avc1.{header[at : at + 3].hex()}"


class _Memory:
    """A file that cannot be rewound: what is written waits to be taken."""

    def __init__(self):
        self._parts: list[bytes] = []

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)
