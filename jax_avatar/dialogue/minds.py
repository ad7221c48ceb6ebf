"""Function that answers, for a value of `--llm`."""

import os
from pathlib import Path

from jax_avatar.dialogue.chat import ChatEndpoint
from jax_avatar.dialogue.demo_brain import DEMO, DemoBrain
from jax_avatar.dialogue.think import Question, Think

__all__ = ["find_mind"]


def find_mind(name: str, model: str = "", *, key: str = "", system: str = "") -> Think:
    """Function that answers.

    Args:
        name: "demo", the address of an OpenAI-compatible endpoint, or a GGUF file.
        model: name of the model at the endpoint.
        key: access token of the endpoint.
        system: file with other instructions; the embedded ones if empty.

    Raises:
        ValueError: it is none of them, a name is missing, or a file cannot be read.
        ModuleNotFoundError: a GGUF file takes the package xllamacpp.
    """
    if name == DEMO:
        return DemoBrain()
    question = Question(Path(system).read_text(encoding="utf-8") if system else "")
    if "://" in name:
        if not model:
            raise ValueError(
                f"--llm {name} takes --llm_model, the name of a model at that address."
            )
        return ChatEndpoint(name, model, key=key.strip(), question=question)
    if name.endswith(".gguf") or os.path.isfile(name):
        from jax_avatar.dialogue.gguf import GgufModel

        return GgufModel(name, question=question)
    raise ValueError(
        f"--llm {name}: expected {DEMO}, an address such as http://localhost:8080/v1, or a GGUF "
        "file."
    )
