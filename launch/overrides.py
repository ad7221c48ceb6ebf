"""`--config=FILE:SIZE --config.section.key=value` -> plain settings.

A config file names only what departs from the defaults, so any setting of a section may be
overridden, not only those in the file; `build_section` names the nearest to a misspelt one.
"""

import ast
import difflib
import importlib.util
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["read_config", "split_arguments"]

_FLAG = "--config"
_ROOT = Path(__file__).parents[1]


def split_arguments(argv: Sequence[str]) -> tuple[str, dict[str, str], list[str]]:
    """Command line -> the config file, the overrides by their dotted name, everything else."""
    file, overrides, others = "", {}, []
    rest = iter(argv)
    for argument in rest:
        name, given, value = argument.partition("=")
        if name != _FLAG and not name.startswith(f"{_FLAG}."):
            others.append(argument)
            continue
        value = value if given else next(rest, None)
        if value is None:
            raise ValueError(f"{name} came without a value; write {name}=VALUE.")
        if name == _FLAG:
            file = value
        else:
            overrides[name.removeprefix(f"{_FLAG}.")] = value
    return file, overrides, others


def read_config(file: str, overrides: dict[str, str]) -> dict[str, Any]:
    """Settings of a config file, with some changed.

    Args:
        file: path, here or in the package, and after a colon what `get_config` is given.
        overrides: dotted name -> value as written.

    Raises:
        ValueError: there is no such file or section, or the file refuses its argument.
    """
    name, colon, argument = file.partition(":")
    # Where there is no such file, that of the package.
    path = next((p for p in (Path(name), _ROOT / name) if p.is_file()), None)
    if path is None:
        known = sorted(f"configs/{p.name}" for p in (_ROOT / "configs").glob("*.py"))
        near = difflib.get_close_matches(name, known, n=1)
        raise ValueError(
            f"--config={file}: {name or 'nothing'} is no file; give one of configs/"
            + (f", perhaps {near[0]}." if near else ".")
        )
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    settings = module.get_config(*([argument] if colon else [])).to_dict()
    for name, value in overrides.items():
        parsed = _parsed(value)
        if isinstance(parsed, float) and not math.isfinite(parsed):
            raise ValueError(f"--config.{name}={value}: expected a finite number.")
        _change(settings, name, parsed)
    return settings


def _change(settings: dict[str, Any], name: str, value: Any) -> None:
    section, _, key = name.partition(".")
    if section not in settings:
        near = difflib.get_close_matches(section, settings, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(settings)}."
        raise ValueError(f"config.{section} is not in this config; {hint}")
    is_section = isinstance(settings[section], dict)
    if is_section != bool(key):
        usage = f"--config.{section}.SETTING=..." if is_section else f"--config.{section}=..."
        raise ValueError(f"--config.{name}: expected {usage}")
    if is_section:
        settings[section][key] = value
    else:
        settings[section] = value


def _parsed(text: str) -> Any:
    if text in ("true", "false"):
        return text == "true"
    if text.lstrip("+-").lower() in ("nan", "inf", "infinity"):
        return float(text)
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
