import json
import pickle
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from conversion import convert, export, inspect
from conversion.networks import NETWORKS
from conversion.readers import SafetensorsFile, open_weights
from conversion.wan_dit import MergedLora
from jax_avatar.models.network import flatten
from jax_avatar.training.base_weights import StageWeights, check_not_merged, merge_record
from jax_avatar.weights.files import load_json, load_weights
from jax_avatar.weights.orbax import StoredWeights
from tests.conversion import official


@pytest.fixture(scope="module")
def download(tmp_path_factory):
    """A folder laid out as the downloads are."""
    root = tmp_path_factory.mktemp("ckpt")
    official.write_dit(root / "Wan2.2-S2V-14B")
    save_file(official.vae_weights(), root / "Wan2.2-S2V-14B" / "Wan2.1_VAE.safetensors")
    text = root / "Wan2.2-S2V-14B" / "models_t5_umt5-xxl-enc.safetensors"
    save_file(official.text_weights(), text)
    (root / "Wan2.2-S2V-14B" / "google" / "umt5-xxl").mkdir(parents=True)
    (root / "Wan2.2-S2V-14B" / "google" / "umt5-xxl" / "spiece.model").write_bytes(b"pieces")
    official.write_speech(root / "Wan2.2-S2V-14B" / "wav2vec2-large-xlsr-53-english")
    (root / "LiveAvatar").mkdir()
    save_file(official.lora_weights(), root / "LiveAvatar" / "liveavatar.safetensors")
    return root


def run(*arguments):
    return convert.main([str(a) for a in arguments])


def exported(folder, out, **options):
    files, _ = export.export_network(folder, out, **options)
    return open_weights(files[-1])


