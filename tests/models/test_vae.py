import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.models.config import WanVAEConfig
from jax_avatar.models.network import Network, flatten, unflatten
from jax_avatar.models.vae.wan import ChannelNorm, WanVAE, upsample_conv

NANO = WanVAEConfig(
    dim=4,
    z_dim=3,
    dim_mult=(1, 1, 2),
    num_res_blocks=1,
    temporal_downsample=(True, True),
    latent_mean=(0.1, -0.4, 0.3),
    latent_std=(1.5, 0.7, 1.1),
)


@pytest.fixture(scope="module")
def weights():
    network = Network.abstract(WanVAE, NANO)
    params = network.params
    rng = np.random.default_rng(1)

    # Nothing may be neutral: fresh biases and the attention's output are zero, norm scales one.
    def draw(path, shape):
        spread = np.prod(shape[:-1]) ** -0.5 if path.endswith("kernel") else 0.2
        return (path.endswith("scale") + spread * rng.normal(size=shape)).astype(np.float32)

    params = {path: draw(path, leaf.shape) for path, leaf in flatten(params).items()}
    return network, unflatten(params)


@pytest.fixture(scope="module")
def vae(weights):
    """The methods by name, compiled once per shape."""
    network, params = weights

    def bind(method):
        call = jax.jit(lambda params, *rest: getattr(network.bind(params), method)(*rest))
        return lambda *rest: call(params, *rest)

    names = ("encode", "encode_moments", "encode_first", "encode_next")
    return {name: bind(name) for name in (*names, "decode", "decode_first", "decode_next")}


@pytest.fixture(scope="module")
def video():
    return jax.random.uniform(jax.random.key(2), (2, 9, 8, 12, 3), minval=-1.0)


@pytest.fixture(scope="module")
def latent():
    return jax.random.normal(jax.random.key(3), (2, 3, 2, 3, 3))


def stream(vae, kind, clip, schedule):
    parts, state = [], None
    for begin, end in itertools.pairwise([0, *np.cumsum(schedule)]):
        if state is None:
            part, state = vae[f"{kind}_first"](clip[:, begin:end])
        else:
            part, state = vae[f"{kind}_next"](state, clip[:, begin:end])
        parts.append(part)
    return [part.shape[1] for part in parts], jnp.concatenate(parts, axis=1)


def test_the_first_latent_stands_for_one_frame_and_later_ones_for_four(vae, video, latent):
    assert vae["encode"](video).shape == latent.shape == (2, 3, 2, 3, 3)
    assert vae["decode"](latent).shape == video.shape == (2, 9, 8, 12, 3)


@pytest.mark.parametrize("schedule", [[1, 1, 1], [1, 2], [2, 1]])
def test_chunked_decoding_equals_whole(vae, latent, schedule):
    frames, chunked = stream(vae, "decode", latent, schedule)
    assert frames == [4 * k - 3 * (i == 0) for i, k in enumerate(schedule)]
    np.testing.assert_allclose(chunked, vae["decode"](latent), atol=1e-5)


@pytest.mark.parametrize("schedule", [[1, 4, 4], [1, 8], [5, 4]])
def test_chunked_encoding_equals_whole(vae, video, schedule):
    _, chunked = stream(vae, "encode", video, schedule)
    np.testing.assert_allclose(chunked, vae["encode"](video), atol=1e-5)


@pytest.mark.parametrize("changed", [1, 2])
def test_a_latent_changes_no_earlier_frame(vae, latent, changed):
    before = vae["decode"](latent)
    after = vae["decode"](latent.at[:, changed].add(1.0))
    first_frame = 4 * changed - 3
    np.testing.assert_array_equal(after[:, :first_frame], before[:, :first_frame])
    moved = jnp.abs(after - before).max(axis=(0, 2, 3, 4))[first_frame : first_frame + 4]
    assert moved.min() > 1e-4


@pytest.mark.parametrize("changed", [1, 4, 5])
def test_a_frame_changes_no_earlier_latent(vae, video, changed):
    before = vae["encode"](video)
    after = vae["encode"](video.at[:, changed].add(0.5))
    first_latent = (changed + 3) // 4
    np.testing.assert_array_equal(after[:, :first_latent], before[:, :first_latent])
    assert jnp.abs(after - before)[:, first_latent].max() > 1e-4


