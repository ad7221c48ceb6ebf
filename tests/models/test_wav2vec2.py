import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

from conversion.readers import SafetensorsFile
from conversion.rules import convert
from conversion.wav2vec2 import TABLE, config_from
from jax_avatar.models.network import Network, flatten, unflatten
from jax_avatar.models.speech.feature_rate import bucket_indices, positions_at
from jax_avatar.models.speech.wav2vec2 import Wav2Vec2, Wav2Vec2Config, normalise, xlsr53_large

GOLDEN = Path(__file__).parents[1] / "golden" / "audio"
TINY = Wav2Vec2Config(
    width=16, num_layers=2, num_heads=2, ffn_width=24, conv_widths=(4,) * 7, position_groups=4,
    look_back_s=1.0,
)  # fmt: skip
WHOLE_SECONDS = 3.0


@functools.cache
def tiny_params():
    """Random weights with biases; drawing them here is much faster than initialising."""
    target = Network.abstract(Wav2Vec2, TINY).params
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        fan_in = {"kernel": np.prod(leaf.shape[-3 if "convs" in path else -2 : -1])}
        values = rng.normal(size=leaf.shape) / np.sqrt(fan_in.get(path.split("/")[-1], 100))
        return jnp.asarray(values + (path.endswith("scale")), leaf.dtype)

    return unflatten({path: draw(path, leaf) for path, leaf in flatten(target).items()})


def encoder(**changes):
    config = TINY.replace(**changes)
    network = Network.abstract(Wav2Vec2, config)
    return network.bind(tiny_params())


def jitted(model, method, **options):
    """A method with the weights as an argument; compiling fast matters more than running fast."""
    structure, state = nnx.split(model)

    def call(state, *arguments):
        return getattr(nnx.merge(structure, state), method)(*arguments)

    return functools.partial(jax.jit(call, **options), state)


def hidden_states(model, wave, padding=None):
    return jitted(model, "hidden_states")(wave, padding)


def encode(model, wave, frames):
    return jitted(model, "encode", static_argnums=2)(wave, frames)


def voice(seconds, speakers=1, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(0, 0.1, (1, speakers, round(16_000 * seconds))), jnp.float32)


def stream(model, wave, frames, chunk=12):
    """Features of the first `frames` video frames as a session asks for them; silence follows."""
    config, step = model.config, jitted(model, "features")
    _, stop = config.sample_range(0, frames)
    wave = jnp.pad(wave, ((0, 0), (0, 0), (0, max(0, stop - wave.shape[-1]))))
    state, parts = model.start(wave[..., : config.sample_range(0, 1)[0]]), []
    shapes = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    for first in range(0, frames, chunk):
        start, stop = config.sample_range(first, chunk)
        features, state = step(state, wave[..., start:stop])
        assert features.shape == (1, wave.shape[1], chunk, 3, 16)
        assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state) == shapes
        parts.append(features)
    return np.concatenate(parts, axis=2)


def golden(stem):
    weights = SafetensorsFile(GOLDEN / f"{stem}_weights.safetensors")
    config = config_from(json.loads(weights.metadata["config"]))
    target = Network.abstract(Wav2Vec2, config).params
    source = {name.removeprefix("sd."): weights[name] for name in weights}
    params, _ = convert(source, TABLE, flatten(target))

    def build(**changes):
        changed = config.replace(**changes)
        network = Network.abstract(Wav2Vec2, changed)
        return network.bind(jax.device_put(unflatten(params)))

    return build, load_file(GOLDEN / f"{stem}_io.safetensors")


