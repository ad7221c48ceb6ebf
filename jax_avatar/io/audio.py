"""Audio files and raw PCM -> mono samples, chunk by chunk, in bounded memory."""

import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import soxr

from jax_avatar.io.containers import HEAD, container_kind, silent_kind
from jax_avatar.io.media import best_stream, open_media
from jax_avatar.io.mixing import Mixer, is_silent
from jax_avatar.shapes import Float

__all__ = [
    "AudioReader",
    "LowLatencyResampler",
    "PcmReader",
    "Resampler",
    "is_silent",
    "load_audio",
    "open_pipe",
]

_PCM_TYPES = {"s16le": np.dtype("<i2"), "f32le": np.dtype("<f4")}
_RATES = (1000, 768_000)
_SEEKING = ("M4A, MP4 or MOV", "AIFF", "CAF", "WavPack")  # kinds whose index or tags come last
_NOTHING = np.zeros(0, np.float32)
_SHORT_HEAD = 32  # bytes that tell most kinds of files
_LONG_STARTS = (0xFF, 0x47)  # first bytes of MP3, AAC and MPEG-TS, which take more to tell
_STANDARD_INPUT = "standard input"


class AudioReader:
    """Chunks of an audio file, or of a video's sound, decoded lazily.

    Attributes:
        duration_s: length that the file claims, None if it claims none.
        num_samples: samples read so far, without the padding of the last chunk.
    """

    def __init__(
        self,
        path: str | Path | Any,
        sample_rate: int = 16_000,
        chunk: int = 12_000,
        *,
        warn: Callable[[str], None] = warnings.warn,
    ):
        """Opens the file and decodes its first samples, so that a bad file fails here.

        Args:
            path: wav, flac, mp3, ogg, opus, m4a, or anything else FFmpeg knows; may be a pipe such
                as /dev/stdin, or an open binary stream.
            sample_rate: of the chunks.
            chunk: samples per chunk; the last one may be shorter.
            warn: called with one line for each thing that is odd about the sound; see `Mixer`.

        Raises:
            ValueError: the file is missing, not audio, broken, or without a sample.
        """
        is_stream = hasattr(path, "read")
        self.path = _STANDARD_INPUT if is_stream else Path(path)
        if not is_stream:
            _check_file(self.path)
        _check_chunks(sample_rate, chunk)
        self.sample_rate, self._chunk = sample_rate, chunk
        self.num_samples = 0
        self._mixer = Mixer(f"audio {self.path}", warn)
        self._ended_early: Exception | None = None
        try:
            self._container = open_media(path)
        except (av.FFmpegError, OSError) as error:
            raise ValueError(
                f"{self.path} is not an audio file that can be read ({_reason(error)}); expected "
                "wav, flac, mp3, ogg, m4a or the like."
            ) from error
        self._stream = best_stream(self._container, "audio")
        if self._stream is None:
            self._container.close()
            raise ValueError(f"{self.path} has no audio track; pass a file with sound.")
        if self._stream.codec_context is None:
            self._container.close()
            raise ValueError(f"{self.path} has sound of a kind that FFmpeg cannot decode.")
        self.duration_s = self._duration()
        self._parts = self._decode()
        self._first = next(self._parts, None)
        if self._first is None:
            broken = f" ({_reason(self._ended_early)})" if self._ended_early else ""
            raise ValueError(f"audio {self.path} holds no samples{broken}; is the file whole?")

    def __iter__(self) -> Iterator[Float[np.ndarray, " N"]]:
        """Yields mono samples in [-1, 1]; may be used once.

        Raises:
            ValueError: the file breaks off in the middle, or holds NaN or infinity.
        """
        waiting, have = [self._first], len(self._first)
        try:
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
        finally:
            self._mixer.finish()  # the caller may have had enough, too
        if self._ended_early:
            raise ValueError(
                f"audio {self.path} breaks off after {self.num_samples / self.sample_rate:.2f} s "
                f"({_reason(self._ended_early)}); everything before that was used."
            )

    def _duration(self) -> float | None:
        stream = self._stream
        if stream.duration and stream.time_base:
            return float(stream.duration * stream.time_base)
        return self._container.duration / av.time_base if self._container.duration else None

    def _decode(self) -> Iterator[np.ndarray]:
        resample = Resampler(self.sample_rate)
        packets = self._container.demux(self._stream)
        count, lost_s, error = 0, 0.0, None
        try:
            while True:
                packet = None
                try:
                    if (packet := next(packets, None)) is None:
                        break
                    frames = packet.decode()
                except (av.FFmpegError, OSError, ValueError) as caught:  # ValueError: no such codec
                    error = caught
                    if packet is None:  # no more can be read
                        lost_s = np.inf
                        break
                    lost_s += float((packet.duration or 0) * (packet.time_base or 0))
                    continue  # a damaged packet amid good ones is left out
                for frame in frames:
                    lost_s, error = 0.0, None
                    if len(samples := resample(self._mixer.frame(frame), frame.sample_rate)):
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
                f"audio {self.path} holds NaN or infinity around "
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
        """Remaining samples."""
        if self._stream is None:
            return _NOTHING
        stream, self._stream, self._input_rate = self._stream, None, 0
        return stream.resample_chunk(_NOTHING, last=True)


