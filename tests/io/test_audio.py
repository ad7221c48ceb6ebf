import base64
import gc
import gzip
import io
import os
import struct
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest
from safetensors.numpy import load_file

from jax_avatar.io.audio import (
    AudioReader,
    LowLatencyResampler,
    PcmReader,
    is_silent,
    load_audio,
    open_pipe,
)
from jax_avatar.io.containers import HEAD, container_kind

# 44.1 kHz stereo, and what librosa 0.11 makes of it at 16 kHz.
GOLDEN = Path(__file__).parents[1] / "golden" / "audio" / "audio_frontend.safetensors"


def tone(seconds=1.0, rate=16_000, hertz=440.0):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def write(path, samples, rate, codec, sample_format, layout="mono"):
    channels = av.AudioLayout(layout).nb_channels
    kind = {"s16": (np.int16, 32767), "s32": (np.int32, 2**31 - 1), "flt": (np.float32, 1),
            "fltp": (np.float32, 1), "s16p": (np.int16, 32767), "u8": (np.uint8, 127)}  # fmt: skip
    dtype, scale = kind[sample_format]
    scaled = samples * scale + (128 if sample_format == "u8" else 0)
    planes = np.tile(scaled.astype(dtype), (channels, 1))
    if not sample_format.endswith("p"):
        planes = np.ascontiguousarray(planes.T.reshape(1, -1))
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, layout=layout)
        stream.format = sample_format
        frame = av.AudioFrame.from_ndarray(planes, sample_format, layout)
        frame.sample_rate = rate
        fifo = av.AudioFifo()
        fifo.write(frame)
        while (part := fifo.read(stream.frame_size or 4096, partial=True)) is not None:
            container.mux(stream.encode(part))
        container.mux(stream.encode(None))
    return path


def correlation(samples, expected):
    size = min(len(samples), len(expected))
    return np.corrcoef(samples[:size], expected[:size])[0, 1]


@pytest.mark.parametrize(
    ("name", "rate", "codec", "sample_format", "layout"),
    [
        ("a.wav", 16_000, "pcm_s16le", "s16", "mono"),
        ("a.wav", 8_000, "pcm_u8", "u8", "mono"),
        ("a.wav", 192_000, "pcm_s32le", "s32", "stereo"),
        ("a.wav", 44_100, "pcm_f32le", "flt", "5.1"),
        ("a.wav", 96_000, "pcm_s24le", "s32", "stereo"),
        ("a.flac", 48_000, "flac", "s16", "stereo"),
        ("a.mp3", 44_100, "libmp3lame", "s16p", "stereo"),
        ("a.ogg", 48_000, "libopus", "flt", "stereo"),
        ("a.opus", 48_000, "libopus", "flt", "mono"),
        ("a.m4a", 22_050, "aac", "fltp", "mono"),
    ],
)
def test_every_format_rate_and_layout(tmp_path, name, rate, codec, sample_format, layout):
    path = write(tmp_path / name, tone(1.0, rate), rate, codec, sample_format, layout)
    samples = load_audio(path)
    assert samples.dtype == np.float32 and abs(len(samples) - 16_000) < 1600
    spectrum = np.abs(np.fft.rfft(samples[2000:14_000]))
    peak = spectrum.argmax() * 16_000 / 12_000
    assert abs(peak - 440) < 3
    assert 0.4 < np.abs(samples[4000:12_000]).max() < 0.6


def test_resampling_equals_the_reference(tmp_path):
    golden = load_file(GOLDEN)
    pcm = golden["resample.in_pcm16_44100_stereo"].astype(np.int16)
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=44_100, layout="stereo")
        frame = av.AudioFrame.from_ndarray(pcm.reshape(1, -1), "s16", "stereo")
        frame.sample_rate = 44_100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    expected = golden["resample.out_16000_mono"]
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav")[: len(expected)], expected, atol=1e-5)