def assert_same_bits(got, expected):
    assert set(got) == set(expected)
    for name in expected:
        assert got[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(got[name], expected[name], err_msg=name)


def test_everything_below_a_folder_comes_back_bit_for_bit(download, tmp_path, capsys):
    assert run("all", "--src", download, "--out", tmp_path / "model") == 0
    told = capsys.readouterr().out
    tensors = official.dit_weights()
    assert f"{len(tensors)} tensors used, 0 ignored, none missing" in told
    content = load_json(tmp_path / "model" / "config.json")
    assert (content["dit"], content["vae"], content["lora"]) == ("wan_s2v", "wan", "lora")
    assert merge_record(tmp_path / "model") == {"merged": []}
    assert content["stream"]["fps"] == 25 and content["text"] == "umt5"
    assert (tmp_path / "model" / "text_tokenizer" / "spiece.model").read_bytes() == b"pieces"
    assert_same_bits(exported(tmp_path / "model" / "text", tmp_path / "t"), official.text_weights())
    back = exported(tmp_path / "model" / "dit", tmp_path / "back", shard_gb=2e-4)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    assert_same_bits(back, tensors)
    assert_same_bits(exported(tmp_path / "model" / "vae", tmp_path / "v"), official.vae_weights())
    speech, ignored = export.export_network(tmp_path / "model" / "speech", tmp_path / "s")
    assert not ignored
    assert_same_bits(open_weights(speech[0]), official.speech_weights())
    lora = exported(tmp_path / "model" / "lora", tmp_path / "l")
    assert_same_bits(lora, official.lora_weights())


def test_an_older_spelling_comes_back_as_it_was(tmp_path):
    names = {"parametrizations.weight.original0": "weight_g"}
    names |= {"parametrizations.weight.original1": "weight_v"}
    source = official.speech_weights()
    for new, old in names.items():
        source = {name.replace(new, old): array for name, array in source.items()}
    assert sum("weight_g" in name or "weight_v" in name for name in source) == 2
    folder = official.write_speech(tmp_path / "src")
    save_file(source, folder / "model.safetensors")
    assert run("wav2vec2", "--src", folder, "--out", tmp_path / "model") == 0
    assert_same_bits(exported(tmp_path / "model" / "speech", tmp_path / "back"), source)


def test_sixteen_bits_come_back_as_they_were(tmp_path):
    weights = {n: a.astype(ml_dtypes.bfloat16) for n, a in official.dit_weights().items()}
    official.write_dit(tmp_path / "src", weights)
    assert run("wan_s2v", "--src", tmp_path / "src", "--out", tmp_path / "model") == 0
    assert_same_bits(exported(tmp_path / "model" / "dit", tmp_path / "back"), weights)


def test_a_merged_adapter_is_in_the_weights(download, tmp_path):
    adapter = download / "LiveAvatar" / "liveavatar.safetensors"
    source = download / "Wan2.2-S2V-14B"
    out = tmp_path / "model"
    assert run("wan_s2v", "--src", source, "--out", out, "--lora", adapter, "--merge") == 0
    back = exported(out / "dit", tmp_path / "back")
    merged = MergedLora(official.dit_weights(), official.lora_weights())
    assert_same_bits(back, dict(merged.items()))
    (record,) = StoredWeights(out / "dit").metadata["merged"]
    assert (record["file"], record["scaling"]) == ("liveavatar.safetensors", 0.5)
    with pytest.raises(ValueError, match=r"liveavatar\.safetensors was merged .*without --merge"):
        check_not_merged(StageWeights(str(out)))
    assert not (out / "lora").exists()


@pytest.mark.parametrize("dtype", ["int8", "fp8"])
def test_eight_bits_are_near_and_cannot_be_exported(download, tmp_path, dtype, capsys):
    source, out = download / "Wan2.2-S2V-14B", tmp_path / "model"
    assert run("wan_s2v", "--src", source, "--out", out, "--dtype", dtype) == 0
    stored = StoredWeights(out / "dit")
    assert stored.config["weights"] == dtype
    ours = flatten(stored.restore())
    path = "blocks/ffn_in/kernel"
    near = ours[path].astype(np.float32) * ours[f"{path}_scale"][:, None]
    theirs = np.stack([official.dit_weights()[f"blocks.{i}.ffn.0.weight"].T for i in range(4)])
    np.testing.assert_allclose(near, theirs, atol=0.04 * np.abs(theirs).max())
    assert export.main([str(out / "dit"), "--out", str(tmp_path / "back")]) == 2
    assert "rounded" in capsys.readouterr().err


def test_an_interrupted_conversion_goes_on(download, tmp_path, monkeypatch):
    source, out = download / "Wan2.2-S2V-14B", tmp_path / "model"
    real, written = convert.ResumableCheckpointWriter.write, []

    def write(self, label, parts):
        if len(written) == 20:
            raise KeyboardInterrupt
        written.append(label)
        real(self, label, parts)

    monkeypatch.setattr(convert.ResumableCheckpointWriter, "write", write)
    assert run("wan_s2v", "--src", source, "--out", out) == 130
    assert not (out / "dit").exists() and not (out / "config.json").exists()
    first = list(written)
    monkeypatch.setattr(
        convert.ResumableCheckpointWriter,
        "write",
        lambda self, *a: (written.append(a[0]), real(self, *a)),
    )
    assert run("wan_s2v", "--src", source, "--out", out) == 0
    assert len(written) == len(official.dit_weights()) and written[:20] == first
    assert_same_bits(exported(out / "dit", tmp_path / "back"), official.dit_weights())


def test_a_full_disk_is_said_and_the_conversion_goes_on(download, tmp_path, capsys):
    source, out = download / "Wan2.2-S2V-14B", tmp_path / "a b ü"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # as a full disk, for one file
    try:
        assert run("wan_s2v", "--src", source, "--out", out) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch(r"error: .*cannot be written: File too large; repeat .* to go on\.", told)
    assert [path.name for path in out.iterdir()] == [".dit.partial"]
    assert run("wan_s2v", "--src", source, "--out", out) == 0
    assert_same_bits(exported(out / "dit", tmp_path / "back"), official.dit_weights())


_KILLED = """
import os, signal, sys
from conversion import convert
write, left = convert.ResumableCheckpointWriter.write, [20]
def write_or_die(self, label, parts):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, label, parts)
convert.ResumableCheckpointWriter.write = write_or_die
convert.main(sys.argv[1:])
"""


def test_a_killed_conversion_leaves_nothing_that_loads_and_goes_on(download, tmp_path):
    arguments = ["wan_s2v", "--src", download / "Wan2.2-S2V-14B", "--out", tmp_path / "model"]
    killed = subprocess.run([sys.executable, "-c", _KILLED, *map(str, arguments)])
    assert killed.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "model").iterdir()] == [".dit.partial"]
    with pytest.raises(ValueError, match="holds no weights of 'dit'"):
        load_weights(tmp_path / "model", "dit")
    assert run(*arguments) == 0
    assert_same_bits(exported(tmp_path / "model" / "dit", tmp_path / "b"), official.dit_weights())