class TestWhole:
    @pytest.mark.parametrize(("fps", "clip"), [(25, 48), (16, 80)])
    def test_a_recording_is_encoded_as_officially(self, fps, clip):
        build, numbers = golden("w2v_b")
        for wave in ("w0", "w1"):
            expected = numbers[f"{wave}.bucket_fps{fps}_bf{clip}"]  # 1 k a T
            samples = jnp.asarray(numbers[f"{wave}.wave"])[None, None]
            ours = encode(build(fps=fps), samples, expected.shape[-1])
            np.testing.assert_allclose(ours[:, 0], np.moveaxis(expected, -1, 1), atol=1e-4, rtol=0)

    def test_speakers_and_clips_do_not_mix(self):
        model = encoder()
        waves = jnp.concatenate([voice(0.6, 2, seed) for seed in range(2)])
        together = encode(model, waves, 15)
        for b in range(2):
            for u in range(2):
                alone = encode(model, waves[b : b + 1, u : u + 1], 15)
                np.testing.assert_allclose(together[b, u], alone[0, 0], atol=1e-5)

    def test_loudness_and_offset_do_not_matter(self):
        wave = voice(0.5)
        model = encoder()
        np.testing.assert_allclose(
            encode(model, 0.3 * wave + 0.2, 12), encode(model, wave, 12), atol=1e-3
        )

    def test_padding_is_as_if_the_wave_began_there(self):
        model, wave = encoder(), normalise(voice(1.0)[0])
        for pad in (320, 16_000):
            padded = jnp.pad(wave, ((0, 0), (pad, 0)), constant_values=3.0)
            states = hidden_states(model, padded, pad)[:, :, pad // 320 :]
            np.testing.assert_allclose(states, hidden_states(model, wave), atol=1e-5)

    def test_only_the_last_state_is_normed(self):
        states = hidden_states(encoder(), normalise(voice(0.5)[0]))
        spread = np.asarray(states.std(-1))
        np.testing.assert_allclose(spread[-1], 1, atol=0.05)
        assert (np.abs(spread[:-1] - 1) > 0.1).any(axis=(1, 2)).all()

    def test_bfloat16_stays_near(self):
        states = hidden_states(encoder(), normalise(voice(0.5)[0]))
        half = hidden_states(encoder(dtype="bfloat16"), normalise(voice(0.5)[0]))
        assert half.dtype == jnp.bfloat16
        error = np.abs(np.asarray(half, np.float32) - np.asarray(states)) / states.std()
        assert 0 < error.mean() < 0.02

    def test_too_little_sound_is_refused(self):
        with pytest.raises(ValueError, match="too short"):
            encode(encoder(), voice(0.02), 1)
        with pytest.raises(ValueError, match="at least 2"):
            encode(encoder(), voice(0.03), 1)


class TestStream:
    @pytest.mark.parametrize("fps", [25, 16])
    def test_video_frames_are_rounded_as_in_the_official_tables(self, fps):
        index = bucket_indices(10**6, fps, 2000)[:2000]
        np.testing.assert_array_equal(positions_at(0, 2000, fps), index)
        # Counting from a whole second gives the same places inside it.
        np.testing.assert_array_equal(positions_at(7, 90, fps), index[7 + 40 * fps :][:90] - 1200)

    @pytest.mark.parametrize("blocks", [1, 4])
    def test_with_the_whole_context_it_is_the_whole_encoding(self, blocks):
        """Everything heard, everything in the window: only the timing is the stream's own."""
        first, seconds = 12 * (blocks - 1), 0.48 * blocks + 2
        model = encoder(look_back_s=2.0, look_ahead_s=2.0, level_s=1e6)
        wave = voice(seconds)
        features = stream(model, wave, 12 * blocks)[0, 0, first:]
        states = np.asarray(hidden_states(model, normalise(wave[0])))[:, 0]
        place = np.round(1.2 * np.arange(first, first + 12)) * 5 / 3
        low = np.floor(place).astype(int)
        share = (place - low)[None, :, None]
        expected = (1 - share) * states[:, low] + share * states[:, low + 1]
        np.testing.assert_allclose(features, np.moveaxis(expected, 0, 1), atol=2e-3)

    @pytest.mark.parametrize("fps", [25, 16])
    def test_more_context_is_nearer_to_the_whole_encoding(self, fps):
        wave = voice(WHOLE_SECONDS)
        whole = encode(encoder(fps=fps), wave, 2 * fps)[:, :, : 2 * fps]
        errors = []
        for back, ahead in [(0.2, 0.0), (0.6, 0.6), (2.0, 1.0)]:
            model = encoder(fps=fps, look_back_s=back, look_ahead_s=ahead)
            live = stream(model, wave, 2 * fps, chunk=fps)
            errors.append(np.sqrt(np.mean((live - whole) ** 2)) / whole.std())
        assert errors[0] > errors[1] > errors[2] and errors[2] < 0.35, errors

    def test_frames_that_have_sound_are_never_zero(self):
        for chunk in (1, 12):
            features = stream(encoder(look_ahead_s=0.0), voice(1.0), 24, chunk)
            assert (np.abs(features).max((-1, -2)) > 0).all()

    def test_later_sound_changes_nothing_before(self):
        model, wave = encoder(), voice(2.0)
        heard = model.config.sample_range(24, 1)[0]
        changed = wave.at[..., heard:].add(voice(2.0, seed=5)[..., heard:])
        before, after = stream(model, wave, 36), stream(model, changed, 36)
        np.testing.assert_array_equal(before[:, :, :24], after[:, :, :24])
        assert (before[:, :, 24:] != after[:, :, 24:]).any()

    def test_a_window_forgets_what_is_long_past(self):
        """Beyond the look-back only the level remains, and that only so much."""
        model, tail = encoder(level_s=0.1), voice(4.0, seed=7)
        one, other = (jnp.concatenate([voice(0.96, seed=s), tail], axis=-1) for s in (1, 2))
        a, b = stream(model, one, 108), stream(model, other, 108)
        assert np.abs(a[:, :, :24] - b[:, :, :24]).max() > 0.1
        np.testing.assert_allclose(a[:, :, 84:], b[:, :, 84:], atol=1e-3)

    @pytest.mark.parametrize(("loudness", "expected"), [(0.2, 1), (0.01, 1), (1e-4, 0.03), (0, 0)])
    def test_speech_is_levelled_and_silence_stays_silent(self, monkeypatch, loudness, expected):
        seen = []

        def record(self, wave, padding=None):
            seen.append(np.asarray(wave[..., -16_000:]))
            return jnp.zeros((3, 1, self.config.num_frames(wave.shape[-1]), 16))

        monkeypatch.setattr(Wav2Vec2, "hidden_states", record)
        model = encoder()
        wave = loudness * (10 * voice(1.0) + 0.5)  # an offset besides
        model.features(model.start(wave[..., :3840]), wave[..., 3840 : 3840 + 7680])
        heard = seen[0][..., -(3840 + 7680) :]
        assert heard.std() == pytest.approx(expected, rel=0.1) and abs(heard.mean()) < 0.02

    def test_a_stream_may_start_late(self):
        model, wave = encoder(look_back_s=2.0, level_s=1e6), voice(2.0)
        head, stop = model.config.sample_range(12, 12)
        step = jitted(model, "features")
        features, _ = step(model.start(wave[..., :head]), wave[..., head:stop])
        np.testing.assert_allclose(features, stream(model, wave, 24)[:, :, 12:], atol=1e-3)

    def test_other_cuts_are_refused(self):
        model = encoder()
        with pytest.raises(ValueError, match="look-ahead of 3840"):
            model.start(voice(0.1))
        with pytest.raises(ValueError, match="multiple of 640"):
            model.features(model.start(voice(0.24)), voice(0.1)[..., :1000])


class TestIsolated:
    def test_it_is_the_official_prototype(self):
        build, numbers = golden("w2v_b")
        model, chunk = build(live="isolated"), jnp.asarray(numbers["w1.wave"])[None, None]
        assert chunk.shape[-1] == 7680
        step = jitted(model, "features")
        features, state = step(model.start(chunk[..., :0]), chunk)
        expected = np.moveaxis(numbers["w1.bucket_fps25_bf12"], -1, 1)
        np.testing.assert_allclose(features[:, 0], expected, atol=1e-4, rtol=0)
        assert (features[:, :, 11] == 0).all() and (features[:, :, :11] != 0).any((-1, -2)).all()
        again, _ = step(state, chunk)
        np.testing.assert_array_equal(again, features)


def test_the_published_size_has_the_published_number_of_parameters():
    params = Network.abstract(Wav2Vec2, xlsr53_large()).params
    used = sum(np.prod(leaf.shape) for leaf in flatten(params).values())
    head_and_mask = 33 * 1024 + 33 + 1024
    assert round((used + head_and_mask) / 1e6, 1) == 315.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conv_strides": (5, 2)}, r"\[7, 7, 2\] values"),
        ({"width": 18}, "not a multiple of position_groups"),
        ({"sample_rate": 8000}, "25 frames per second; expected 50"),
        ({"fps": 30}, "not a multiple of fps 30"),
        ({"live": "causal"}, "rolling or isolated"),
        ({"look_ahead_s": 0.25}, "take 0.24"),
        ({"look_back_s": -1.0}, "take 0"),
        ({"variance_floor": 0.0}, "must be positive"),
    ],
)
def test_impossible_configs_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        TINY.replace(**changes)


@pytest.mark.parametrize("offset", [0.0, 0.9])
@pytest.mark.parametrize("level", [1e-4, 0.1])
def test_a_long_quiet_wave_with_an_offset_is_normalised_as_in_float64(offset, level):
    sound = np.random.default_rng(0).standard_normal((1, 1_000_000))
    wave = (offset + level * sound).astype(np.float32)
    exact = wave.astype(np.float64)
    expected = (exact - exact.mean()) / np.sqrt(exact.var() + 1e-7)
    # Rounded once: nothing of it was computed in float32.
    np.testing.assert_allclose(normalise(jnp.asarray(wave)), expected, rtol=6.5e-8)
    np.testing.assert_allclose(jax.jit(normalise)(wave), expected, rtol=1e-6, atol=1e-6)
