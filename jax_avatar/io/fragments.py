"""Frames and samples -> fragments of MP4 in memory, for a player that appends them as they come."""

from fractions import Fraction

import av
import numpy as np
from jaxtyping import UInt8

from jax_avatar.io.audio import LowLatencyResampler
from jax_avatar.io.boxes import Run, Sample, movie_fragment, with_lengths
from jax_avatar.io.provenance import COMMENT
from jax_avatar.shapes import Float

__all__ = ["FragmentWriter"]

_SOUND_RATE = 48_000  # the higher, the shorter are AAC's frames, and the wait for the next
_PRIMING = 1024  # samples that AAC puts first; picture and sound both wait for them


class FragmentWriter:
    """H.264 and AAC in fragments, one per call; the first bytes describe the stream.

    Nothing is kept back but what the encoder of the sound still waits for, one or two of its
    frames of 21 ms.

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
        # A header without samples; fragments are our own.
        options = {"movflags": "empty_moov+default_base_moof"}
        self._container = av.open(self._out, "w", format="mp4", options=options)
        self._container.metadata["comment"] = COMMENT
        self._rate, self._per_frame = audio_rate, Fraction(_SOUND_RATE, fps)
        self._resample = LowLatencyResampler(_SOUND_RATE)
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
        self._header = self._out.take()
        self.mime = f'video/mp4; codecs="{self._avc()}, mp4a.40.2"'
        self.delay_s = _PRIMING / _SOUND_RATE
        self._frames = self._samples = self._encoded = self._fragments = 0

    def write(self, frames: UInt8[np.ndarray, "T H W 3"], sound: Float[np.ndarray, " N"]) -> bytes:
        """Encodes picture and sound of the same time; returns what has become ready to send."""
        start = self._time(self._frames)
        pictures = [self._encode_picture(pixels) for pixels in frames]
        return self._fragment(
            start, pictures, self._encode_sound(self._resample(sound, self._rate))
        )

    @property
    def offset_s(self) -> float:
        """By how much the picture that was handed out is ahead of the sound."""
        return (self._time(self._frames) - self._encoded) / _SOUND_RATE

    def close(self) -> bytes:
        """Ends the stream; returns its last bytes."""
        if self._container is None:
            return b""
        packets = self._encode_sound(self._resample.finish()) + self._audio.encode(None)
        self._container.close()
        self._container = None
        return self._fragment(0, [], packets)

    def _time(self, frame: int) -> int:
        """Presentation time of a frame; the first one starts at 0."""
        return _PRIMING + round(frame * self._per_frame) if frame else 0

    def _encode_picture(self, pixels: np.ndarray) -> Sample:
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        picture.pts, picture.time_base = self._time(self._frames), Fraction(1, _SOUND_RATE)
        (packet,) = self._video.encode(picture)  # at once: "zerolatency"
        self._frames += 1
        duration = self._time(self._frames) - picture.pts
        return Sample(with_lengths(bytes(packet)), duration, packet.is_keyframe)

    def _encode_sound(self, samples: np.ndarray) -> list[av.Packet]:
        if not len(samples):
            return []
        made = av.AudioFrame.from_ndarray(np.clip(samples, -1, 1)[None].copy(), "fltp", "mono")
        made.sample_rate = _SOUND_RATE
        made.pts, made.time_base = _PRIMING + self._samples, Fraction(1, _SOUND_RATE)
        self._samples += len(samples)
        return self._audio.encode(made)

    def _fragment(self, start: int, pictures: list[Sample], packets: list[av.Packet]) -> bytes:
        """Fragment with the picture and sound from `start` on; the first follows the header."""
        runs = [Run(1, start, pictures)] if pictures else []
        if packets:
            sounds = [Sample(bytes(packet), packet.duration) for packet in packets]
            runs.append(Run(2, packets[0].pts, sounds))
            self._encoded += sum(packet.duration for packet in packets)
        data, self._header = self._header, b""
        if runs:
            self._fragments += 1
            data += movie_fragment(self._fragments, runs)
        return data

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