@pytest.mark.parametrize(("rate", "to"), [(48_000, 16_000), (44_100, 16_000), (16_000, 48_000)])
def test_sound_that_somebody_waits_for_is_a_millisecond_behind(rate, to):
    samples, piece = tone(1.0, rate), rate // 50
    resample, parts = LowLatencyResampler(to), []
    for start in range(0, len(samples), piece):
        parts.append(resample(samples[start : start + piece], rate))
        come = sum(map(len, parts)) / to
        assert 0 <= (start + piece) / rate - come < 0.0015
    got = np.concatenate([*parts, resample.finish()])
    assert len(got) == to
    np.testing.assert_allclose(got[100:-100], tone(1.0, to)[100:-100], atol=2e-3)


def test_chunks_of_any_size_are_the_whole(tmp_path):
    path = write(tmp_path / "a.wav", tone(2.0, 44_100), 44_100, "pcm_s16le", "s16")
    whole = load_audio(path)
    for size in (100, 7777, 10**6):
        reader = AudioReader(path, chunk=size)
        chunks = list(reader)
        np.testing.assert_array_equal(np.concatenate(chunks), whole)
        assert {len(c) for c in chunks[:-1]} <= {size} and reader.num_samples == len(whole)
    assert reader.duration_s == pytest.approx(2.0, abs=0.01)


def test_three_hours_are_read_piece_by_piece(tmp_path):
    """The first chunk of a long file comes without the rest being decoded."""
    path = tmp_path / "long.wav"
    header = write(tmp_path / "a.wav", tone(0.1), 16_000, "pcm_s16le", "s16").read_bytes()
    samples = 3 * 3600 * 16_000
    start = header.index(b"data")
    with open(path, "wb") as file:
        file.write(header[: start + 4] + (2 * samples).to_bytes(4, "little"))
        file.truncate(start + 8 + 2 * samples)  # a sparse file: silence
    reader = AudioReader(path)
    assert reader.duration_s == pytest.approx(3 * 3600, rel=1e-3)
    first = next(iter(reader))
    assert len(first) == 12_000 and reader.num_samples == 12_000
    assert is_silent(first)


def test_fifty_milliseconds_are_enough(tmp_path):
    path = write(tmp_path / "a.wav", tone(0.05), 16_000, "pcm_s16le", "s16")
    assert len(load_audio(path)) == 800


