"""Audio files and raw PCM -> mono samples, chunk by chunk, in bounded memory."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import soxr

from jax_avatar.io.media import open_media
from jax_avatar.shapes import Float

__all__ = [
    "AudioReader",
    "PcmReader",
    "QuickResampler",
    "Resampler",
    "is_silent",
    "load_audio",
    "mono_samples",
]

_PCM_TYPES = {"s16le": np.dtype("<i2"), "f32le": np.dtype("<f4")}
_RATES = (1000, 768_000)
_NOTHING = np.zeros(0, np.float32)
_FILE_STARTS = {b"RIFF": "WAV", b"fLaC": "FLAC", b"OggS": "Ogg", b"ID3": "MP3"}


class AudioReader:
    """Chunks of an audio file, or of a video's sound, decoded as they are asked for.

    Attributes:
        duration_s: length that the file claims, None if it claims none.
        num_samples: samples read so far, without the padding of the last chunk.
    """

    def __init__(self, path: str | Path, sample_rate: int = 16_000, chunk: int = 12_000):
        """Opens the file and decodes its first samples, so that a bad file fails here.

        Args:
            path: wav, flac, mp3, ogg, opus, m4a, or anything else FFmpeg knows; may be a pipe such
                as /dev/stdin.
            sample_rate: of the chunks.
            chunk: samples per chunk; the last one may be shorter.

        Raises:
            ValueError: the file is missing, not audio, broken, or without a sample.
        """
        self.path = Path(path)
        is_file = os.path.isfile(self.path)
        if os.path.isdir(self.path) or not os.path.exists(self.path):
            kind = "is a folder" if os.path.isdir(self.path) else "does not exist"
            raise ValueError(f"audio {path} {kind}; expected a file such as speech.wav.")
        if is_file and not self.path.stat().st_size:  # a pipe has no size
            raise ValueError(
                f"audio {path} is empty; expected wav, flac, mp3, ogg, m4a or the like."
            )
        _check_chunks(sample_rate, chunk)
        self.sample_rate, self._chunk = sample_rate, chunk
        self.num_samples = 0
        self._ended_early: Exception | None = None
        try:
            self._container = open_media(self.path)
        except (av.FFmpegError, OSError) as error:
            raise ValueError(
                f"{path} is not an audio file that can be read ({_reason(error)}); expected wav, "
                "flac, mp3, ogg, m4a or the like."
            ) from error
        if not self._container.streams.audio:
            self._container.close()
            raise ValueError(f"{path} has no audio track; pass a file with sound.")
        if self._container.streams.audio[0].codec_context is None:
            self._container.close()
            raise ValueError(f"{path} has sound of a kind that FFmpeg cannot decode.")
        self.duration_s = self._duration()
        self._parts = self._decode()
        self._first = next(self._parts, None)
        if self._first is None:
            broken = f" ({_reason(self._ended_early)})" if self._ended_early else ""
            raise ValueError(f"audio {path} holds no samples{broken}; is the file whole?")

    def __iter__(self) -> Iterator[Float[np.ndarray, " N"]]:
        """Yields mono samples in [-1, 1]; may be used once.

        Raises:
            ValueError: the file breaks off in the middle, or holds values that are no numbers.
        """
        waiting, have = [self._first], len(self._first)
        for part in self._parts:
            waiting.append(part)
            have += len(part)
            if have >= self._chunk:
                joined = np.concatenate(waiting)
                whole = have // self._chunk * self._chunk
                for start in range(0, whole, self._chunk):
                    yield self._checked(joined[start : start + self._chunk])
                waiting, have = [joined[whole:]], have - whole
        rest = np.concatenate(waiting)
        for start in range(0, len(rest), self._chunk):
            yield self._checked(rest[start : start + self._chunk])
        if self._ended_early:
            raise ValueError(
                f"audio {self.path} breaks off after {self.num_samples / self.sample_rate:.2f} s "
                f"({_reason(self._ended_early)}); everything before that was used."
            )

    def _duration(self) -> float | None:
        stream = self._container.streams.audio[0]
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
        return self._container.duration / av.time_base if self._container.duration else None

    def _decode(self) -> Iterator[np.ndarray]:
        resample = Resampler(self.sample_rate)
        packets = self._container.demux(self._container.streams.audio[0])
        count, lost_s, error = 0, 0.0, None
        try:
            while True:
                packet = None
                try:
                    if (packet := next(packets, None)) is None:
                        break
                    frames = packet.decode()
                except (av.FFmpegError, OSError) as caught:
                    error = caught
                    if packet is None:  # no more can be read
                        lost_s = np.inf
                        break
                    lost_s += float((packet.duration or 0) * (packet.time_base or 0))
                    continue  # a damaged packet amid good ones is left out
                for frame in frames:
                    lost_s, error = 0.0, None
                    if len(samples := resample(mono_samples(frame), frame.sample_rate)):
                        count += len(samples)
                        yield samples
            if len(samples := resample.finish()):
                count += len(samples)
                yield samples
            # A little rubbish after the end of a whole file does no harm.
            missing_s = (self.duration_s or np.inf) - count / self.sample_rate
            if max(missing_s, lost_s) > 0.25:
                self._ended_early = error
        finally:
            self._container.close()

    def _checked(self, samples: np.ndarray) -> np.ndarray:
        if not np.isfinite(samples).all():
            raise ValueError(
                f"audio {self.path} holds values that are no numbers around "
                f"{self.num_samples / self.sample_rate:.2f} s; export it again."
            )
        self.num_samples += len(samples)
        return samples


class Resampler:
    """Mono samples of any rate -> one rate, chunk by chunk, with the filter's state in between."""

    def __init__(self, sample_rate: int):
        self._rate, self._input_rate = sample_rate, 0
        self._stream: soxr.ResampleStream | None = None

    def __call__(self, mono: np.ndarray, rate: int) -> np.ndarray:
        """Resamples a chunk; what the filter still holds comes with the next one."""
        before = _NOTHING
        if rate != self._input_rate:  # files joined end to end may change their rate
            before = self.finish()
            self._stream = soxr.ResampleStream(rate, self._rate, 1, "float32", quality="HQ")
            self._input_rate = rate
        return np.concatenate([before, self._stream.resample_chunk(mono)])

    def finish(self) -> np.ndarray:
        """What is left."""
        if self._stream is None:
            return _NOTHING
        stream, self._stream, self._input_rate = self._stream, None, 0
        return stream.resample_chunk(_NOTHING, last=True)


