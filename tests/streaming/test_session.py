import jax
import numpy as np
import pytest

from jax_avatar.io.video import VideoWriter, read_video
from jax_avatar.layout import parse_layout
from jax_avatar.streaming.decode import NotFinite
from jax_avatar.streaming.file import for_duration, stream_to_file
from jax_avatar.streaming.session import AvatarSession
from jax_avatar.testing import save_model
from jax_avatar.weights.files import load_json, save_json
from jax_avatar.weights.folder import load_model

RATE, FPS, PER_FRAME = 16_000, 16, 1000


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def portrait():
    return np.random.default_rng(0).uniform(-1, 1, (1, 1, 64, 64, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def sequential(folder, portrait):
    return AvatarSession(load_model(folder), portrait, parse_layout("1", 4))


@pytest.fixture(scope="module")
def pipelined(folder, portrait):
    model = load_model(folder, decode_latents=1)
    return AvatarSession(model, portrait, parse_layout("5", 4))


def voice(seconds, seed=1):
    samples = np.random.default_rng(seed).normal(size=round(seconds * RATE))
    return 0.1 * samples.astype(np.float32)


def frames_of(session, samples, piece=12_000):
    session.reset()
    out = []
    for start in range(0, len(samples), piece):
        out += session.push(samples[start : start + piece])
    out += session.finish()
    return np.concatenate(out)


@pytest.mark.parametrize("seconds", [0.05, 0.5, 0.75, 3.1])
def test_the_video_is_as_long_as_the_audio(sequential, seconds):
    frames = frames_of(sequential, voice(seconds))
    assert len(frames) == int(np.ceil(seconds * FPS))
    assert frames.dtype == np.uint8 and frames.shape[1:] == (64, 64, 3)


def test_the_pipeline_shows_the_same_video(sequential, pipelined):
    samples = voice(4.0)
    plain, piped = frames_of(sequential, samples), frames_of(pipelined, samples)
    assert plain.shape == piped.shape
    assert np.abs(plain.astype(int) - piped.astype(int)).max() <= 1  # rounding to 8 bits


@pytest.mark.parametrize("piece", [16, 777, 48_000])  # 1 ms, and what fits no block
def test_pieces_of_any_length_make_the_same_video(sequential, piece):
    samples = voice(10.0)
    whole = frames_of(sequential, samples, len(samples))
    np.testing.assert_array_equal(frames_of(sequential, samples, piece), whole)


def test_a_session_takes_another_portrait(sequential, portrait):
    samples = voice(1.0)
    first = frames_of(sequential, samples)
    sequential.reset(portrait[:, :, ::-1].copy())
    other = np.concatenate([*sequential.push(samples), *sequential.finish()])
    assert (other != first).any()
    with pytest.raises(ValueError, match="resize it with prepare_reference"):
        sequential.reset(portrait[:, :, :32])
    sequential.reset(portrait)
    np.testing.assert_array_equal(frames_of(sequential, samples), first)


def test_what_is_heard_later_never_changes_earlier_frames(sequential):
    """Beyond a block, and beyond the look-ahead, nothing comes from the future."""
    samples = voice(3.0)
    changed = samples.copy()
    changed[2 * RATE :] = voice(1.0, seed=9)
    before, after = frames_of(sequential, samples), frames_of(sequential, changed)
    # The block of frame f ends at most 12 frames later; 80 ms of look-ahead are 2 frames.
    np.testing.assert_array_equal(before[: 32 - 14], after[: 32 - 14])
    assert (before[32:] != after[32:]).any()


def test_a_session_starts_again_from_the_portrait(sequential):
    samples = voice(1.5)
    np.testing.assert_array_equal(frames_of(sequential, samples), frames_of(sequential, samples))


@pytest.mark.parametrize("name", ["sequential", "pipelined"])
def test_its_parts_are_timed_and_the_stream_is_not_changed(name, request):
    session, samples = request.getfixturevalue(name), voice(1.0)
    before = frames_of(session, samples)
    parts = session.part_seconds(blocks=1)
    assert list(parts) == ["speech", "step", "vae"] and min(parts.values()) > 0
    np.testing.assert_array_equal(frames_of(session, samples), before)


def test_frames_come_while_audio_still_comes(pipelined):
    """Six blocks in: the first must be out, and memory must not pile up."""
    pipelined.reset()
    early = [len(part) for _ in range(8) for part in pipelined.push(voice(0.75))]
    assert sum(early) >= 9
    assert pipelined.decoder.num_pending <= 2 * pipelined.format.pieces_per_block
    list(pipelined.finish())


def test_frames_leave_latent_by_latent(sequential, pipelined):
    pipelined.reset()
    pieces = [*pipelined.push(voice(3.0)), *pipelined.finish()]
    assert [len(piece) for piece in pieces] == [1, *[4] * 11, 3]
    assert {len(part) for part in sequential.push(voice(3.0))} <= {9, 12}
    assert len(pipelined.times.blocks) == 5 and min(pipelined.times.blocks) > 0


def test_latents_decoded_at_once_divide_a_block(folder, portrait):
    with pytest.raises(ValueError, match="decode_latents 2 must divide the 3 latents of a block"):
        AvatarSession(load_model(folder, decode_latents=2), portrait, parse_layout("1", 4))


def test_a_file_holds_picture_and_sound(sequential, tmp_path):
    sequential.reset()
    samples, written = voice(2.0), []
    chunks = np.split(samples, [12_000, 24_000])
    with VideoWriter(tmp_path / "a.mp4", 64, 64, FPS, RATE) as writer:
        report = stream_to_file(sequential, chunks, writer, written.append)
    frames, fps, sound, rate = read_video(tmp_path / "a.mp4")
    assert len(frames) == report.frames == sum(written) == 32 and fps == FPS
    assert rate == RATE and abs(len(sound) / RATE - 2.0) < 1 / FPS + 1024 / RATE
    assert report.is_complete and not report.is_silent and report.video_s == 2.0
    assert report.real_time_factor == pytest.approx(report.video_s / report.wall_s)


def test_ctrl_c_leaves_a_playable_file(sequential, tmp_path):
    sequential.reset()

    def chunks():
        yield voice(1.5)
        yield voice(1.5)
        raise KeyboardInterrupt

    with VideoWriter(tmp_path / "a.mp4", 64, 64, FPS, RATE) as writer:
        report = stream_to_file(sequential, chunks(), writer)
    assert not report.is_complete
    assert len(read_video(tmp_path / "a.mp4")[0]) == report.frames > 0


@pytest.mark.parametrize("part", ["vae", "dit"])
def test_finite_weights_whose_output_is_not_end_the_stream(sequential, monkeypatch, part):
    """Too large for their type; the weights themselves pass every check."""
    owner = sequential.decoder if part == "vae" else sequential.stream
    sequential.reset()
    huge = jax.tree.map(lambda leaf: leaf * 1e30, owner.params)
    monkeypatch.setattr(owner, "params", huge)
    with pytest.raises(NotFinite, match=r"nano is NaN or infinity from frame 0 on: its weights"):
        list(sequential.push(voice(1.0)))
        list(sequential.finish())
    monkeypatch.undo()
    sequential.reset()


def test_silence_is_noticed(sequential, tmp_path):
    sequential.reset()
    with VideoWriter(tmp_path / "a.mp4", 64, 64, FPS, RATE) as writer:
        report = stream_to_file(sequential, [np.zeros(8000, np.float32)], writer)
    assert report.is_silent and report.frames == 8


def test_duration_cuts_or_goes_on_in_silence():
    chunks = [np.ones(10, np.float32), np.ones(10, np.float32)]
    lengths = {n: [len(c) for c in for_duration(chunks, n, 10)] for n in (None, 5, 15, 37)}
    assert {n: sum(parts) for n, parts in lengths.items()} == {None: 20, 5: 5, 15: 15, 37: 37}
    assert np.concatenate(list(for_duration(chunks, 37, 10)))[20:].sum() == 0


def test_a_portrait_unlike_any_other_is_measured(sequential, folder):
    flat = np.zeros((1, 1, 64, 64, 3), np.float32)
    session = AvatarSession(load_model(folder), flat, parse_layout("1", 4))
    assert 0 <= session.portrait_error != sequential.portrait_error


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": None}, r"lacks \['name'\]"),
        ({"dit": "unet"}, r"'unet', known are \['wan_s2v'"),
        (
            {"stream": {"fps": 16, "size": [64, 64], "sigmas": [1.0, 0.0], "sink": 3}},
            "'sink'.*unknown",
        ),
        (
            {"stream": {"fps": 25, "size": [64, 64], "sigmas": [1.0, 0.0]}},
            "trained for 16 frames per second, 25 are asked for",
        ),
        ({"stream": {"fps": 16, "size": None, "sigmas": [1.0, 0.0]}}, "need a size"),
        ({"stream": {"fps": 16, "size": [64, 64], "sigmas": [1.0, 0.5]}}, "must fall"),
    ],
)
def test_model_folders_that_do_not_fit_are_refused(tmp_path, folder, change, message):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    content = load_json(folder / "config.json") | change
    save_json(tmp_path / "config.json", {k: v for k, v in content.items() if v is not None})
    with pytest.raises(ValueError, match=message):
        load_model(tmp_path)


def test_weights_of_another_size_are_listed(tmp_path, folder):
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "dit.safetensors").write_bytes((folder / "vae.safetensors").read_bytes())
    with pytest.raises(ValueError, match="not those of a wan_s2v dit"):
        load_model(tmp_path)


def test_quiet_speech_is_heard_louder(sequential):
    loud, heard = voice(3.0) * np.sin(np.arange(3 * RATE) / 2000).astype(np.float32) ** 4, []
    for gain in (1, 0.01):
        sequential.reset()
        sequential.features.push(np.float32(gain) * loud)
        heard.append(np.abs(sequential.features.samples.take(10**6)[-RATE:]).max())
    sequential.reset()
    assert heard[0] == np.abs(loud[-RATE:]).max()
    assert heard[1] > 10 * 0.01 * heard[0]
