"""Answers of a language model in a GGUF file, through llama.cpp (package xllamacpp), on the CPU."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from jax_avatar.dialogue.answers import AnswerReader
from jax_avatar.dialogue.packages import network_lock
from jax_avatar.dialogue.reaction import DialogueState
from jax_avatar.dialogue.think import Question, ThinkError, Thought

__all__ = ["GgufModel"]

_CONTEXT = 4096


class GgufModel:
    """A `Think` in this process; its grammar follows the JSON schema, so its form is always right.

    It answers one question at a time, on one thread: more of them spin where cores are busy.
    """

    def __init__(self, path: str | Path, *, question: Question | None = None):
        """Loads the file, and reads the instructions once, since later questions begin with them.

        Args:
            path: of the file.
            question: instructions and captions; the embedded ones if not given.

        Raises:
            ModuleNotFoundError: xllamacpp is not installed.
            ValueError: the file cannot be read.
        """
        if not Path(path).is_file():
            raise ValueError(f"--llm {path}: there is no such file; expected an address or a GGUF.")
        import xllamacpp

        parameters = xllamacpp.CommonParams()
        parameters.model.path = str(path)
        parameters.n_ctx, parameters.verbosity = _CONTEXT, -1
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
        try:
            self._server = xllamacpp.Server(parameters)
        except Exception as error:
            raise ValueError(f"--llm {path}: llama.cpp cannot load it ({error}).") from None
        self._question, self._lock = question or Question(), network_lock()
        warm_up = self._question.body("Hello.", DialogueState()) | {"max_tokens": 1}
        self._server.handle_chat_completions(warm_up)

    async def __call__(self, heard: str, state: DialogueState) -> AsyncIterator[Thought]:
        """Asks, and yields the answer as it comes; see `Think`."""
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue()
        is_stopped = threading.Event()
        reader = AnswerReader(self._question.model)
        body = self._question.body(heard, state) | {"stream": True}

        def take(chunk: Any) -> bool:
            if is_stopped.is_set():
                return True
            loop.call_soon_threadsafe(pieces.put_nowait, _content(chunk))
            return False

        def answer() -> None:
            end: str | ThinkError | None = None
            try:
                with self._lock:
                    if not is_stopped.is_set():
                        self._server.handle_chat_completions(body, take)
            except Exception as error:
                end = ThinkError(f"llama.cpp failed ({type(error).__name__}).")
            if not loop.is_closed():
                loop.call_soon_threadsafe(pieces.put_nowait, end)

        threading.Thread(target=answer, name="llama", daemon=True).start()
        try:
            while isinstance(piece := await pieces.get(), str):
                for thought in reader.read(piece):
                    yield thought
            if piece is not None:
                raise piece
            for thought in reader.finish():
                yield thought
        finally:
            is_stopped.set()


def _content(chunk: Any) -> str:
    """Text of a chunk; empty if there is none."""
    try:
        content = chunk["choices"][0]["delta"].get("content")
    except (LookupError, TypeError, AttributeError):
        return ""
    return content if isinstance(content, str) else ""