class QuickResampler:
    """As `Resampler`, for sound that somebody waits for: 1 ms behind instead of up to 40.

    From 7 kHz on, for 16 kHz, it is a little duller, and up to 9 kHz not quite deaf.
    """

    def __init__(self, sample_rate: int):
        self._rate, self._input_rate = sample_rate, 0
        self._stream: av.AudioResampler | None = None

    def __call__(self, mono: np.ndarray, rate: int) -> np.ndarray:
        """Resamples a chunk; the last millisecond comes with the next one."""
        before = _NOTHING
        if rate != self._input_rate:
            before = self.finish()
            self._stream = av.AudioResampler("flt", "mono", self._rate)
            self._input_rate = rate
        if not len(mono):
            return before
        frame = av.AudioFrame.from_ndarray(np.asarray(mono, np.float32)[None], "flt", "mono")
        frame.sample_rate = rate
        return np.concatenate([before, *_channel(self._stream.resample(frame))])

    def finish(self) -> np.ndarray:
        """What is left."""
        if self._stream is None:
            return _NOTHING
        stream, self._stream, self._input_rate = self._stream, None, 0
        return np.concatenate([_NOTHING, *_channel(stream.resample(None))])


def _channel(frames: list[av.AudioFrame]) -> list[np.ndarray]:
    return [frame.to_ndarray()[0] for frame in frames]


def mono_samples(frame: av.AudioFrame) -> np.ndarray:
    """Mean of the channels, in [-1, 1]; FFmpeg's own down-mix would weigh them by layout."""
    data = frame.to_ndarray()
    if not frame.format.is_planar:
        data = data.reshape(-1, frame.layout.nb_channels).T
    if data.dtype.kind == "u":
        data = (data.astype(np.float32) - 128) / 128
    elif data.dtype.kind == "i":
        data = data / -float(np.iinfo(data.dtype).min)
    return data.mean(0, dtype=np.float64).astype(np.float32)


