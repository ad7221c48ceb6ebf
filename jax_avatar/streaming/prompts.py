"""A prompt -> the states that a stream is conditioned on, made once and kept on disk.

    prompt --clean--> text --tokenizer--> ids --encoder--> states --> cache
                        |                                               |
                        +--- key: text, encoder, tokenizer -------------+--> states `1 p f`

The encoder (11 GB at full size) is loaded only where the cache does not know the prompt, and is
gone when the function returns, unless it is given.
"""

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_avatar.io.prompt import Tokenizer, clean_prompt, find_tokenizer
from jax_avatar.models.network import Network
from jax_avatar.models.text import padded_length
from jax_avatar.shapes import Int, TextStates
from jax_avatar.weights.files import load_header, load_weights, save_weights
from jax_avatar.weights.folder import load_text_encoder
from jax_avatar.weights.hashes import fingerprint

__all__ = ["TOKENIZER", "encode_tokens", "prompt_encoder", "prompt_states"]

TOKENIZER = "text_tokenizer"
"""Folder of the tokenizer's files inside a model folder."""


def prompt_states(
    folder: str | Path,
    prompt: str,
    *,
    cache: str | Path | None = None,
    device: jax.Device | None = None,
    load: Callable[..., Callable[[str], TextStates]] | None = None,
) -> TextStates:
    """States of a prompt for the model in a folder.

    Args:
        folder: a model folder with the network `text` and a tokenizer in `text_tokenizer/`.
        prompt: description of the scene; cleaned here. What the transformer has no rows for is
            cut off at the end.
        cache: folder that keeps the states of every prompt; nothing is kept if not given.
        device: runs the encoder; the default device if not given.
        load: `prompt_encoder`, or one that remembers what it has loaded.

    Returns:
        One row per token, the end token included, in the encoder's compute type. Without padding:
        the transformer pads with zeros.

    Raises:
        ValueError: encoder or tokenizer are missing or fit neither each other nor the transformer,
            the extra `text` is not installed, or the cache cannot be written.
    """
    folder, load = Path(folder), load or prompt_encoder
    tokenizer_file = find_tokenizer(folder / TOKENIZER)
    text_len = _text_len(folder)
    text = clean_prompt(prompt)
    if cache is None:
        return load(folder, device=device)(text)
    cache = _writable(Path(cache).expanduser())
    parts = [text, str(text_len), fingerprint(folder, "text"), tokenizer_file.read_bytes()]
    key = hashlib.sha256()
    for part in parts:
        # Hashed one by one, so that no two lists of parts run together.
        key.update(hashlib.sha256(part if isinstance(part, bytes) else part.encode()).digest())
    name = key.hexdigest()
    try:
        return jnp.asarray(load_weights(cache, name, widen=False)[0]["states"])
    except (ValueError, KeyError):
        pass  # not there yet, or damaged: made anew
    states = load(folder, device=device)(text)
    save_weights(cache, name, {"states": np.asarray(states)}, {"prompt": text})
    return states


def prompt_encoder(
    folder: str | Path, *, device: jax.Device | None = None
) -> Callable[[str], TextStates]:
    """Loads the prompt encoder of a model folder, for many prompts.

    Args:
        folder: as of `prompt_states`.
        device: runs the encoder; the default device if not given.

    Returns:
        `prompt -> states`, as `prompt_states` gives them.

    Raises:
        ValueError: as `prompt_states`.
    """
    folder = Path(folder)
    tokenizer, text_len = Tokenizer(folder / TOKENIZER), _text_len(folder)
    encoder = load_text_encoder(folder)
    encoder = encoder.with_params(jax.device_put(encoder.params, device))

    def encode(prompt: str) -> TextStates:
        ids, mask = tokenizer(clean_prompt(prompt), text_len)
        tokens = ids[mask > 0]
        # Out of range, a lookup on a device would quietly take some other row.
        if tokens.max() >= encoder.config.vocab_size:
            raise ValueError(
                f"the tokenizer in {folder / TOKENIZER} makes id {tokens.max()}, the encoder knows "
                f"{encoder.config.vocab_size}; copy the tokenizer that belongs to the encoder."
            )
        return encode_tokens(encoder, tokens)

    return encode


def encode_tokens(encoder: Network, tokens: Int[np.ndarray, " p"]) -> TextStates:
    """States of one prompt's tokens, run at one of a few lengths.

    Args:
        encoder: with its weights on the device that runs it.
        tokens: ids without padding.
    """
    count = len(tokens)
    padding = (0, padded_length(count) - count)
    ids = np.pad(np.asarray(tokens, np.int32), padding)
    mask = np.pad(np.ones(count, np.int32), padding)
    return _run(encoder, ids[None], mask[None])[:, :count]


@jax.jit
def _run(encoder: Network, ids: Any, mask: Any) -> Any:
    return encoder.bind()(ids, mask)


def _text_len(folder: Path) -> int:
    """Rows that the transformer has for a prompt; its width must be the encoder's."""
    dit, text = load_header(folder, "dit")[0], load_header(folder, "text")[0]
    if dit["text_width"] != text["width"]:
        raise ValueError(
            f"the prompt encoder in {folder} makes states of {text['width']} channels, its "
            f"transformer expects {dit['text_width']}; put networks of one model into the folder."
        )
    return dit["text_len"]


def _writable(cache: Path) -> Path:
    """The cache's folder; better refused now than after minutes of encoding."""
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"prompt cache {cache} cannot be made ({error}); pass another --prompt_cache."
        ) from error
    if not os.access(cache, os.W_OK | os.X_OK):
        raise ValueError(f"prompt cache {cache} is not writable; pass another --prompt_cache.")
    return cache
