"""Prompts as the prompt encoder was trained on them: cleaned, cut into tokens, ended and padded.

The packages for it (`ftfy`, and `tokenizers` or `sentencepiece`) come with the extra `text`.
"""

import html
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np

from jax_avatar.shapes import Int

__all__ = ["Tokenizer", "clean_prompt", "find_tokenizer"]

_SPECIAL = {"eos": "</s>", "pad": "<pad>", "unk": "<unk>"}


def clean_prompt(text: str) -> str:
    """Repairs encoding accidents, resolves HTML entities and makes every gap one space.

    Among the repairs: curly quotes become straight, full-width characters ASCII, ligatures are
    spelt out, control characters are dropped.

    Args:
        text: as a person wrote it.

    Raises:
        ValueError: the package `ftfy` is not installed.

    Source: github.com/Wan-Video/Wan2.2, `wan/modules/tokenizers.py`, mode "whitespace".
    """
    text = _import("ftfy").fix_text(text)
    # Twice: text from the web is often escaped twice.
    text = html.unescape(html.unescape(text)).strip()
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """Cleaned prompts -> token ids.

    Attributes:
        eos_id: ends every prompt.
        pad_id: fills up behind it.
        unk_id: stands for what the vocabulary lacks.
    """

    def __init__(self, folder: str | Path):
        """Reads `tokenizer.json` or, if it is not there, `spiece.model`.

        Args:
            folder: with either file, for example `google/umt5-xxl` of the official download.

        Raises:
            ValueError: neither file, or not a readable one; or the package that reads it is
                missing.
        """
        folder = Path(folder)
        path = find_tokenizer(folder)
        read = _read_json if path.suffix == ".json" else _read_sentencepiece
        try:
            self._ids, special = read(path)
        except _MissingPackage:
            raise
        # The packages raise anything for broken files, bare Exceptions included.
        except Exception as error:
            raise ValueError(
                f"{path} is not a readable tokenizer ({error}); copy it again."
            ) from error
        missing = [name for name, number in special.items() if number is None or number < 0]
        if missing:
            raise ValueError(
                f"{path} has no {', '.join(_SPECIAL[name] for name in missing)}; expected the "
                "tokenizer of a T5 model."
            )
        self.eos_id, self.pad_id, self.unk_id = (special[name] for name in _SPECIAL)

    def __call__(
        self, text: str, length: int
    ) -> tuple[Int[np.ndarray, " p"], Int[np.ndarray, " p"]]:
        """Ids and mask of a prompt.

        Args:
            text: cleaned.
            length: of the result. A longer prompt loses its end, but never the end token.

        Returns:
            Ids, and 1 where they are tokens, the end token included, 0 where they are padding.
        """
        if length < 1:
            raise ValueError(f"length {length} leaves no room for the end token; give at least 1.")
        tokens = [*self._ids(text)[: length - 1], self.eos_id]
        padding = length - len(tokens)
        ids = np.array(tokens + [self.pad_id] * padding, np.int32)
        return ids, np.array([1] * len(tokens) + [0] * padding, np.int32)


def find_tokenizer(folder: str | Path) -> Path:
    """The file that `Tokenizer` reads in a folder.

    Raises:
        ValueError: there is none.
    """
    folder = Path(folder)
    for name in ("tokenizer.json", "spiece.model"):
        if (folder / name).is_file():
            return folder / name
    present = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no folder"
    raise ValueError(
        f"{folder} holds neither tokenizer.json nor spiece.model (found: {present}); copy the "
        "files of google/umt5-xxl there."
    )


Ids = Callable[[str], list[int]]


def _read_json(path: Path) -> tuple[Ids, dict[str, int | None]]:
    tokenizer = _import("tokenizers").Tokenizer.from_file(str(path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    special = {name: tokenizer.token_to_id(token) for name, token in _SPECIAL.items()}
    # The end token is appended here, for both kinds of files alike.
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids, special


def _read_sentencepiece(path: Path) -> tuple[Ids, dict[str, int | None]]:
    processor = _import("sentencepiece").SentencePieceProcessor(model_file=str(path))
    special = {"eos": processor.eos_id(), "pad": processor.pad_id(), "unk": processor.unk_id()}
    return processor.encode, special


class _MissingPackage(ValueError):
    pass


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise _MissingPackage(
            f"prompts need the package {name}, which is not installed ({error}); run "
            'pip install "jax_avatar[text]".'
        ) from error
