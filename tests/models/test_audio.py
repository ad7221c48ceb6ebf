import dataclasses
import importlib
import os

import jax
import jax.numpy as jnp
import librosa
import numpy as np
import pytest
from flax import nnx

from jax_avatar.models.speech import mel as audio
from jax_avatar.models.speech.mel import SpeechConfig, SpeechEncoder, log_mel

SMALL = SpeechConfig(bands=16, width=8, dilations=(1, 2), kernel=3, units=("jawOpen", "tongueOut"))


def _encoder(config=SMALL):
    return SpeechEncoder(config, rngs=nnx.Rngs(0))


def _wave(seconds, speakers=1, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(0, 0.1, (1, speakers, int(16000 * seconds))), jnp.float32)


@pytest.mark.parametrize("fps", [16, 25])
def test_log_mel_equals_librosa(fps):
    config = SpeechConfig(fps=fps)
    wave = np.asarray(_wave(0.5))[0, 0]
    ours = log_mel(jnp.asarray(wave), config)
    # librosa centres the window in its frame of 512 samples, ours ends the frame.
    margin = (512 - config.window) // 2
    first = (len(wave) - config.window) % config.hop
    theirs = librosa.feature.melspectrogram(
        y=np.pad(wave[first:], margin),
        sr=16000,
        n_fft=512,
        win_length=config.window,
        hop_length=config.hop,
        n_mels=64,
        fmin=50,
        fmax=7600,
        center=False,
        power=1.0,
    )
    np.testing.assert_allclose(ours, np.log(theirs.T + 1e-4), atol=2e-4)
    assert config.hop == {16: 250, 25: 160}[fps]