def test_the_sound_of_a_video_is_found(tmp_path):
    from jax_avatar.io.video import VideoWriter

    with VideoWriter(tmp_path / "a.mp4", 32, 32, 16, 16_000) as writer:
        writer.write_audio(tone().astype(np.float32))
        writer.write_frames(np.zeros((16, 32, 32, 3), np.uint8))
    assert correlation(load_audio(tmp_path / "a.mp4")[1024:15_000], tone()[1024:15_000]) > 0.99


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.wav does not exist"):
        load_audio(tmp_path / "gone.wav")
    with pytest.raises(ValueError, match="is a folder"):
        load_audio(tmp_path)
    (tmp_path / "empty.wav").touch()
    with pytest.raises(ValueError, match="is empty"):
        load_audio(tmp_path / "empty.wav")
    (tmp_path / "text.wav").write_text("not audio" * 100)
    with pytest.raises(ValueError, match=r"not an audio file|holds no samples"):
        load_audio(tmp_path / "text.wav")
    header = write(tmp_path / "a.wav", tone(0.1), 16_000, "pcm_s16le", "s16").read_bytes()
    start = header.index(b"data")
    (tmp_path / "none.wav").write_bytes(header[: start + 4] + bytes(4))
    with pytest.raises(ValueError, match="holds no samples"):
        load_audio(tmp_path / "none.wav")
    from jax_avatar.io.video import VideoWriter

    with VideoWriter(tmp_path / "mute.mp4", 32, 32, 16) as writer:
        writer.write_frames(np.zeros((4, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match="no audio track"):
        load_audio(tmp_path / "mute.mp4")


def test_values_that_are_no_numbers_are_refused(tmp_path):
    samples = tone()
    samples[8000] = np.nan
    path = write(tmp_path / "a.wav", samples, 16_000, "pcm_f32le", "flt")
    with pytest.raises(ValueError, match=r"NaN or infinity around 0\.\d+ s"):
        load_audio(path)


@pytest.mark.parametrize(
    ("name", "codec", "sample_format"),
    [("a.flac", "flac", "s16"), ("a.mp3", "libmp3lame", "s16p"), ("a.m4a", "aac", "fltp")],
)
def test_a_file_cut_in_the_middle_is_short_or_named(tmp_path, name, codec, sample_format):
    path = write(tmp_path / name, tone(2.0, 44_100), 44_100, codec, sample_format)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    try:
        assert 0 < len(load_audio(path)) < 20_000
    except ValueError as error:
        assert str(path) in str(error)


def test_files_of_two_rates_joined_keep_their_pitch(tmp_path):
    parts = [
        write(tmp_path / f"{rate}.aac", tone(1.0, rate), rate, "aac", "fltp").read_bytes()
        for rate in (44_100, 22_050)
    ]
    (tmp_path / "a.aac").write_bytes(b"".join(parts))
    samples = load_audio(tmp_path / "a.aac")
    for start in (4000, 20_000):
        heard = np.abs(np.fft.rfft(samples[start : start + 8000])).argmax() * 2
        assert abs(heard - 440) < 4


def test_silence_is_told_from_speech():
    assert is_silent(np.zeros(100, np.float32)) and is_silent(np.zeros(0, np.float32))
    assert not is_silent(tone().astype(np.float32))


class Pipe(io.RawIOBase):
    """Gives a few bytes at a time, as a slow microphone does."""

    def __init__(self, data, piece):
        self.data, self.piece, self.reads = data, piece, 0

    def read1(self, size):
        self.reads += 1
        part, self.data = self.data[: min(size, self.piece)], self.data[min(size, self.piece) :]
        return part


@pytest.mark.parametrize("piece", [3, 1001, 10**6])
def test_raw_pcm_comes_through_a_pipe(piece):
    samples = tone().astype(np.float32)
    data = (samples * 32767).astype("<i2").tobytes() + b"x"  # half a sample too many
    out = np.concatenate(list(PcmReader(Pipe(data, piece), chunk=3000)))
    assert len(out) == 16_000
    np.testing.assert_allclose(out, samples, atol=1e-3)


def test_pcm_is_given_out_before_the_pipe_ends():
    data = np.zeros(16_000, "<i2").tobytes()
    pipe = Pipe(data, 3200)
    next(iter(PcmReader(pipe, chunk=4000)))
    assert pipe.reads <= 4 and len(pipe.data) > 10_000


def test_pcm_of_another_rate_and_layout():
    samples = tone(1.0, 48_000).astype(np.float32)
    data = np.repeat(samples[:, None], 2, 1).astype("<f4").tobytes()
    reader = PcmReader(Pipe(data, 5000), input_rate=48_000, sample_format="f32le", channels=2)
    assert correlation(np.concatenate(list(reader)), tone()) > 0.99


def test_bad_pcm_settings_and_empty_pipes_are_named():
    with pytest.raises(ValueError, match="'mp3'; expected one of"):
        PcmReader(io.BytesIO(), sample_format="mp3")
    with pytest.raises(ValueError, match="5 Hz and 1 channels"):
        PcmReader(io.BytesIO(), input_rate=5)
    with pytest.raises(ValueError, match="chunks of 0 samples"):
        PcmReader(io.BytesIO(), chunk=0)
    with pytest.raises(ValueError, match="no audio came on standard input"):
        list(PcmReader(io.BytesIO()))
    for value in (np.nan, np.inf):
        pipe = io.BytesIO(np.array([0.1, value, 0.1], "<f4").tobytes())
        with pytest.raises(ValueError, match="NaN or infinity around"):
            list(PcmReader(pipe, sample_format="f32le"))


CONTAINERS = [
    ("a.wav", 44_100, "pcm_s16le", "s16", "stereo", "WAV"),
    ("b.wav", 8_000, "pcm_u8", "u8", "mono", "WAV"),
    ("a.aiff", 22_050, "pcm_s16be", "s16", "mono", "AIFF"),
    ("a.caf", 16_000, "pcm_s16le", "s16", "mono", "CAF"),
    ("a.au", 16_000, "pcm_s16be", "s16", "mono", "AU"),
    ("a.flac", 48_000, "flac", "s16", "stereo", "FLAC"),
    ("a.mp3", 44_100, "libmp3lame", "s16p", "stereo", "MP3"),
    ("a.ogg", 48_000, "libopus", "flt", "mono", "Ogg"),
    ("a.m4a", 44_100, "aac", "fltp", "stereo", "M4A, MP4 or MOV"),
    ("a.mov", 48_000, "pcm_s16le", "s16", "stereo", "M4A, MP4 or MOV"),
    ("a.aac", 44_100, "aac", "fltp", "mono", "AAC"),
    ("a.webm", 48_000, "libopus", "flt", "mono", "Matroska or WebM"),
    ("a.mka", 44_100, "aac", "fltp", "stereo", "Matroska or WebM"),
    ("a.ts", 48_000, "aac", "fltp", "stereo", "MPEG-TS"),
    ("a.ac3", 48_000, "ac3", "fltp", "stereo", "AC-3"),
    ("a.eac3", 48_000, "eac3", "fltp", "mono", "AC-3"),
    ("a.w64", 16_000, "pcm_s16le", "s16", "mono", "Wave64"),
    ("a.nut", 16_000, "pcm_s16le", "s16", "mono", "NUT"),
    ("a.wv", 44_100, "wavpack", "s16p", "stereo", "WavPack"),
]


@pytest.mark.parametrize("piece", [1, 7, 10**6])
@pytest.mark.parametrize(("name", "rate", "codec", "sample_format", "layout", "kind"), CONTAINERS)
def test_a_file_on_standard_input_is_decoded_as_what_it_is(
    tmp_path, piece, name, rate, codec, sample_format, layout, kind
):
    path = write(tmp_path / name, tone(0.3, rate), rate, codec, sample_format, layout)
    data = path.read_bytes()
    reader = open_pipe(Pipe(data, piece), input_rate=48_000, sample_format="f32le")
    heard, expected = np.concatenate(list(reader)), load_audio(path)
    # Of an MP3 the padding of its last frame is known only with the size of the file.
    assert 0 <= len(heard) - len(expected) < (0.03 * 16_000 if kind == "MP3" else 1)
    np.testing.assert_allclose(heard[:4500], expected[:4500], atol=1e-6)
    assert container_kind(data[:HEAD]) == kind
    with pytest.raises(ValueError, match=f"{kind} data, expected raw PCM samples; pass the name"):
        list(PcmReader(Pipe(data, piece)))


def test_an_mp3_without_a_title_is_one(tmp_path):
    path = write(tmp_path / "a.mp3", tone(1.0, 44_100), 44_100, "libmp3lame", "s16p")
    data = path.read_bytes()
    bare = data[data.index(b"\xff\xfb") :]
    assert container_kind(bare[:HEAD]) == "MP3"
    assert len(np.concatenate(list(open_pipe(Pipe(bare, 100))))) > 15_000


@pytest.mark.parametrize("piece", [1, 1001])
def test_raw_samples_are_no_file_whatever_they_are(piece):
    rng = np.random.default_rng(0)
    firsts = [np.int16(x) for x in (-1, -3585, 0x4747)]  # begin FF FF, FF F1, "GG"
    for first in firsts:
        samples = np.r_[first, rng.integers(-3000, 3000, 2500)].astype("<i2")
        reader = open_pipe(Pipe(samples.tobytes(), piece))
        heard = np.concatenate(list(reader))
        np.testing.assert_allclose(heard, samples / 32768, atol=1e-6)


@pytest.mark.parametrize(
    ("data", "kind"),
    [(b"Hello, this is no sound.\n" * 200, "text, 'Hello"), (b"No sound", "text, 'No sound'"),
     (("\ufeff" + "Привет, мир! " * 50).encode(), "text, 'Привет"), (b'{"audio": []}', "text"),
     (base64.b64encode(bytes(range(256))), "text"),
     (gzip.compress(bytes(9000), mtime=0), "gzip data"),
     (b"PK\x03\x04" + bytes(range(256)), "a zip"), (b"\x89PNG\r\n\x1a\n" + bytes(99), "a picture"),
     (struct.pack("<Q", 99) + b'{"a": {}}' + bytes(99), "weights")],
)  # fmt: skip
@pytest.mark.parametrize("piece", [1, 1001])
def test_a_file_without_sound_on_standard_input_is_named(data, kind, piece):
    for read in (open_pipe, PcmReader):
        with pytest.raises(ValueError, match=f"standard input holds {kind}.*expected raw PCM"):
            list(read(Pipe(data, piece)))


def test_nothing_on_standard_input_is_named():
    with pytest.raises(ValueError, match="no audio came on standard input"):
        list(open_pipe(io.BytesIO()))


def test_the_track_that_players_take_is_heard(tmp_path):
    from av.stream import Disposition

    path = tmp_path / "a.mka"
    with av.open(str(path), "w") as container:
        streams = [container.add_stream("pcm_s16le", rate=16_000, layout="mono") for _ in "123"]
        streams[0].disposition = streams[2].disposition = Disposition(0)
        streams[1].disposition = Disposition.default
        for stream, hertz in zip(streams, (300, 500, 700), strict=True):
            samples = (tone(1.0, hertz=hertz) * 32767).astype(np.int16)[None]
            frame = av.AudioFrame.from_ndarray(samples, "s16", "mono")
            frame.sample_rate = 16_000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    assert np.abs(np.fft.rfft(load_audio(path))).argmax() == 500


def test_a_pipe_is_read_like_a_file(tmp_path):
    path = write(tmp_path / "a.wav", tone(0.5), 16_000, "pcm_s16le", "s16")
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=lambda: (tmp_path / "pipe").write_bytes(path.read_bytes()))
    writer.start()
    np.testing.assert_array_equal(load_audio(tmp_path / "pipe"), load_audio(path))
    writer.join()


def test_a_colon_in_the_name_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write("file:12:30.wav", tone(0.1), 16_000, "pcm_s16le", "s16")
    assert len(load_audio("12:30.wav")) == 1600


def test_a_title_that_is_not_utf8_does_no_harm(tmp_path):
    data = write(tmp_path / "a.wav", tone(0.1), 16_000, "pcm_s16le", "s16").read_bytes()
    info = b"INFOINAM" + (4).to_bytes(4, "little") + b"caf\xe9"
    data += b"LIST" + len(info).to_bytes(4, "little") + info
    (tmp_path / "a.wav").write_bytes(data[:4] + (len(data) - 8).to_bytes(4, "little") + data[8:])
    assert len(load_audio(tmp_path / "a.wav")) == 1600


def test_a_reader_may_be_left_in_the_middle(tmp_path, monkeypatch):
    path = write(tmp_path / "a.wav", tone(2.0, 44_100), 44_100, "pcm_s16le", "s16")
    complaints = []
    monkeypatch.setattr(sys, "unraisablehook", complaints.append)
    reader = AudioReader(path, chunk=1000)
    chunks = iter(reader)
    next(chunks)
    del reader, chunks
    gc.collect()
    assert not complaints


def test_damage_in_the_middle_costs_only_itself(tmp_path):
    path = write(tmp_path / "a.mp3", tone(4.0, 44_100), 44_100, "libmp3lame", "s16p")
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 600] = np.random.default_rng(0).bytes(600)
    path.write_bytes(data)
    samples = load_audio(path)
    assert 3.0 < len(samples) / 16_000 < 4.1
    assert np.abs(np.fft.rfft(samples[-16_000:])).argmax() == 440


def test_an_end_that_cannot_be_decoded_is_named(tmp_path):
    path = write(tmp_path / "a.flac", tone(4.0), 16_000, "flac", "s16")
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    chunks = iter(AudioReader(path, chunk=1000))
    assert len(next(chunks)) == 1000  # what is whole comes first
    with pytest.raises(ValueError, match=r"a\.flac breaks off after 2\.\d+ s"):
        list(chunks)