class LowLatencyResampler:
    """Low-latency resampler: 1 ms of delay instead of up to 40 ms.

    For 16 kHz it attenuates above 7 kHz and aliases up to 9 kHz.
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
        """Remaining samples."""
        if self._stream is None:
            return _NOTHING
        stream, self._stream, self._input_rate = self._stream, None, 0
        return np.concatenate([_NOTHING, *_channel(stream.resample(None))])


def _channel(frames: list[av.AudioFrame]) -> list[np.ndarray]:
    return [frame.to_ndarray()[0] for frame in frames]


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
        warn: Callable[[str], None] = warnings.warn,
    ):
        """Wraps an open binary stream; nothing is read yet.

        Args:
            stream: for example `sys.stdin.buffer`.
            sample_rate: of the chunks.
            chunk: samples per chunk; the last one may be shorter.
            input_rate: samples per second and channel on the pipe.
            sample_format: "s16le" or "f32le".
            channels: interleaved channels, mixed by `Mixer`; two are left and right.
            warn: called with one line for each thing that is odd about the sound; see `Mixer`.

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
        self._mixer = Mixer(f"audio of {_STANDARD_INPUT}", warn)
        self.num_samples = 0

    def __iter__(self) -> Iterator[Float[np.ndarray, " N"]]:
        """Yields mono samples in [-1, 1] until the pipe ends; half a sample at its end is dropped.

        Raises:
            ValueError: the pipe ended without a sample, holds a file instead of raw samples, or
                NaN or infinity.
        """
        try:
            yield from self._chunks()
        finally:
            self._mixer.finish()
        if not self.num_samples:
            raise ValueError("no audio came on standard input; pipe raw PCM samples into it.")

    def _chunks(self) -> Iterator[np.ndarray]:
        resample = Resampler(self.sample_rate)
        width = self._type.itemsize * self._channels
        # A tenth of a second at a time, so that a chunk is complete when its last sample is.
        size = max(1, self._input_rate // 10) * width
        read = getattr(self._stream, "read1", self._stream.read)
        data, waiting = _read_head(self._stream), _NOTHING
        if kind := container_kind(data):
            raise ValueError(
                f"standard input holds {kind} data, expected raw PCM samples; pass the name of "
                "the file instead (--audio FILE, or --audio /dev/stdin for a pipe)."
            )
        while data:
            whole = len(data) // width * width
            if whole:
                samples = resample(self._mono(data[:whole]), self._input_rate)
                waiting = np.concatenate([waiting, samples])
            while len(waiting) >= self._chunk:
                yield self._counted(waiting[: self._chunk])
                waiting = waiting[self._chunk :]
            more = read(size)
            data = data[whole:] + more if more else b""
        waiting = np.concatenate([waiting, resample.finish()])
        for start in range(0, len(waiting), self._chunk):
            yield self._counted(waiting[start : start + self._chunk])

    def _mono(self, data: bytes) -> np.ndarray:
        samples = np.frombuffer(data, self._type).reshape(-1, self._channels)
        if self._type.kind == "i":
            samples = samples / 32768
        elif not np.isfinite(samples).all():
            raise ValueError(
                f"PCM on standard input holds NaN or infinity around "
                f"{self.num_samples / self.sample_rate:.2f} s; is it really f32le?"
            )
        return self._mixer(samples.T.astype(np.float64), self._input_rate)

    def _counted(self, samples: np.ndarray) -> np.ndarray:
        self.num_samples += len(samples)
        return samples


def load_audio(
    path: str | Path, sample_rate: int = 16_000, *, warn: Callable[[str], None] = warnings.warn
) -> Float[np.ndarray, " N"]:
    """Reads a whole audio file as mono samples in [-1, 1].

    Raises:
        ValueError: as `AudioReader`.
    """
    return np.concatenate(list(AudioReader(path, sample_rate, warn=warn)))


def open_pipe(
    stream: Any,
    sample_rate: int = 16_000,
    chunk: int = 12_000,
    *,
    warn: Callable[[str], None] = warnings.warn,
    **pcm: Any,
) -> AudioReader | PcmReader:
    """A reader of a pipe: of a media file if it begins like one, else of raw PCM.

    Args:
        stream: binary, for example `sys.stdin.buffer`; its first bytes are waited for.
        sample_rate: of the chunks.
        chunk: samples per chunk.
        warn: as for `AudioReader`.
        **pcm: what raw samples are; see `PcmReader`. A file has its own format.

    Raises:
        ValueError: as `AudioReader` and `PcmReader`.
    """
    raw = PcmReader(stream, sample_rate, chunk, warn=warn, **pcm)
    head = _read_head(stream)
    kind = container_kind(head)
    whole = _Pipe(head, stream)
    if kind is None:
        raw._stream = whole
        return raw
    if kind in _SEEKING:
        file = tempfile.TemporaryFile()  # closed with the container, and gone then
        shutil.copyfileobj(whole, file)
        file.seek(0)
        return AudioReader(file, sample_rate, chunk, warn=warn)
    return AudioReader(whole, sample_rate, chunk, warn=warn)


class _Pipe:
    """A stream, with what was read of it already before it."""

    def __init__(self, head: bytes, stream: Any):
        self._head = head
        self._read = getattr(stream, "read1", stream.read)

    def read(self, size: int = -1) -> bytes:
        if self._head:
            size = len(self._head) if size < 0 else size
            part, self._head = self._head[:size], self._head[size:]
            return part
        return self._read(size)


def _read_head(stream: Any) -> bytes:
    """The first bytes, enough to tell files from raw samples; fewer if the stream ends.

    Raises:
        ValueError: they are those of a file without sound.
    """
    read, head, wanted = getattr(stream, "read1", stream.read), b"", _SHORT_HEAD
    while len(head) < wanted and (part := read(wanted - len(head))):
        head += part
        if head[0] in _LONG_STARTS:
            wanted = HEAD
    if not container_kind(head) and (kind := silent_kind(head)):
        raise ValueError(
            f"{_STANDARD_INPUT} holds {kind}; expected raw PCM samples, or a file of sound."
        )
    return head


def _check_file(path: Path) -> None:
    if os.path.isdir(path) or not os.path.exists(path):
        kind = "is a folder" if os.path.isdir(path) else "does not exist"
        raise ValueError(f"audio {path} {kind}; expected a file such as speech.wav.")
    if os.path.isfile(path) and not path.stat().st_size:  # a pipe has no size
        raise ValueError(f"audio {path} is empty; expected wav, flac, mp3, ogg, m4a or the like.")


def _check_chunks(sample_rate: int, chunk: int) -> None:
    if sample_rate < 1 or chunk < 1:
        raise ValueError(
            f"chunks of {chunk} samples at {sample_rate} Hz; expected at least 1 of each."
        )


def _reason(error: Exception | None) -> str:
    return str(getattr(error, "strerror", None) or error).strip()
