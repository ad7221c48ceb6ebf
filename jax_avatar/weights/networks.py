"""One network of a model folder, read from disk and checked against its config.

header --> config --> structure, expected shapes --+
weights ------------------------------------------+--check_fit--> Network
"""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from jax.sharding import Mesh

from jax_avatar.models.network import Network, flatten
from jax_avatar.models.sharding import param_shardings
from jax_avatar.shapes import PyTree
from jax_avatar.weights.fields import fill_fields
from jax_avatar.weights.files import load_header, load_weights, open_weights, tree_of
from jax_avatar.weights.hashes import base_hash
from jax_avatar.weights.kinds import KINDS, find_kind
from jax_avatar.weights.orbax import StoredWeights
from jax_avatar.weights.settings import read_config

__all__ = [
    "abstract_network",
    "check_fit",
    "kind_of",
    "load_adapter",
    "load_network",
    "network_config",
    "read_adapter",
    "read_dit",
]


def kind_of(folder: str | Path, part: str) -> str:
    """Name of a network's kind.

    As `config.json` says. A stage of training writes its network alone: its kind is the one whose
    config has the fields that the network is stored with.

    Args:
        folder: that holds the network.
        part: "vae" or "speech".

    Raises:
        ValueError: there are no weights, or they are of no known network.
    """
    if (Path(folder) / "config.json").is_file():
        content = read_config(folder, ())
        if part in content:
            return content[part]
    stored = set(load_header(folder, part)[0])
    for name, kind in KINDS[part].items():
        if stored <= {field.name for field in fields(kind.config)}:
            return name
    raise ValueError(
        f"{part} in {folder} is none of {', '.join(KINDS[part])}; pass the folder of a model."
    )


def abstract_network(
    folder: str | Path, part: str, kind: str = "", *, fps: int | None = None
) -> Network:
    """A network from its header alone; parameters are `jax.ShapeDtypeStruct`.

    Arguments and errors as in `load_network`.
    """
    return _abstract(folder, part, kind or kind_of(folder, part), load_header(folder, part)[0], fps)


def network_config(folder: str | Path, part: str) -> Any:
    """Size of a network, from its header alone.

    Arguments and errors as in `load_network`.
    """
    return _config(folder, part, kind_of(folder, part), load_header(folder, part)[0])


def load_network(
    folder: str | Path, part: str, kind: str = "", *, fps: int | None = None, widen: bool = True
) -> Network:
    """Reads one network.

    Args:
        folder: that holds it.
        part: "dit", "vae", "speech" or "text".
        kind: its name, as in `config.json`; from `kind_of` if not given.
        fps: video frames per second that a speech encoder makes features for; those it is
            stored with if not given.
        widen: see `load_weights`.

    Raises:
        ValueError: there are no weights, they are of an unknown kind, or do not fit their config;
            or a speech encoder cannot make that rate.
    """
    kind = kind or kind_of(folder, part)
    find_kind(part, kind, Path(folder) / "config.json")
    if part == "dit":  # large: it goes from disk to its devices
        params, header, _ = open_weights(folder, part)
    else:
        params, header, _ = load_weights(folder, part, widen=widen)
    network = _abstract(folder, part, kind, header, fps)
    where = f"of '{part}' in {folder}"
    check_fit(tree_of(params), network.params, where, "convert or train them again.")
    return network.with_params(params)


def _config(folder: str | Path, part: str, kind: str, header: Mapping[str, Any]) -> Any:
    found = find_kind(part, kind, Path(folder) / "config.json")
    try:
        return fill_fields(found.config, header, "config")
    except (ValueError, TypeError, ArithmeticError) as error:
        raise _other_weights(folder, part, kind, error) from error


def _other_weights(folder: str | Path, part: str, kind: str, error: Exception) -> ValueError:
    return ValueError(
        f"weights of '{part}' in {folder} are not those of a {kind} {part} ({error}); pass the "
        "folder of a whole model."
    )


