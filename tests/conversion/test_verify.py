import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from conversion.cases import Check, compare
from conversion.rules import export
from conversion.verify import main
from conversion.wan_vae import TABLE
from jax_avatar.models.config import WanVAEConfig
from jax_avatar.models.network import Network, flatten, unflatten
from jax_avatar.models.vae.wan import WanVAE

GOLDEN = Path(__file__).parents[1] / "golden"


def rows(text):
    return [line for line in text.splitlines() if " FAIL" in line or " ok " in line]


@pytest.mark.parametrize("stem", [pytest.param("vae_a", marks=pytest.mark.slow), "vae_b"])
def test_the_vae_reproduces_every_official_number(tmp_path, capsys, stem):
    files = sorted((GOLDEN / "vae").glob(f"{stem}_*.safetensors"))
    for path in files:
        (tmp_path / path.name).symlink_to(path)
    code = main([str(tmp_path)])
    printed = capsys.readouterr().out
    assert code == 0, [row for row in rows(printed) if "FAIL" in row]
    inputs = {"video", "image", "latents"}
    for path in files:
        if "weights" not in path.name:
            for name in set(load_file(path)) - inputs:
                assert f" {name} " in printed, f"{name} was not verified"


def test_the_published_checkpoint_fits_our_network(tmp_path, capsys):
    manifest = GOLDEN / "vae" / "manifest_wan21_vae.json"
    shutil.copy(manifest, tmp_path)
    assert main([str(tmp_path)]) == 0
    assert "194 tensors used, 0 ignored" in capsys.readouterr().out
    shapes = json.loads(manifest.read_text())
    shapes["decoder.head.2.weight"][0] = 4
    (tmp_path / manifest.name).write_text(json.dumps(shapes))
    assert main([str(tmp_path)]) == 1
    assert "decoder.head.2.weight" in capsys.readouterr().out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A case of another size, made with our own network: other strides, channels, streams."""
    values = {"dim": 2, "z_dim": 3, "dim_mult": [1, 2], "num_res_blocks": 1}
    values |= {"temperal_downsample": [True], "attn_scales": [], "dropout": 0.0}
    mean, std = (0.5, 0.1, -0.2), (1.5, 0.5, 1.0)
    config = WanVAEConfig(
        2, 3, (1, 2), 1, temporal_downsample=(True,), latent_mean=mean, latent_std=std
    )
    network = Network.abstract(WanVAE, config)
    target = network.params
    rng = np.random.default_rng(0)
    params = {
        path: rng.normal(size=leaf.shape).astype(np.float32)
        for path, leaf in flatten(target).items()
    }
    image = jnp.asarray(rng.uniform(-1, 1, (1, 1, 4, 6, 3)), jnp.float32)
    latents = jnp.asarray(rng.normal(size=(1, 3, 2, 3, 3)), jnp.float32)

    @jax.jit
    def outputs(params):
        vae = network.bind(params)
        return vae.encode(image), vae.decode_first(latents[:, :1])[0], vae.decode(latents)

    with jax.default_matmul_precision("highest"):
        encoded, single, decoded = map(np.asarray, outputs(unflatten(params)))
    io = {
        "latent_mean": np.float32(mean),
        "latent_std": np.float32(std),
        "image": image,
        "latents": latents,
        "enc_image_norm": encoded,
        "dec_single_latent_raw": single,
        "stream_odd.chunk0_raw": decoded[:, :1],
        "stream_odd.chunk1_raw": decoded[:, 1:],
    }
    folder = tmp_path_factory.mktemp("root") / "some" / "where"
    folder.mkdir(parents=True)
    metadata = {"config": json.dumps(values), "streams": json.dumps({"odd": [1, 2]})}
    weights = {f"sd.{name}": array for name, array in export(params, TABLE).items()}
    save_file(weights, folder / "other_weights.safetensors", metadata)
    io = {
        name: np.ascontiguousarray(np.moveaxis(np.array(array), -1, 1 if array.ndim == 5 else -1))
        for name, array in io.items()
    }
    save_file(io, folder / "other_io.safetensors", metadata)
    return folder


def change_io(tiny, folder, change):
    shutil.copytree(tiny, folder, dirs_exist_ok=True)
    io = load_file(folder / "other_io.safetensors")
    change(io)
    config = {"dim": 2, "z_dim": 3, "dim_mult": [1, 2], "num_res_blocks": 1}
    config |= {"temperal_downsample": [True]}
    metadata = {"config": json.dumps(config), "streams": json.dumps({"odd": [1, 2]})}
    save_file(io, folder / "other_io.safetensors", metadata)


def test_a_case_of_another_size_is_found_by_its_metadata(tiny, capsys):
    assert main([str(tiny.parents[1])]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1].startswith("ok: 1 cases, 7 checks, 7 within tolerance")


def test_a_corrupted_tensor_fails_and_only_that_one(tiny, tmp_path, capsys):
    def corrupt(io):
        io["enc_image_norm"][0, 1, 0, 1, 2] += 2e-4

    change_io(tiny, tmp_path, corrupt)
    assert main([str(tmp_path), "--failures-only"]) == 1
    out = capsys.readouterr().out
    assert len(rows(out)) == 1 and "enc_image_norm" in rows(out)[0]
    error = float(rows(out)[0].split("enc_image_norm")[1].split()[0])
    assert error == pytest.approx(2e-4, rel=0.05)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda io: io.update(surprise=np.zeros(3, np.float32)), "unknown tensor"),
        (lambda io: io.pop("stream_odd.chunk1_raw"), "not in the file"),
        (lambda io: io["dec_single_latent_raw"].fill(np.nan), "nan"),
        (lambda io: io.pop("latents"), "latents"),
    ],
)
def test_what_cannot_be_compared_fails(tiny, tmp_path, capsys, change, told):
    change_io(tiny, tmp_path, change)
    assert main([str(tmp_path)]) == 1
    assert any(told in row and "FAIL" in row for row in rows(capsys.readouterr().out))


def test_missing_weights_fail(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "other_weights.safetensors"
    weights = load_file(path)
    del weights["sd.decoder.head.0.gamma"]
    config = json.dumps(
        {"dim": 2, "z_dim": 3, "dim_mult": [1, 2], "num_res_blocks": 1}
        | {"temperal_downsample": [True]}
    )
    save_file(weights, path, {"config": config})
    assert main([str(tmp_path)]) == 1
    assert "no decoder.head.0.gamma" in capsys.readouterr().out


def test_a_file_nobody_knows_fails(tmp_path, capsys):
    save_file({"x": np.zeros(2, np.float32)}, tmp_path / "mystery.safetensors")
    assert main([str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "mystery.safetensors" in out and "no kind of case knows this file" in out


def test_a_broken_file_fails_and_does_not_hide_the_others(tiny, tmp_path, capsys):
    shutil.copytree(tiny, tmp_path, dirs_exist_ok=True)
    (tmp_path / "broken.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not json........")
    (tmp_path / "broken.json").write_text("{")
    assert main([str(tmp_path)]) == 1
    failed = [row for row in rows(capsys.readouterr().out) if "FAIL" in row]
    assert len(failed) == 2 and all("broken" in row for row in failed)


def test_a_folder_without_cases_fails(tmp_path, capsys):
    assert main([str(tmp_path)]) == 1
    assert "no golden case" in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_explained(tmp_path, capsys):
    assert main([str(tmp_path / "absent")]) == 2
    assert "is not a folder" in capsys.readouterr().err


def test_compare_judges_the_worst_element():
    expected = np.array([0.0, 100.0])
    assert compare("x", expected + np.array([0.0, 0.9]), expected, 1e-4, rtol=1e-2).passed
    check = compare("x", expected + np.array([0.1, 0.9]), expected, 1e-4, rtol=1e-2)
    assert not check.passed and check.error == pytest.approx(0.1)
    assert compare("x", expected, expected, 0.0).passed
    assert not compare("x", expected + np.array([0, 1e-9]), expected, 0.0).passed
    assert not compare("x", expected[:1], expected, 1.0).passed
    assert not compare("x", jnp.array([jnp.nan, 100.0]), expected, 1.0).passed
    assert not Check("x", float("nan"), float("inf")).passed
