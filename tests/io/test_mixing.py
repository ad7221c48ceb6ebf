import av
import numpy as np
import pytest

from jax_avatar.io.mixing import Mixer, float_channels

RATE = 16_000
FORMATS = {
    "u8": (np.uint8, 127, 128),
    "s16": (np.int16, 2**15 - 1, 0),
    "s32": (np.int32, 2**31 - 1, 0),
    "flt": (np.float32, 1, 0),
    "dbl": (np.float64, 1, 0),
}


def tone(hertz=440.0, seconds=0.1, rate=RATE):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


def speech(level=0.1, seconds=1.0):
    noise = np.random.default_rng(0).normal(size=round(seconds * RATE))
    return level * noise * (1 + np.sin(2 * np.pi * 3 * np.arange(len(noise)) / RATE)) / 2


def as_frame(channels, kind, layout, *, is_planar=False):
    dtype, scale, offset = FORMATS[kind]
    data = (np.asarray(channels) * scale + offset).astype(dtype)
    if not is_planar:
        data = np.ascontiguousarray(data.T.reshape(1, -1))
    if is_planar and len(channels) > 7:  # PyAV cannot make it, but convert
        packed = as_frame(channels, kind, layout)
        (frame,) = av.AudioResampler(kind + "p", layout, RATE).resample(packed)
        return frame
    name = kind + "p" * is_planar
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(data), name, layout)
    frame.sample_rate = RATE
    return frame


@pytest.mark.parametrize("layout", ["mono", "stereo", "2.1", "quad", "5.1", "7.1"])
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("is_planar", [False, True])
def test_every_format_and_layout_is_the_same_sound(kind, is_planar, layout):
    count = av.AudioLayout(layout).nb_channels
    told = []
    mix = Mixer("a", told.append)
    heard = mix.frame(as_frame(np.tile(tone(), (count, 1)), kind, layout, is_planar=is_planar))
    assert heard.dtype == np.float32
    np.testing.assert_allclose(heard, tone(), atol=0.02 if kind == "u8" else 1e-4)
    assert not told


def test_packed_and_planar_channels_are_not_confused():
    channels = np.random.default_rng(0).uniform(-0.9, 0.9, (6, 333))
    for kind in FORMATS:
        frames = (as_frame(channels, kind, "5.1", is_planar=p) for p in (False, True))
        packed, planar = map(float_channels, frames)
        np.testing.assert_array_equal(packed, planar)
        np.testing.assert_allclose(packed, channels, atol=0.02)


@pytest.mark.parametrize(
    ("layout", "shares"),
    [
        ("stereo", [0.5, 0.5]),
        ("2.1", [0.5, 0.5, 0]),
        # ITU-R BS.775: 1 in front, 1.414 in the centre, 0.707 behind; without the bass channel.
        ("5.1", np.array([1, 1, 2**0.5, 0, 0.5**0.5, 0.5**0.5]) / 4.8284),
        ("7.1", np.array([1, 1, 2**0.5, 0] + [0.5**0.5] * 4) / 6.2426),
    ],
)
def test_channels_are_mixed_as_itu_says(layout, shares):
    channels = np.stack([tone(200 + 170 * i) for i in range(len(shares))])
    mixed = Mixer("a").frame(as_frame(channels, "flt", layout))
    np.testing.assert_allclose(mixed, shares @ channels, atol=1e-4)


@pytest.mark.parametrize(("layout", "at"), [("stereo", 0), ("stereo", 1), ("5.1", 2), ("7.1", 7)])
def test_speech_in_one_channel_is_heard_whole_and_told(layout, at):
    channels, told = np.zeros((av.AudioLayout(layout).nb_channels, RATE)), []
    channels[at] = speech()
    mix = Mixer("a.wav", told.append)
    np.testing.assert_allclose(mix.frame(as_frame(channels, "flt", layout)), speech(), atol=1e-6)
    mix.finish()
    (remark,) = told
    assert remark.startswith("a.wav: only channel") and f"of {len(channels)} carries" in remark


@pytest.mark.parametrize("share", [-1.0, -0.8, -0.5])
def test_channels_out_of_phase_are_not_lost(share):
    told, heard = [], []
    mix = Mixer("a.wav", told.append)
    for start in range(0, RATE, 1024):
        part = speech()[start : start + 1024]
        heard.append(mix(np.stack([part, share * part]), RATE, ("FL", "FR")))
    mix.finish()
    got = np.concatenate(heard)[2000:]
    np.testing.assert_allclose(got, speech()[2000:], atol=1e-6)
    assert [remark for remark in told if "out of phase" in remark] == told[:1] and len(told) == 1