def broken(kind):
    """A transformer with one thing wrong."""
    weights, name = official.dit_weights(), "blocks.0.ffn.0.weight"
    if kind == "extra":
        weights["blocks.0.colour"] = np.ones(3, np.float32)
    elif kind == "renamed":
        weights["blocks.0.ffn.zero.weight"] = weights.pop(name)
    elif kind == "missing":
        del weights[name]
    elif kind == "shape":
        weights[name] = weights[name][:-1].copy()
    elif kind == "integers":
        weights[name] = weights[name].astype(np.int32)
    elif kind == "nan":
        weights[name][3, 2] = np.nan
    elif kind == "mixed":
        weights[name] = weights[name].astype(np.float16)
    return weights


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("extra", r"1 unused source tensors.*\n  blocks\.0\.colour"),
        (
            "renamed",
            r"blocks\.0\.ffn\.zero\.weight.*no rule(.|\n)*unfilled(.|\n)*ffn_in/kernel\[0\]",
        ),
        (
            "missing",
            r"unfilled parameters.*\n  blocks/ffn_in/kernel\[0\].*no blocks\.0\.ffn\.0\.weight",
        ),
        ("shape", r"shapes that do not fit.*\n  blocks\.0\.ffn\.0\.weight"),
        ("integers", r"holds int32, expected floating-point|different types"),
        ("nan", r"blocks\.0\.ffn\.0\.weight holds NaN"),
        ("mixed", r"different types.*--dtype bf16"),
    ],
)
def test_a_broken_file_gets_its_own_error_and_leaves_nothing(tmp_path, capsys, kind, message):
    official.write_dit(tmp_path / "src", broken(kind))
    assert run("wan_s2v", "--src", tmp_path / "src", "--out", tmp_path / "model") == 2
    told = capsys.readouterr().err
    assert re.search(message, told), told
    assert not list((tmp_path / "model").glob("*")) and not list((tmp_path / "model").glob(".*"))


def test_a_cut_off_shard_is_named(tmp_path, capsys):
    folder = official.write_dit(tmp_path / "src")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-100])
    assert run("wan_s2v", "--src", folder, "--out", tmp_path / "model") == 2
    assert shard.name in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["wan_s2v", "--src", "nowhere"], "no such file"),
        (["vae", "--src", "LiveAvatar"], r"no weights of vae; found: .*live_avatar"),
        (["all", "--src", "empty"], "download them first"),
        (["vae", "--src", "Wan2.2-S2V-14B", "--dtype", "int8"], "only the transformer"),
    ],
)
def test_what_cannot_be_converted_is_said(download, tmp_path, capsys, arguments, message):
    (download / "empty").mkdir(exist_ok=True)
    arguments[2] = str(download / arguments[2])
    assert run(*arguments, "--out", tmp_path / "model") == 2
    told = capsys.readouterr().err
    assert re.search(message, told), told


