"""Downloads that are not whole: each is named as what it is, by every command that reads it."""

import json
import pickle
import shutil
import struct
import zipfile

import pytest

from conversion import convert, export, inspect, verify
from tests.conversion import official

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
INDEX = "diffusion_pytorch_model.safetensors.index.json"


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return official.write_dit(tmp_path_factory.mktemp("whole"), shards=2)


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "download")


def zipped(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    return path.read_bytes()


def header(content, data=b"\0" * 8):
    text = json.dumps(content).encode()
    return struct.pack("<Q", len(text)) + text + data


def all_say(folder, message, capsys, tmp_path):
    """Every command ends with the message, and writes nothing."""
    for network in ("wan_s2v", "all"):
        out = tmp_path / "model"
        assert convert.main([network, "--src", str(folder), "--out", str(out)]) == 2
        assert message in capsys.readouterr().err, network
        assert not out.exists()
    code = inspect.main([str(folder)])
    told = capsys.readouterr()
    assert message in told.out + told.err
    assert code == (1 if message in told.out else 2)  # found wanting, or not readable at all


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (POINTER.decode(), "is a Git LFS pointer"),
        ("", "is empty"),
        ("<!DOCTYPE html><html>404</html>", "is a web page"),
        ('{"weight_map": {"a', "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
        ("[1]", "holds list, expected a JSON object"),
        ('{"metadata": {}}', "has no weight_map"),
        ('{"weight_map": 3}', "has no weight_map"),
        ('{"weight_map": {}}', "has no weight_map"),
        ('{"weight_map": {"a": 3}}', "names the shard 3"),
        ('{"weight_map": {"a": ["m.safetensors"]}}', "names the shard ['m.safetensors']"),
        ('{"weight_map": {"a": "../secret.safetensors"}}', "names the shard '../secret"),
        ('{"weight_map": {"a": "/etc/x.safetensors"}}', "names the shard '/etc/x"),
        ('{"weight_map": {"a": "m-00001-of-00002.safetensors"}}', "1 of 1 shards are missing: m-"),
    ],
)
def test_a_strange_index_is_named_by_every_command(folder, tmp_path, capsys, text, message):
    (folder / INDEX).write_text(text)
    all_say(folder, message, capsys, tmp_path)


def test_shards_without_their_index_are_named(folder, tmp_path, capsys):
    (folder / INDEX).unlink()
    all_say(folder, f"is one shard of several; name their index, {INDEX}", capsys, tmp_path)


def test_a_missing_shard_is_named_with_the_downloads_that_are_unfinished(folder, tmp_path, capsys):
    shard = sorted(folder.glob("*.safetensors"))[1]
    cache = folder / ".cache" / "huggingface" / "download"
    cache.mkdir(parents=True)
    shard.rename(cache / f"{shard.name}.incomplete")
    message = f"1 of 2 shards are missing: {shard.name}, and 1 downloads are unfinished"
    all_say(folder, message, capsys, tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (POINTER, "is a Git LFS pointer"),
        (b"", "is empty"),
        (b"\n <html><body>Sign in</body></html>", "is a web page"),
        (b"Invalid username or password.", "is text that begins with 'Invalid username"),
        (b'{"error": "Repository not found"}', "is text that begins with"),
        (pickle.dumps({"a": 1}), "is a pickle, which is never loaded"),
        (zipped, "is a zip archive"),
        (lambda path: path.read_bytes()[:4], "is not a readable safetensors file"),
        (lambda path: path.read_bytes()[:40], "is not a readable safetensors file"),
        (lambda path: path.read_bytes()[:-100], "is cut off"),
        (lambda path: path.read_bytes() + b"\0", "its header expects"),
        (lambda path: b"\xff" * 8 + path.read_bytes()[8:], "is not a readable safetensors file"),
        (header({"a": {"dtype": "F4", "shape": [2], "data_offsets": [0, 8]}}), "not a readable"),
        (header({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}), "does not fit"),
        (header({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, -8]}}), "has shape"),
        (header({"a": {"dtype": "F32", "shape": 2, "data_offsets": [0, 8]}}), "not a readable"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}), "begins at byte 4"),
        (header(["a"]), "is not a readable safetensors file"),
    ],
)
def test_a_shard_that_is_something_else_is_named(folder, tmp_path, capsys, content, message):
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(content(shard) if callable(content) else content)
    all_say(folder, message, capsys, tmp_path)


def test_one_broken_file_does_not_hide_another_network(folder, tmp_path, capsys):
    (folder / "Wan2.1_VAE.pth").write_bytes(POINTER)
    assert inspect.main([str(folder)]) == 1
    told = capsys.readouterr().out
    assert "Wan2.1_VAE.pth is a Git LFS pointer" in told and "wan_s2v; " in told
    out = tmp_path / "model"
    assert convert.main(["wan_s2v", "--src", str(folder), "--out", str(out)]) == 0


def test_a_broken_config_beside_the_weights_is_named(folder, tmp_path, capsys):
    (folder / "config.json").write_bytes(POINTER)
    all_say(folder, "config.json is a Git LFS pointer", capsys, tmp_path)


def test_an_unfinished_file_is_named(folder, tmp_path, capsys):
    file = folder / "x.safetensors.incomplete"
    file.write_bytes(b"\0" * 100)
    assert inspect.main([str(file)]) == 2
    assert "is an unfinished download" in capsys.readouterr().err
    assert inspect.main([str(folder)]) == 1
    assert "unfinished download" in capsys.readouterr().out


def test_verify_names_pointers(tmp_path, capsys):
    (tmp_path / "a.safetensors").write_bytes(POINTER)
    (tmp_path / "b.json").write_bytes(POINTER)
    assert verify.main([str(tmp_path)]) == 1
    assert capsys.readouterr().out.count("is a Git LFS pointer") == 2


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_numbers_that_are_none_are_refused(tmp_path, capsys, number):
    places = ["--src", str(tmp_path), "--out", str(tmp_path / "model")]
    assert convert.main(["wan_s2v", *places, "--lora-scaling", number]) == 2
    assert f"--lora-scaling {number}: expected a finite" in capsys.readouterr().err
    for size in (number, "0", "-1"):
        assert export.main([str(tmp_path), "--out", str(tmp_path / "o"), f"--shard-gb={size}"]) == 2
        assert "--shard-gb" in capsys.readouterr().err


def test_weights_without_a_number_are_told_of(tmp_path, capsys):
    (tmp_path / "m.safetensors").write_bytes(
        header({"a": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}, b"")
    )
    assert inspect.main([str(tmp_path)]) == 0
    assert "1 tensors, 0 parameters" in capsys.readouterr().out