def test_usual_stereo_is_the_mean_of_its_sides_and_nothing_is_told():
    told, mix = [], Mixer("a.wav", lambda text: told.append(text))
    left, right = np.random.default_rng(1).normal(size=(2, 4 * RATE)) * 0.1 + speech(0.1, 4.0)
    for start in range(0, len(left), 4096):
        part = np.stack([left, right])[:, start : start + 4096]
        np.testing.assert_allclose(mix(part, RATE, ("FL", "FR")), part.mean(0), atol=1e-6)
    mix.finish()
    assert not told


def test_sound_that_comes_in_phase_again_is_mixed_again():
    mix, part = Mixer("a", lambda text: None), speech(0.1, 4.0)
    mix(np.stack([part, -part]), RATE)
    mix(np.stack([part, 0.5 * part]), RATE)
    np.testing.assert_allclose(mix(np.stack([part, 0.5 * part]), RATE), 0.75 * part, atol=1e-6)


def test_a_second_channel_comes_in_without_a_click():
    mix, sound = Mixer("a"), np.full((2, 1000), 0.4)
    first = mix(sound * [[1], [0]], RATE)
    second = mix(sound * [[1], [-0.25]], RATE)
    assert np.abs(np.diff(np.concatenate([first, second]))).max() < 0.001
    np.testing.assert_allclose(second[-1], 0.15, atol=1e-3)


@pytest.mark.parametrize("size", [2.0**15, 2.0**23, 2.0**31])
def test_floats_in_the_range_of_integers_are_divided_by_it(size):
    told, mix = [], Mixer("a.wav", lambda text: told.append(text))
    np.testing.assert_allclose(mix(size * speech(0.3)[None], RATE), speech(0.3), rtol=1e-6)
    mix(size * speech(0.3)[None], RATE)
    (remark,) = told
    assert "floats of up to" in remark and f"divided by {size:.0f}" in remark


def test_floats_a_little_above_full_scale_stay():
    told, mix = [], Mixer("a.wav", lambda text: told.append(text))
    np.testing.assert_allclose(mix(3 * tone()[None], RATE), 3 * tone(), rtol=1e-6)
    assert not told


@pytest.mark.parametrize(("level", "is_told"), [(0.1, False), (0.001, True), (0.0, False)])
def test_quiet_sound_is_told_at_its_end(level, is_told):
    told, mix = [], Mixer("a.wav", lambda text: told.append(text))
    mix(speech(level)[None], RATE)
    assert not told
    mix.finish()
    mix.finish()
    assert [("very quiet" in remark) for remark in told] == [True] * is_told


def test_raw_samples_of_another_format_are_told_by_their_loudness():
    samples = np.round(32767 * speech(0.1)).astype("<i2")
    for wrong in (samples.byteswap(), (samples / 32768).astype("<f4").view("<i2")):
        told = []
        mix = Mixer("a.wav", told.append)
        mix(wrong[None] / 32768, RATE)
        mix.finish()
        assert len(told) == 1 and "as loud as noise" in told[0], told


def test_sound_beyond_full_scale_is_told():
    told = []
    mix = Mixer("a.wav", told.append)
    mix(np.r_[speech(0.1), 3.0][None], RATE)
    mix.finish()
    assert len(told) == 1 and "goes up to 3, full scale is 1" in told[0], told


def test_a_channel_of_no_known_place_is_numbered():
    frame = av.AudioFrame.from_ndarray(np.zeros((1, 300), np.float32), "flt", "3 channels")
    frame.planes[0].update(np.outer(speech(0.1)[:100], [0, 1, 0]).astype(np.float32).tobytes())
    frame.sample_rate, told = RATE, []
    mix = Mixer("a.wav", told.append)
    mix.frame(frame)
    mix.finish()
    assert any("only channel 2 of 3" in text for text in told), told


def test_a_stream_without_end_is_judged_after_half_a_minute():
    told, mix = [], Mixer("a.wav", lambda text: told.append(text))
    mix(np.zeros((1, 40 * RATE)), RATE)
    assert not told  # nobody has spoken
    mix(speech(0.001, 31.0)[None], RATE)
    assert len(told) == 1 and "very quiet" in told[0]