def _abstract(
    folder: str | Path, part: str, kind: str, header: Mapping[str, Any], fps: int | None
) -> Network:
    config = _config(folder, part, kind, header)
    found = find_kind(part, kind, Path(folder) / "config.json")
    try:
        # Sizes that are none are refused by whatever meets them first.
        network = Network.abstract(found.network, config)
    except (ValueError, TypeError, ArithmeticError, MemoryError) as error:
        raise _other_weights(folder, part, kind, error) from error
    if part == "speech" and fps:
        try:
            config = config.at_fps(fps)
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from error
        network = Network.abstract(found.network, config)
    return network


def read_dit(folder: str | Path, expected: PyTree, mesh: Mesh | None = None) -> PyTree:
    """Weights of a transformer to train; of an Orbax folder each device reads its own part.

    Args:
        folder: that holds them.
        expected: abstract parameters. The motion packer is left out where they have none.
        mesh: of the run; host arrays if not given.

    Raises:
        ValueError: they are those of another transformer.
    """
    stored, size, _ = open_weights(folder, "dit")
    unused = {name for name in tree_of(stored) if name.startswith("motion_")} - set(expected)
    used = {name: leaf for name, leaf in tree_of(stored).items() if name not in unused}
    check_fit(used, expected, f"of 'dit' in {folder}", f"set config.model to its size, {size}.")
    if not isinstance(stored, StoredWeights):
        return used
    return stored.restore(None if mesh is None else param_shardings(expected, mesh), only=set(used))


def load_adapter(folder: str | Path) -> tuple[PyTree, float, Mapping[str, Any]]:
    """Factors of the adapter `lora` in a folder, its scaling (alpha over rank) and history.

    Raises:
        ValueError: there is none, or its config has no scaling.
    """
    adapter, stored, history = load_weights(folder, "lora")
    scaling = stored.get("scaling")
    if not isinstance(scaling, int | float):
        raise ValueError(f"{folder}: 'lora' has no scaling in its config, so it is no adapter.")
    return adapter, scaling, history


def read_adapter(
    folder: str | Path, expected: PyTree, fields: Mapping[str, Any], *, base: str | Path = ""
) -> PyTree:
    """Factors of an adapter that training goes on with.

    Args:
        folder: that holds `lora`.
        expected: abstract factors.
        fields: rank and scaling that training goes on with.
        base: has the transformer that it is laid beside; not compared if not given.

    Raises:
        ValueError: there is none, or it is for another transformer or scaled otherwise, or was
            trained beside other weights than those of `base`.
    """
    adapter, scaling, history = load_adapter(folder)
    advice = "set config.task.adapter_rank and adapter_alpha as it was trained."
    check_fit(adapter, expected, f"of 'lora' in {folder}", advice)
    if scaling != fields["scaling"]:
        raise ValueError(
            f"the adapter in {folder} is scaled by {scaling}, here by "
            f"{fields['scaling']} (alpha over rank); {advice}"
        )
    if base and history.get("base", "") not in ("", base_hash(base)):
        raise ValueError(
            f"the adapter in {folder} was trained beside other weights than those of {base}; give "
            "the teacher that stage 1 started from, or train stage 1 from this one."
        )
    return adapter


def check_fit(params: PyTree, expected: PyTree, where: str, advice: str) -> None:
    """Compares weights with the shapes and types that their network has.

    Args:
        params: real or abstract.
        expected: abstract.
        where: the weights are, for the message.
        advice: what to change.

    Raises:
        ValueError: a weight is missing, unknown, or of another shape or type.
    """
    got = {path: _shape_and_type(leaf) for path, leaf in flatten(params).items()}
    want = {path: _shape_and_type(leaf) for path, leaf in flatten(expected).items()}
    wrong = [path for path in got | want if got.get(path) != want.get(path)]
    if wrong:
        path, more = wrong[0], f", and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(
            f"weights {where} do not fit their network: {path} is {got.get(path, 'missing')}, "
            f"expected {want.get(path, 'nothing')}{more}; {advice}"
        )


def _shape_and_type(leaf: Any) -> str:
    """Shape and type of a weight; floating-point types of two bytes and more are one."""
    dtype = jnp.dtype(leaf.dtype)
    is_wide = jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize > 1
    return f"{tuple(leaf.shape)} {'float' if is_wide else dtype}"