def test_files_that_would_run_code_are_passed_over(download, tmp_path, capsys):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "owned"), "w"))

    folder = tmp_path / "src"
    shutil.copytree(download / "LiveAvatar", folder)
    with zipfile.ZipFile(folder / "training_args.bin", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"w": Evil()}))
    assert run("live_avatar", "--src", folder, "--out", tmp_path / "model") == 0
    assert run("live_avatar", "--src", folder / "training_args.bin", "--out", tmp_path / "m") == 2
    assert "only tensors and dictionaries are read" in capsys.readouterr().err
    assert run("vae", "--src", folder, "--out", tmp_path / "m") == 2
    assert not (tmp_path / "owned").exists()


def test_the_adapter_of_another_size_is_refused(download, tmp_path, capsys):
    stray = {
        "blocks.9.self_attn.q.lora_A.default.weight": np.ones((2, 64), np.float32),
        "blocks.9.self_attn.q.lora_B.default.weight": np.ones((64, 2), np.float32),
    }
    save_file(stray, tmp_path / "stray.safetensors")
    source, adapter = download / "Wan2.2-S2V-14B", tmp_path / "stray.safetensors"
    arguments = ["wan_s2v", "--src", source, "--out", tmp_path / "m", "--lora", adapter, "--merge"]
    assert run(*arguments) == 2
    assert "blocks.9.self_attn.q.lora_A" in capsys.readouterr().err


def test_inspect_tells_what_is_there(download, tmp_path, capsys):
    run("all", "--src", download, "--out", tmp_path / "model")
    capsys.readouterr()
    assert inspect.main([str(download)]) == 0
    told = capsys.readouterr().out
    assert "wan_s2v; " in told and "live_avatar; " in told and "vae; " in told
    assert "Apache-2.0" in told and "0 ignored" in told
    assert inspect.main([str(tmp_path / "model")]) == 0
    assert "float32 100%" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "model" / "vae")
    assert inspect.main([str(tmp_path / "model")]) == 1
    assert "vae: named in config.json, but MISSING" in capsys.readouterr().out
    assert inspect.main([str(tmp_path / "nowhere")]) == 2


def test_inspect_says_why_a_download_is_not_usable(tmp_path, capsys):
    official.write_dit(tmp_path / "src", broken("missing"))
    assert inspect.main([str(tmp_path / "src")]) == 1
    assert "NOT USABLE" in capsys.readouterr().out


def test_every_network_is_recognised_by_its_own_names_only(download):
    for kind in NETWORKS.values():
        marked = [
            other.name
            for other in NETWORKS.values()
            if any(name.endswith(kind.marks) for name in official_names(other.name))
        ]
        assert marked == [kind.name]


def official_names(name):
    tables = {
        "wan_s2v": official.dit_weights,
        "vae": official.vae_weights,
        "umt5": official.text_weights,
        "live_avatar": official.lora_weights,
        "wav2vec2": official.speech_weights,
    }
    return tables[name]()


def test_exported_files_are_plain_safetensors(download, tmp_path):
    run("vae", "--src", download / "Wan2.2-S2V-14B", "--out", tmp_path / "model")
    files, _ = export.export_network(tmp_path / "model" / "vae", tmp_path / "back")
    from safetensors.numpy import load_file

    assert_same_bits(load_file(files[0]), official.vae_weights())
    (length,) = struct.unpack("<Q", files[0].read_bytes()[:8])
    assert json.loads(files[0].read_bytes()[8 : 8 + length])["__metadata__"] == {"format": "pt"}
    assert SafetensorsFile(files[0]).metadata == {"format": "pt"}
    data = bytearray(files[0].read_bytes())
    data[-1] ^= 1  # still a finite number
    files[0].write_bytes(data)
    assert run("vae", "--src", files[0], "--out", tmp_path / "again") == 2
