import shutil

import av
import numpy as np
import pytest

from jax_avatar.io.video import VideoWriter, read_video

FPS, RATE = 16, 16_000


def flash_and_click(at, seconds=3):
    frames = np.zeros((seconds * FPS, 32, 48, 3), np.uint8)
    frames[round(at * FPS)] = 255
    samples = np.zeros(seconds * RATE, np.float32)
    samples[round(at * RATE) - 40 : round(at * RATE) + 40] = 0.9
    return frames, samples


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_a_click_and_a_flash_stay_together(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    frames, samples = flash_and_click(2.0)
    with VideoWriter(path, 48, 32, FPS, RATE) as writer:
        for start in range(0, len(frames), 12):
            writer.write_audio(samples[start * 1000 : (start + 12) * 1000])
            writer.write_frames(frames[start : start + 12])
    seen, fps, heard, rate = read_video(path)
    assert seen.shape == frames.shape and fps == FPS and rate == RATE
    assert seen.mean((1, 2, 3)).argmax() / fps == 2.0
    assert abs(np.abs(heard).argmax() / rate - 2.0) < 0.5 / FPS
    assert abs(len(heard) / rate - 3.0) < 0.08


def test_sound_is_cut_or_padded_to_the_picture(tmp_path):
    for seconds in (0.5, 3.0):
        with VideoWriter(tmp_path / "a.mp4", 32, 32, FPS, RATE) as writer:
            writer.write_audio(np.full(round(seconds * RATE), 0.1, np.float32))
            writer.write_frames(np.zeros((24, 32, 32, 3), np.uint8))
        _, _, heard, rate = read_video(tmp_path / "a.mp4")
        assert abs(len(heard) / rate - 1.5) < 0.08


@pytest.mark.parametrize("suffix", ["mp4", "mov", "mkv"])
def test_a_file_that_was_never_closed_plays(tmp_path, suffix):
    frames, samples = flash_and_click(1.0)
    writer = VideoWriter(tmp_path / f"a.{suffix}", 48, 32, FPS, RATE)
    writer.write_audio(samples)
    writer.write_frames(frames)
    shutil.copy(writer.part, tmp_path / f"killed.{suffix}")
    writer.close()
    seen, _, heard, _ = read_video(tmp_path / f"killed.{suffix}")
    assert len(frames) - FPS <= len(seen) < len(frames)
    assert seen.mean((1, 2, 3)).argmax() == FPS and len(heard) > RATE


def test_a_silent_film_has_no_audio_track(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 32, 32, 25) as writer:
        writer.write_frames(np.zeros((5, 32, 32, 3), np.uint8))
        writer.write_audio(np.zeros(100, np.float32))
    frames, fps, heard, rate = read_video(tmp_path / "a.mp4")
    assert len(frames) == 5 and fps == 25 and heard is None and rate is None


def test_bad_outputs_are_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"ending in \.mp4"):
        VideoWriter(tmp_path / "a.avi", 32, 32, 16)
    with pytest.raises(ValueError, match="even sides"):
        VideoWriter(tmp_path / "a.mp4", 33, 32, 16)
    with pytest.raises(ValueError, match="folder that does not exist"):
        VideoWriter(tmp_path / "no" / "a.mp4", 32, 32, 16)
    (tmp_path / "b.mp4").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        VideoWriter(tmp_path / "b.mp4", 32, 32, 16)
    with pytest.raises(ValueError, match="cannot be written"):
        VideoWriter(tmp_path / ("long" * 100 + ".mp4"), 32, 32, 16)
    with pytest.raises(ValueError, match="sound of 12345 Hz; AAC takes one of"):
        VideoWriter(tmp_path / "a.mp4", 32, 32, 16, 12_345)
    with pytest.raises(ValueError, match="video of 0 frames per second"):
        VideoWriter(tmp_path / "a.mp4", 32, 32, 0)
    assert not (tmp_path / "a.mp4").exists()


def test_frames_of_another_size_are_refused_not_stretched(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 48, 32, 16) as writer:
        writer.write_frames(np.zeros((2, 32, 48, 3), np.uint8))
        with pytest.raises(ValueError, match="frames of 32x48 pixels for a video of 48x32"):
            writer.write_frames(np.zeros((2, 48, 32, 3), np.uint8))
    assert read_video(tmp_path / "a.mp4")[0].shape == (2, 32, 48, 3)


def test_an_exception_still_closes_the_file(tmp_path):
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "a.mp4", 32, 32, 16, RATE) as writer:
        writer.write_frames(np.zeros((8, 32, 32, 3), np.uint8))
        raise RuntimeError
    frames, _, heard, rate = read_video(tmp_path / "a.mp4")
    assert len(frames) == 8 and abs(len(heard) / rate - 0.5) < 0.08


def boxes(path):
    """Names of the outermost boxes of an MP4 file."""
    data, start, names = path.read_bytes(), 0, []
    while start < len(data):
        names.append(data[start + 4 : start + 8])
        start += int.from_bytes(data[start : start + 4], "big")
    return names


def test_a_closed_file_says_how_long_it_is(tmp_path):
    frames, samples = flash_and_click(1.0)
    with VideoWriter(tmp_path / "a.mp4", 48, 32, FPS, RATE) as writer:
        writer.write_audio(samples)
        writer.write_frames(frames)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert abs(container.duration / av.time_base - 3.0) <= 1024 / RATE
    is_plain = b"moof" not in boxes(tmp_path / "a.mp4")
    assert is_plain == (av.library_versions["libavformat"] >= (62, 12))