@pytest.mark.parametrize("fps", [16, 25])
def test_features_hear_exactly_80_ms_ahead(fps):
    config = SpeechConfig(fps=fps, bands=16, width=8, dilations=(1, 2), kernel=3)
    encode = jax.jit(_encoder(config).encode, static_argnums=1)
    frame, wave = 6, _wave(1.0)
    last = frame * (16000 // fps) + 1280 - 1
    before = encode(wave, 12)
    after = encode(wave.at[..., last + 1 :].add(0.5), 12)
    np.testing.assert_array_equal(before[:, :, : frame + 1], after[:, :, : frame + 1])
    assert np.any(before[:, :, frame + 1] != after[:, :, frame + 1])
    # A Hann window starts and ends near zero: the whole last hop shows in every hidden state.
    reached = encode(wave.at[..., last - config.hop : last + 1].add(0.5), 12)
    np.testing.assert_array_equal(before[:, :, :frame], reached[:, :, :frame])
    assert np.all(np.any(before[:, :, frame] != reached[:, :, frame], axis=-1))


@pytest.mark.parametrize("fps, lookahead_ms", [(16, 80), (25, 80), (16, 0)])
def test_chunks_equal_the_whole_clip(fps, lookahead_ms):
    config = SpeechConfig(
        fps=fps, lookahead_ms=lookahead_ms, bands=16, width=8, dilations=(1, 2, 4), kernel=5
    )
    encoder, wave = _encoder(config), _wave(1.6, speakers=2)
    whole = jax.jit(encoder.encode, static_argnums=1)(wave, 20)

    step = jax.jit(encoder.features)
    start, _ = config.sample_range(0, 4)
    state = encoder.start(wave[..., : max(0, start)])
    parts = []
    for frame in range(0, 20, 4):
        start, stop = config.sample_range(frame, 4)
        chunk = jnp.pad(wave, ((0, 0), (0, 0), (2000, 0)))[..., 2000 + start : 2000 + stop]
        features, state = step(state, chunk)
        assert features.shape == (1, 2, 4, 4, 8)
        parts.append(features)
    np.testing.assert_allclose(jnp.concatenate(parts, axis=2), whole, atol=1e-5)


def test_a_stream_may_start_late():
    encoder, wave = _encoder(), _wave(1.2)
    start, stop = SMALL.sample_range(1, 12)
    features, _ = encoder.features(encoder.start(wave[..., :start]), wave[..., start:stop])
    np.testing.assert_allclose(features, encoder.encode(wave, 13)[:, :, 1:], atol=1e-5)


def test_dense_units_hold_those_of_the_frames():
    encoder, wave = _encoder(), _wave(0.8)
    dense = encoder.dense_units(wave, 9)
    np.testing.assert_allclose(
        dense[:, :, -33::4], encoder.units(encoder.encode(wave, 9)), atol=1e-6
    )


def test_speakers_do_not_hear_each_other():
    encoder, wave = _encoder(), _wave(0.8, speakers=2)
    alone = encoder.encode(wave[:, 1:], 8)
    np.testing.assert_allclose(encoder.encode(wave, 8)[:, 1:], alone, atol=1e-6)


def test_default_size():
    encoder = _encoder(SpeechConfig())
    count = sum(p.size for p in jax.tree.leaves(nnx.state(encoder, nnx.Param)))
    assert 2e5 < count < 4e5
    assert encoder.encode(_wave(0.3), 3).shape == (1, 1, 3, 5, 96)


def test_every_size_is_in_the_weights():
    def shapes(**changes):
        graph = nnx.eval_shape(lambda: _encoder(dataclasses.replace(SMALL, **changes)))
        return jax.tree.map(lambda leaf: leaf.shape, nnx.state(graph, nnx.Param).flat_state())

    other = {"bands": 17, "width": 9, "kernel": 4, "dilations": (1,), "units": ("jawOpen",)}
    for name, value in other.items():
        assert str(shapes(**{name: value})) != str(shapes()), name


def test_rates_and_frequencies_are_those_of_the_settings():
    """A tone below the lowest band or above the highest one is not heard."""
    wave = jnp.asarray(np.sin(2 * np.pi * 1000 * np.arange(8000) / 16000), jnp.float32)

    def loudness(**changes):
        return float(log_mel(wave, dataclasses.replace(SMALL, **changes)).max())

    for other in ({"min_hz": 1500.0}, {"max_hz": 700.0}):
        assert loudness(**other) < loudness() - 1
    for rate, fps, lookahead_ms in ((16000, 20, 0), (8000, 16, 40)):
        config = dataclasses.replace(SMALL, sample_rate=rate, fps=fps, lookahead_ms=lookahead_ms)
        assert config.hop == rate // fps // 4
        heard = 3 * rate // fps + rate * lookahead_ms // 1000
        assert config.sample_range(0, 4)[1] == heard


def test_bands_are_normalised_before_the_network():
    """Twice the deviation around the mean is the same as half of everything."""
    wave, mean = _wave(0.4), (1.0,) * 16
    encode = {
        std: _encoder(dataclasses.replace(SMALL, mel_mean=mean, mel_std=(std,) * 16)).encode(
            wave, 3
        )
        for std in (1.0, 2.0)
    }
    plain = _encoder().encode(wave, 3)
    for left, right in ((encode[1.0], encode[2.0]), (encode[1.0], plain)):
        assert np.abs(left - right).max() > 1e-3


def test_impossible_rates_and_chunks_are_refused():
    with pytest.raises(ValueError, match="fps"):
        SpeechConfig(fps=24)
    with pytest.raises(ValueError, match="one per band"):
        SpeechConfig(mel_mean=(1.0,))
    encoder = _encoder()
    with pytest.raises(ValueError, match="multiple of 1000"):
        encoder.features(encoder.start(_wave(0.0)), _wave(0.1))


def test_mel_filters_are_there_where_no_folder_can_be_written(monkeypatch):
    real, tried = importlib.import_module, []

    def refuse_once(name):
        tried.append(name)
        if len(tried) == 1:
            raise RuntimeError("cannot cache function: no locator available")
        return real(name)

    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    monkeypatch.setattr(importlib, "import_module", refuse_once)
    assert audio._librosa_filters.__wrapped__().mel and len(tried) == 2
    assert os.path.isdir(os.environ["NUMBA_CACHE_DIR"])