class PcmReader:
    """Chunks of raw PCM from a pipe, as soon as they have arrived.

    Attributes:
        duration_s: None: a pipe does not say.
        num_samples: samples given out so far.
    """

    duration_s = None

    def __init__(
        self,
        stream: Any,
        sample_rate: int = 16_000,
        chunk: int = 12_000,
        *,
        input_rate: int = 16_000,
        sample_format: str = "s16le",
        channels: int = 1,
    ):
        """Wraps an open binary stream; nothing is read yet.

        Args:
            stream: for example `sys.stdin.buffer`.
            sample_rate: of the chunks.
            chunk: samples per chunk; the last one may be shorter.
            input_rate: samples per second and channel on the pipe.
            sample_format: "s16le" or "f32le".
            channels: interleaved channels, averaged.

        Raises:
            ValueError: an unknown format, rate or number of channels.
        """
        if sample_format not in _PCM_TYPES:
            raise ValueError(f"PCM format {sample_format!r}; expected one of {list(_PCM_TYPES)}.")
        if not _RATES[0] <= input_rate <= _RATES[1] or channels < 1:
            raise ValueError(
                f"PCM of {input_rate} Hz and {channels} channels; expected {_RATES[0]} to "
                f"{_RATES[1]} Hz and at least one channel."
            )
        _check_chunks(sample_rate, chunk)
        self._stream, self._type, self._channels = stream, _PCM_TYPES[sample_format], channels
        self._input_rate, self.sample_rate, self._chunk = input_rate, sample_rate, chunk
        self.num_samples = 0

    def __iter__(self) -> Iterator[Float[np.ndarray, " N"]]:
        """Yields mono samples in [-1, 1] until the pipe ends; half a sample at its end is dropped.

        Raises:
            ValueError: the pipe ended without a sample, holds a file instead of raw samples, or
                floats are no numbers.
        """
        resample = Resampler(self.sample_rate)
        width = self._type.itemsize * self._channels
        # A tenth of a second at a time, so that a chunk is complete when its last sample is.
        size = max(1, self._input_rate // 10) * width
        read = getattr(self._stream, "read1", self._stream.read)
        left, waiting, is_first = b"", _NOTHING, True
        while data := read(size):
            if is_first:
                _check_is_raw(data)
                is_first = False
            data = left + data
            whole = len(data) // width * width
            left = data[whole:]
            if whole:
                samples = resample(self._mono(data[:whole]), self._input_rate)
                waiting = np.concatenate([waiting, samples])
            while len(waiting) >= self._chunk:
                yield self._counted(waiting[: self._chunk])
                waiting = waiting[self._chunk :]
        waiting = np.concatenate([waiting, resample.finish()])
        for start in range(0, len(waiting), self._chunk):
            yield self._counted(waiting[start : start + self._chunk])
        if not self.num_samples:
            raise ValueError("no audio came on standard input; pipe raw PCM samples into it.")

    def _mono(self, data: bytes) -> np.ndarray:
        samples = np.frombuffer(data, self._type).reshape(-1, self._channels)
        if self._type.kind == "i":
            samples = samples / np.float32(32768)
        elif not np.isfinite(samples).all():
            raise ValueError(
                f"PCM on standard input holds values that are no numbers around "
                f"{self.num_samples / self.sample_rate:.2f} s; is it really f32le?"
            )
        return samples.mean(1, dtype=np.float32)

    def _counted(self, samples: np.ndarray) -> np.ndarray:
        self.num_samples += len(samples)
        return samples


def load_audio(path: str | Path, sample_rate: int = 16_000) -> Float[np.ndarray, " N"]:
    """Reads a whole audio file as mono samples in [-1, 1].

    Raises:
        ValueError: as `AudioReader`.
    """
    return np.concatenate(list(AudioReader(path, sample_rate)))


def is_silent(samples: Float[np.ndarray, " N"], level: float = 1e-4) -> bool:
    """Whether nothing can be heard."""
    return bool(np.abs(samples).max(initial=0) < level)


def _check_is_raw(data: bytes) -> None:
    for start, kind in _FILE_STARTS.items():
        if data.startswith(start):
            raise ValueError(
                f"standard input holds {kind} data, expected raw PCM samples; pass the name of "
                "the file instead (/dev/stdin for a pipe)."
            )


def _check_chunks(sample_rate: int, chunk: int) -> None:
    if sample_rate < 1 or chunk < 1:
        raise ValueError(
            f"chunks of {chunk} samples at {sample_rate} Hz; expected at least 1 of each."
        )


def _reason(error: Exception | None) -> str:
    return str(getattr(error, "strerror", None) or error).strip()
