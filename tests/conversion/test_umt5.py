import numpy as np
import pytest

from conversion.rules import check, convert, export
from conversion.umt5 import TABLE, config_from, config_from_shapes, official_names
from jax_avatar.models.config import UMT5Config, umt5_xxl
from jax_avatar.models.network import Network, flatten
from jax_avatar.models.text import UMT5Encoder

SMALL = UMT5Config(
    vocab_size=9, width=6, ffn_width=10, num_heads=2, head_dim=4, num_layers=3, num_buckets=8
)
_TARGET = Network.abstract(UMT5Encoder, SMALL).params
TARGET = flatten(_TARGET)


def official_weights():
    rng = np.random.default_rng(0)
    params = {path: rng.normal(size=leaf.shape).astype(np.float32) for path, leaf in TARGET.items()}
    return export(params, TABLE), params


def transformers_name(name):
    """The other direction, written independently, for the round trip."""
    parts = name.split(".")
    if parts[0] != "blocks":
        return {"token_embedding": "shared", "norm": "encoder.final_layer_norm"}[
            parts[0]
        ] + ".weight"
    attention, ffn = "layer.0.SelfAttention.", "layer.1.DenseReluDense."
    rest = {
        "norm1": "layer.0.layer_norm",
        "norm2": "layer.1.layer_norm",
        "pos_embedding.embedding": attention + "relative_attention_bias",
        "ffn.gate.0": ffn + "wi_0",
        "ffn.fc1": ffn + "wi_1",
        "ffn.fc2": ffn + "wo",
    }
    rest |= {f"attn.{letter}": attention + letter for letter in "qkvo"}
    return f"encoder.block.{parts[1]}.{rest['.'.join(parts[2:-1])]}.weight"


def test_the_round_trip_is_exact_and_the_config_is_read_back():
    weights, params = official_weights()
    shapes = {name: array.shape for name, array in weights.items()}
    assert len(shapes) == 2 + 10 * SMALL.num_layers
    assert config_from_shapes(shapes) == SMALL
    back, report = convert(weights, TABLE, TARGET)
    assert len(report.used) == len(shapes) and not report.ignored
    for path, array in params.items():
        np.testing.assert_array_equal(back[path], array)


@pytest.mark.parametrize(
    "embeddings",
    [("shared",), ("encoder.embed_tokens",), ("shared", "encoder.embed_tokens")],
    ids="-".join,
)
def test_transformers_names_mean_the_same(embeddings):
    weights, params = official_weights()
    renamed = {transformers_name(name): array for name, array in weights.items()}
    embedding = renamed.pop("shared.weight")
    renamed |= {f"{name}.weight": embedding.copy() for name in embeddings}
    back, report = convert(official_names(renamed), TABLE, TARGET)
    assert len(report.used) == len(weights)
    assert list(report.ignored) == ["encoder.embed_tokens.weight"] * (len(embeddings) - 1)
    for path, array in params.items():
        np.testing.assert_array_equal(back[path], array)
    shapes = {name: array.shape for name, array in renamed.items()}
    assert len(check(official_names(shapes), TABLE, TARGET).used) == len(weights)


def test_a_whole_transformers_model_loses_its_decoder_with_a_reason():
    weights, _ = official_weights()
    weights["decoder.block.0.layer.0.SelfAttention.q.weight"] = np.zeros((8, 6), np.float32)
    weights["lm_head.weight"] = np.zeros((9, 6), np.float32)
    _, report = convert(official_names(weights), TABLE, TARGET)
    assert len(report.ignored) == 2 and all("decoder" in r for r in report.ignored.values())


def test_official_names_stay():
    weights, _ = official_weights()
    assert list(official_names(weights)) == list(weights)


def test_official_arguments_and_transformers_config_mean_the_published_size():
    official = {
        "vocab_size": 256384,
        "dim": 4096,
        "dim_attn": 4096,
        "dim_ffn": 10240,
        "num_heads": 64,
        "num_layers": 24,
        "num_buckets": 32,
        "max_dist": 128,
        "shared_pos": False,
        "dropout": 0.1,
    }
    transformers = {
        "model_type": "umt5",
        "vocab_size": 256384,
        "d_model": 4096,
        "d_kv": 64,
        "d_ff": 10240,
        "num_heads": 64,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "layer_norm_epsilon": 1e-6,
        "feed_forward_proj": "gated-gelu",
        "architectures": ["UMT5EncoderModel"],
    }
    types = {"dtype": "bfloat16", "param_dtype": "bfloat16"}
    assert config_from(official, **types) == config_from(transformers, **types) == umt5_xxl()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shared_pos": True}, "shared_pos = True"),
        ({"model_type": "t5"}, "model_type = 't5'"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj = 'relu'"),
        ({"num_heads": 3}, "not a multiple of 3 heads"),
    ],
)
def test_what_is_not_implemented_is_refused(change, message):
    values = {"vocab_size": 9, "dim": 6, "dim_attn": 8, "dim_ffn": 10, "num_heads": 2}
    values |= {"num_layers": 3, "num_buckets": 8, "max_dist": 128}
    assert config_from(values) == SMALL
    with pytest.raises(ValueError, match=message):
        config_from(values | change)


def test_other_checkpoints_are_named_as_such():
    with pytest.raises(ValueError, match="not the official names of a UMT5"):
        config_from_shapes({"decoder.conv1.weight": (3, 3)})
    with pytest.raises(ValueError, match=r"lacks.*d_model"):
        config_from({"vocab_size": 3})