def test_streams_do_not_disturb_each_other(vae, latent):
    _, state = vae["decode_first"](latent[:, :1])
    expected, _ = vae["decode_next"](state, latent[:, 1:2])
    vae["decode_next"](state, -latent[:, 2:3])
    vae["encode_first"](jnp.zeros((2, 1, 8, 12, 3)))
    again, _ = vae["decode_next"](state, latent[:, 1:2])
    np.testing.assert_array_equal(again, expected)


def test_clips_of_a_batch_are_independent(vae, video, latent):
    np.testing.assert_allclose(vae["encode"](video[::-1]), vae["encode"](video)[::-1], atol=1e-5)
    swapped = jnp.stack([latent[0], 2 * latent[1]])
    np.testing.assert_allclose(vae["decode"](swapped)[0], vae["decode"](latent)[0], atol=1e-5)


def test_latents_are_the_normalised_posterior_mean(vae, video):
    image = video[:, :1]
    mean = vae["encode_moments"](image)[..., : NANO.z_dim]
    restored = vae["encode_first"](image)[0] * jnp.array(NANO.latent_std)[None, None, None, None]
    restored += jnp.array(NANO.latent_mean)[None, None, None, None]
    np.testing.assert_allclose(restored, mean, atol=1e-5)


def test_bfloat16_stays_close_and_gives_float32(weights, vae, latent):
    half = NANO.replace(dtype=jnp.bfloat16)
    network = Network.abstract(WanVAE, half)
    decode = jax.jit(lambda params, z: network.bind(params).decode_first(z))
    decoded, state = decode(weights[1], latent[:, :2])
    assert decoded.dtype == jnp.float32
    assert {buffer.dtype for buffer in state.buffers} == {jnp.dtype(jnp.bfloat16)}
    exact, _ = vae["decode_first"](latent[:, :2])
    assert 0 < jnp.abs(decoded - exact).mean() < 0.05 * jnp.abs(exact).mean()


@pytest.mark.parametrize("size", [(1, 1), (3, 5)])
def test_upsample_conv_is_the_convolution_of_the_repeated_image(size):
    keys = jax.random.split(jax.random.key(4), 3)
    x = jax.random.normal(keys[0], (2, *size, 3))
    kernel = jax.random.normal(keys[1], (3, 3, 3, 4))
    bias = jax.random.normal(keys[2], (4,))
    repeated = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    expected = jax.lax.conv_general_dilated(
        repeated, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(
        upsample_conv(x, kernel, bias), expected + bias[None, None, None], atol=1e-5
    )


def test_norm_has_a_finite_gradient_at_zero_and_is_scale_free_elsewhere():
    norm = ChannelNorm(NANO, 4)
    gradient = jax.grad(lambda x: norm(x).sum())(jnp.zeros((1, 1, 1, 1, 4)))
    assert jnp.isfinite(gradient).all()
    x = jax.random.normal(jax.random.key(5), (1, 1, 1, 2, 4))
    np.testing.assert_allclose(norm(1e-5 * x), norm(x), rtol=1e-5)


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        ("encode", (1, 4, 8, 8, 3), r"expected 1 \+ 4 n frames"),
        ("encode", (1, 5, 8, 10, 3), "multiples of 4"),
        ("decode", (1, 2, 3, 3, 5), r"expected \[b t h w 3\]"),
    ],
)
def test_a_wrong_shape_is_explained(vae, method, shape, message):
    with pytest.raises(ValueError, match=message):
        vae[method](jnp.zeros(shape))


def test_a_foreign_state_is_explained(vae, latent, video):
    _, state = vae["encode_first"](video[:, :1])
    with pytest.raises(ValueError, match="buffers, this network"):
        vae["decode_next"](state, latent[:, 1:])


def test_a_wrong_chunk_of_frames_is_explained(vae, video):
    _, state = vae["encode_first"](video[:, :1])
    with pytest.raises(ValueError, match="expected 4 n, at least 4, frames"):
        vae["encode_next"](state, video[:, 1:4])


@pytest.mark.parametrize(
    "changes",
    [{"temporal_downsample": (True,)}, {"z_dim": 4}, {"dim": 3}, {"latent_std": (1.0, 0.0, 1.0)}],
)
def test_a_config_that_does_not_fit_together_is_refused(changes):
    with pytest.raises(ValueError):
        NANO.replace(**changes)
