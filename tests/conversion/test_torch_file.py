import collections
import io
import os
import pickle
import sys
import types
import zipfile

import ml_dtypes
import numpy as np
import pytest

from conversion import convert, export
from conversion.readers import open_weights
from conversion.torch_file import TorchFile
from tests.conversion import official

KINDS = {"float32": "FloatStorage", "bfloat16": "BFloat16Storage", "int64": "LongStorage"}


def placeholder(module, name):
    """Something that pickles as `module.name`, as PyTorch's own classes do."""
    return type(name, (), {"__module__": module, "__qualname__": name})


class Call:
    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


@pytest.fixture
def torch_names(monkeypatch):
    """Importable stand-ins while the file is written; reading happens without them."""
    modules = {"torch": types.ModuleType("torch"), "torch._utils": types.ModuleType("torch._utils")}
    for name in KINDS.values():
        setattr(modules["torch"], name, placeholder("torch", name))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        setattr(modules["torch._utils"], name, placeholder("torch._utils", name))
    for name, module in modules.items():
        monkeypatch.setitem(sys.modules, name, module)
    return modules


def write(path, modules, tensors, *, protocol=2, extra=None, wrap=lambda weights: weights):
    """Writes `name -> (storage, offset, shape, strides)` as PyTorch's zip format."""
    storages = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            if not isinstance(value, np.ndarray):
                return None
            kind = getattr(modules["torch"], KINDS[value.dtype.name])
            key = next((k for k, seen in storages.items() if seen is value), str(len(storages)))
            storages[key] = value
            return "storage", kind, key, "cpu", value.size

    rebuild = modules["torch._utils"]._rebuild_tensor_v2
    weights = collections.OrderedDict(
        (name, Call(rebuild, *view, False, collections.OrderedDict()))
        for name, view in tensors.items()
    )
    if extra is not None:
        weights["extra"] = extra
    weights._metadata = {"version": 1}
    buffer = io.BytesIO()
    Pickler(buffer, protocol).dump(wrap(weights))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", buffer.getvalue())
        for key, storage in storages.items():
            archive.writestr(f"archive/data/{key}", storage.tobytes())
    for name in modules:
        del sys.modules[name]


@pytest.mark.parametrize("protocol", [2, 4])
def test_tensors_are_views_of_their_storages(tmp_path, torch_names, protocol):
    base = np.arange(24, dtype=np.float32)
    half = np.arange(4).astype(ml_dtypes.bfloat16)
    tensors = {
        "plain": (base, 0, (2, 3, 4), (12, 4, 1)),
        "transposed": (base, 6, (3, 2), (1, 3)),
        "half": (half, 1, (3,), (1,)),
        "scalar": (np.array([7]), 0, (), ()),
    }
    write(tmp_path / "x.pth", torch_names, tensors, protocol=protocol)
    weights = open_weights(tmp_path / "x.pth")
    assert weights.shapes == {name: view[2] for name, view in tensors.items()}
    np.testing.assert_array_equal(weights["plain"], base.reshape(2, 3, 4))
    np.testing.assert_array_equal(weights["transposed"], base[6:12].reshape(2, 3).T)
    np.testing.assert_array_equal(weights["half"], half[1:])
    assert weights["half"].dtype == ml_dtypes.bfloat16 and weights["scalar"] == 7


def test_a_state_dict_inside_a_checkpoint_is_found(tmp_path, torch_names):
    view = (np.ones(2, np.float32), 0, (2,), (1,))
    wrap = lambda weights: {"state_dict": weights, "step": 3}  # noqa: E731
    write(tmp_path / "x.pth", torch_names, {"w": view}, wrap=wrap)
    assert list(TorchFile(tmp_path / "x.pth")) == ["w"]


def test_a_file_that_wants_to_call_something_is_refused_and_nothing_is_called(
    tmp_path, torch_names
):
    trace = tmp_path / "trace"
    write(tmp_path / "x.pth", torch_names, {}, extra=Call(os.mkdir, str(trace)))
    with pytest.raises(ValueError, match=r"asks to call .* mkdir"):
        TorchFile(tmp_path / "x.pth")
    assert not trace.exists()


def test_a_view_outside_its_storage_is_refused(tmp_path, torch_names):
    view = (np.ones(4, np.float32), 1, (4,), (1,))
    write(tmp_path / "x.pth", torch_names, {"w": view})
    with pytest.raises(ValueError, match="w reaches outside"):
        TorchFile(tmp_path / "x.pth")["w"]


def test_other_content_is_refused(tmp_path, torch_names):
    write(tmp_path / "x.pth", torch_names, {}, extra=3)
    with pytest.raises(ValueError, match=r"\['extra'\] are not tensors"):
        TorchFile(tmp_path / "x.pth")
    (tmp_path / "y.pth").write_bytes(pickle.dumps({"w": 1}))
    with pytest.raises(ValueError, match="not a readable file of weights"):
        TorchFile(tmp_path / "y.pth")


def test_a_compressed_file_reads_the_same(tmp_path, torch_names):
    base = np.arange(24, dtype=np.float32)
    write(tmp_path / "x.pth", torch_names, {"w": (base, 4, (3, 4), (4, 1))})
    with (
        zipfile.ZipFile(tmp_path / "x.pth") as plain,
        zipfile.ZipFile(tmp_path / "y.pth", "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    for file in ("x.pth", "y.pth"):
        np.testing.assert_array_equal(TorchFile(tmp_path / file)["w"], base[4:16].reshape(3, 4))


def test_the_official_vae_converts_from_its_pth_and_comes_back(tmp_path, torch_names):
    weights = official.vae_weights()
    views = {
        name: (array.ravel(), 0, array.shape, tuple(s // 4 for s in array.strides))
        for name, array in weights.items()
    }
    write(tmp_path / "Wan2.1_VAE.pth", torch_names, views)
    model = tmp_path / "model"
    assert convert.main(["vae", "--src", str(tmp_path), "--out", str(model)]) == 0
    files, _ = export.export_network(model / "vae", tmp_path / "back")
    back = open_weights(files[0])
    assert set(back) == set(weights)
    for name, array in weights.items():
        np.testing.assert_array_equal(back[name], array)


def test_damage_anywhere_is_an_error_and_never_other_numbers(tmp_path, torch_names):
    path, base = tmp_path / "x.pth", np.arange(24, dtype=np.float32)
    write(
        path, torch_names, {"w": (base, 4, (3, 4), (4, 1)), "v": (base[:5].copy(), 0, (5,), (1,))}
    )
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    expected = {name: np.array(array) for name, array in TorchFile(path).items()}
    refused = 0
    for _ in range(300):
        data = bytearray(whole)
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        try:
            found = dict(TorchFile(path))
        except ValueError as error:
            refused += 1
            assert "x.pth" in str(error)
            continue
        if found.keys() == expected.keys() and [a.shape for a in found.values()] == [(3, 4), (5,)]:
            for array in found.values():
                if array.dtype == np.float32:
                    assert set(array.ravel()) <= set(base)
    assert refused > 200
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"x\.pth"):
        TorchFile(path)