def test_without_a_frame_an_older_video_stays(tmp_path):
    (tmp_path / "old.mp4").write_bytes(b"precious")
    for name in ("old.mp4", "new.mp4"):
        with VideoWriter(tmp_path / name, 32, 32, FPS, RATE) as writer:
            writer.write_audio(np.zeros(100, np.float32))
    assert (tmp_path / "old.mp4").read_bytes() == b"precious"
    assert not (tmp_path / "new.mp4").exists()


def write_grey(path, level, frames=8, *, is_whole=True):
    with VideoWriter(path, 32, 32, FPS) as writer:
        writer.write_frames(np.full((frames, 32, 32, 3), level, np.uint8))
        writer.close(is_whole=is_whole)
    return writer


def level_of(path):
    return round(float(read_video(path)[0].mean()) / 50) * 50


def test_an_older_video_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "a.mp4"
    write_grey(path, 50)
    path.chmod(0o640)
    writer = VideoWriter(path, 32, 32, FPS)
    writer.write_frames(np.full((40, 32, 32, 3), 150, np.uint8))
    assert level_of(path) == 50 and writer.part.parent == tmp_path
    writer.close()
    assert level_of(path) == 150 and path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"] and writer.older is None


def test_a_part_takes_the_name_and_an_older_video_is_kept(tmp_path):
    path = tmp_path / "a.mp4"
    assert write_grey(path, 50, is_whole=False).older is None and level_of(path) == 50
    writer = write_grey(path, 100, is_whole=False)
    assert writer.older == tmp_path / "a.before.mp4"
    assert level_of(path) == 100 and level_of(writer.older) == 50
    with pytest.raises(RuntimeError), VideoWriter(path, 32, 32, FPS) as writer:
        writer.write_frames(np.full((8, 32, 32, 3), 150, np.uint8))
        raise RuntimeError
    assert level_of(path) == 150 and level_of(writer.older) == 100
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.before-1.mp4", "a.before.mp4", "a.mp4"]  # fmt: skip


def test_links_stay_links(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "real.mp4", tmp_path / "a.mp4"
    for _ in range(2):  # it dangles at first
        link.unlink(missing_ok=True)
        link.symlink_to(target)
        write_grey(link, 100)
        assert link.is_symlink() and level_of(target) == 100
    assert [p.name for p in target.parent.iterdir()] == ["real.mp4"]


@pytest.mark.parametrize(
    "name", ["-a b'c\"d#e%20f%d.mp4", "é漢字🙂.mkv", "漢" * 80 + ".mp4", "a.b.mov", "[1]*?.MP4"]
)
def test_any_name_is_written_and_read(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    write_grey(name, 100)
    assert level_of(name) == 100 and [p.name for p in tmp_path.iterdir()] == [name]


def test_a_colon_in_the_name_is_no_protocol(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with VideoWriter("12:30.mp4", 32, 32, FPS) as writer:
        writer.write_frames(np.zeros((3, 32, 32, 3), np.uint8))
    assert len(read_video("12:30.mp4")[0]) == 3


def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "a.mp4").symlink_to("/dev/full")
    with (
        pytest.raises(ValueError, match=r"a\.mp4 cannot be written after \d+ frames"),
        VideoWriter(tmp_path / "a.mp4", 32, 32, FPS) as writer,
    ):
        writer.write_frames(np.zeros((FPS * 2 + 1, 32, 32, 3), np.uint8))


def test_a_closed_writer_takes_no_more(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4", 32, 32, FPS)
    writer.close()
    with pytest.raises(ValueError, match="closed already"):
        writer.write_frames(np.zeros((1, 32, 32, 3), np.uint8))


def test_what_is_no_video_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.mp4 cannot be read as a video"):
        read_video(tmp_path / "gone.mp4")
    (tmp_path / "text.mp4").write_text("no video" * 50)
    with pytest.raises(ValueError, match="cannot be read as a video"):
        read_video(tmp_path / "text.mp4")
    with av.open(str(tmp_path / "a.wav"), "w") as container:
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        frame.sample_rate = RATE
        container.mux(container.add_stream("pcm_s16le", rate=RATE).encode(frame))
    with pytest.raises(ValueError, match="has no picture"):
        read_video(tmp_path / "a.wav")


@pytest.mark.parametrize("is_written", [False, True])
@pytest.mark.parametrize("call", [4, 5, 6])  # two frames, then their sound
def test_an_interrupt_at_any_moment_leaves_a_file_that_plays(tmp_path, call, is_written):
    writer, calls = VideoWriter(tmp_path / "a.mp4", 32, 32, 16, 16_000), 0
    encode = writer._encode

    def interrupted(stream, frame):
        nonlocal calls
        calls += 1
        if is_written or calls != call:
            encode(stream, frame)
        if calls == call:
            raise KeyboardInterrupt

    writer._encode = interrupted
    with pytest.raises(KeyboardInterrupt), writer:
        for _ in range(4):
            writer.write_audio(np.full(2000, 0.1, np.float32))
            writer.write_frames(np.full((2, 32, 32, 3), 99, np.uint8))
    assert len(read_video(tmp_path / "a.mp4")[0]) >= 2
