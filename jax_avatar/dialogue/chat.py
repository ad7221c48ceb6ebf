"""Answers of a language model behind an OpenAI-compatible endpoint, streamed.

request --> no answer, busy ............... once more after 0.3 s, where the server is busy
        --> refuses the JSON schema ....... once more with the schema in the instructions
        --> stream, valid ................. action, sentences, reaction
        --> stream, wrong form ............ once more without sampling, if that is early enough
        --> anything else ................. ThinkError; the agent says its fallback
"""

import asyncio
import codecs
import json
import time
from collections.abc import AsyncIterator, Awaitable
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2

from jax_avatar.dialogue.answers import AnswerReader
from jax_avatar.dialogue.packages import check_url
from jax_avatar.dialogue.reaction import DialogueState
from jax_avatar.dialogue.think import Question, ThinkError, Thought

__all__ = ["ChatEndpoint", "ChatSettings"]

_T = TypeVar("_T")
_MOST_BYTES = 1_000_000
_BUSY = (429, *range(500, 600))
_REFUSED = (400, 422)


@dataclass(frozen=True)
class ChatSettings:
    """Times of a request in seconds.

    Attributes:
        connect_s: until the server answers the connection.
        first_s: until the first piece of the answer.
        whole_s: until its end, repeats included.
        repeat_s: from the question, in which an answer of the wrong form is asked for again.
        busy_s: to wait before a busy server is asked again.
    """

    connect_s: float = 1.0
    first_s: float = 2.5
    whole_s: float = 8.0
    repeat_s: float = 2.0
    busy_s: float = 0.3


class _Busy(Exception):
    """The server may answer a little later."""


class _Refused(Exception):
    """The server does not take the request's form."""


class _WrongForm(Exception):
    """The answer is not as demanded, and none of it was spoken."""


class ChatEndpoint:
    """A `Think` that asks `POST {url}/chat/completions`.

    Source: OpenAI's chat completions with `response_format`, as vLLM, SGLang, llama.cpp and Ollama
    have it.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        key: str = "",
        question: Question | None = None,
        settings: ChatSettings | None = None,
        transport: httpx2.AsyncBaseTransport | None = None,
    ):
        """Does not connect yet.

        Args:
            url: base address, for example http://localhost:8080/v1.
            model: its name at the server.
            key: sent as a bearer token; empty for none.
            question: instructions and captions; the embedded ones if not given.
            settings: times.
            transport: of the HTTP client; its own if not given.

        Raises:
            ValueError: the address is none.
        """
        self._url = f"{check_url(url, '--llm')}/chat/completions"
        self._model, self._question = model, question or Question()
        self._settings = settings or ChatSettings()
        self._takes_schema = True  # until it has refused one
        headers = {"Accept-Encoding": "identity"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        timeout = httpx2.Timeout(None, connect=self._settings.connect_s)
        self._client = httpx2.AsyncClient(headers=headers, timeout=timeout, transport=transport)

    async def __call__(self, heard: str, state: DialogueState) -> AsyncIterator[Thought]:
        """Asks, and yields the answer as it comes; see `Think`."""
        began, is_streamed, may_wait = time.monotonic(), True, True
        while True:
            try:
                async for thought in self._ask(heard, state, began, is_streamed):
                    yield thought
                return
            except _Refused:
                if not self._takes_schema:
                    raise ThinkError("the language model refuses the request.") from None
                self._takes_schema = False
            except _Busy as busy:
                if not may_wait:
                    raise ThinkError(str(busy)) from None
                may_wait = False
                await asyncio.sleep(self._settings.busy_s)
            except _WrongForm as wrong:
                is_early = time.monotonic() - began < self._settings.repeat_s
                if not is_streamed or not is_early:
                    raise ThinkError(str(wrong)) from None
                is_streamed = False

    async def _ask(
        self, heard: str, state: DialogueState, began: float, is_streamed: bool
    ) -> AsyncIterator[Thought]:
        """One request."""
        body = {"model": self._model, "stream": is_streamed} | self._question.body(
            heard, state, has_schema=self._takes_schema, temperature=0.6 if is_streamed else 0.0
        )
        ends = began + self._settings.whole_s
        reader = AnswerReader(self._question.model)
        request = self._client.build_request("POST", self._url, json=body)
        limit_s = self._settings.first_s if is_streamed else self._settings.whole_s
        response = await _until(ends, self._client.send(request, stream=True), limit_s)
        try:
            _check(response)
            pieces = _deltas(response) if is_streamed else _message(response)
            while True:
                piece = await _until(ends, anext(pieces, None), limit_s)
                if piece is None:
                    break
                limit_s = self._settings.whole_s
                for thought in _read(reader, reader.read(piece)):
                    yield thought
            for thought in _read(reader, reader.finish()):
                yield thought
        finally:
            await response.aclose()


def _read(reader: AnswerReader, thoughts: Any) -> Any:
    """Thoughts of a reader; what was not spoken yet may be asked for again."""
    try:
        yield from thoughts
    except ThinkError as error:
        if reader.has_spoken:
            raise
        raise _WrongForm(str(error)) from None


async def _until(ends: float, awaitable: Awaitable[_T], limit_s: float) -> _T:
    """Waits for so many seconds, and not beyond the end.

    Raises:
        ThinkError: it took longer, or the connection failed.
    """
    limit_s = min(limit_s, ends - time.monotonic())
    try:
        async with asyncio.timeout(max(0.0, limit_s)):
            return await awaitable
    except TimeoutError:
        raise ThinkError(f"the language model was silent for {max(0.0, limit_s):.1f} s.") from None
    except httpx2.HTTPError as error:
        raise ThinkError(
            f"the language model cannot be reached ({type(error).__name__})."
        ) from None


def _check(response: httpx2.Response) -> None:
    status = response.status_code
    if status in _REFUSED:
        raise _Refused
    if status in _BUSY:
        raise _Busy(f"the language model is busy (HTTP {status}).")
    if status != 200:
        raise ThinkError(f"the language model answered HTTP {status}; check --llm and its key.")


async def _text(response: httpx2.Response) -> AsyncIterator[str]:
    """Text of a response, of bounded length."""
    decoder, count = codecs.getincrementaldecoder("utf-8")("replace"), 0
    async for data in response.aiter_raw():
        count += len(data)
        if count > _MOST_BYTES:
            raise ThinkError(f"an answer of over {_MOST_BYTES} bytes.")
        yield decoder.decode(data)


async def _deltas(response: httpx2.Response) -> AsyncIterator[str]:
    """Pieces of text in a stream of server-sent events."""
    rest = ""
    async for text in _text(response):
        *lines, rest = (rest + text).split("\n")
        for line in lines:
            data = line.strip().removeprefix("data:").strip()
            if data == "[DONE]":
                return
            if line.startswith("data:") and (piece := _content(data, "delta")):
                yield piece


async def _message(response: httpx2.Response) -> AsyncIterator[str]:
    """The text of an answer that comes as a whole."""
    yield _content("".join([text async for text in _text(response)]), "message")


def _content(data: str, part: str) -> str:
    """Text of the first choice; empty if there is none."""
    try:
        content = json.loads(data)["choices"][0][part]["content"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    return content if isinstance(content, str) else ""
