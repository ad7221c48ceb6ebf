"""A language model behind an endpoint: slow, silent, busy, malformed, gone in the middle."""

import asyncio
import contextlib
import json
import random

import httpx2
import pytest

from jax_avatar.dialogue.chat import ChatEndpoint, ChatSettings
from jax_avatar.dialogue.reaction import DialogueState, Reaction
from jax_avatar.dialogue.think import Action, Sentence, ThinkError
from tests.dialogue.test_answers import ANSWER, NOD, mutated

GOOD = json.dumps(ANSWER)
QUICK = ChatSettings(connect_s=0.2, first_s=0.2, whole_s=0.6, repeat_s=5.0, busy_s=0.01)


class Server(httpx2.AsyncBaseTransport):
    """Answers requests in turn, each by its status and pieces, and keeps them."""

    def __init__(self, *answers):
        self.answers, self.bodies, self.headers, self.closed = list(answers), [], [], 0

    async def handle_async_request(self, request):
        self.bodies.append(json.loads(request.content))
        self.headers.append(request.headers)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        status, pieces = answer
        return httpx2.Response(status, stream=Stream(self, pieces))


class Stream(httpx2.AsyncByteStream):
    def __init__(self, server, pieces):
        self.server, self.pieces = server, pieces

    async def __aiter__(self):
        for piece in self.pieces:
            if isinstance(piece, float):
                await asyncio.sleep(piece)
            elif isinstance(piece, Exception):
                raise piece
            else:
                yield piece if isinstance(piece, bytes) else piece.encode()

    async def aclose(self):
        self.server.closed += 1


def event(text):
    return "data: " + json.dumps({"choices": [{"delta": {"content": text}}]}) + "\n\n"


def streamed(text, size=20):
    return [event(text[i : i + size]) for i in range(0, len(text), size)] + ["data: [DONE]\n\n"]


def whole(text):
    return [json.dumps({"choices": [{"message": {"content": text}}]})]


def ask(server, settings=QUICK, **options):
    """Thoughts, and the error if there was one."""

    async def run():
        thoughts = []
        model = ChatEndpoint("http://x/v1/", "m", settings=settings, transport=server, **options)
        try:
            async for thought in model("Do you agree?", DialogueState()):
                thoughts.append(thought)
        except ThinkError as error:
            return thoughts, str(error)
        return thoughts, ""

    return asyncio.run(run())


def test_an_answer_is_streamed_and_its_form_demanded():
    server = Server((200, streamed(GOOD)))
    thoughts, error = ask(server, key="secret")
    assert not error and thoughts[0] == Action(NOD) and isinstance(thoughts[-1], Reaction)
    assert [type(x) for x in thoughts].count(Sentence) == 4
    (body,), (headers,) = server.bodies, server.headers
    assert headers["authorization"] == "Bearer secret" and "secret" not in json.dumps(body)
    assert body["model"] == "m" and body["stream"] and body["max_tokens"] == 320
    form = body["response_format"]["json_schema"]
    assert form["strict"] and list(form["schema"]["properties"])[:2] == ["action", "say"]
    assert NOD in form["schema"]["properties"]["action"]["enum"]
    assert json.loads(body["messages"][1]["content"])["heard"] == "Do you agree?"
    assert (
        NOD in body["messages"][0]["content"] and "{actions}" not in body["messages"][0]["content"]
    )
    assert server.closed == 1


def test_events_may_be_cut_anywhere():
    data = "".join(streamed(GOOD)).encode()
    expected, _ = ask(Server((200, [data])))
    for size in (1, 7, 100):
        pieces = [data[i : i + size] for i in range(0, len(data), size)]
        assert ask(Server((200, pieces))) == (expected, "")


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ([(200, [0.5, *streamed(GOOD)])], "silent for 0.2 s"),
        ([(200, [*streamed(GOOD)[:3], 5.0])], "silent for 0.6 s"),
        ([(200, [event(" "), 0.15] * 9)], "silent for"),
        ([httpx2.ConnectTimeout("")], "cannot be reached"),
        ([(200, [*streamed(GOOD)[:2], httpx2.ReadError("")])], "cannot be reached"),
        ([(200, streamed(GOOD)[:3]), (200, whole(GOOD[:90]))], "wrong form"),
        ([(404, [""])], "HTTP 404; check --llm"),
        ([(503, [""]), (503, [""])], "busy"),
        ([(400, [""]), (400, [""])], "refuses"),
        ([(200, ["data: {}\n\n", "x" * 2_000_000])], "over 1000000 bytes"),
        ([(200, [b"\xff\xfe" * 99]), (200, [b"\xff" * 99])], "wrong form"),
        ([(302, [""])], "HTTP 302"),
    ],
    ids=["silent", "silent_later", "drips", "no_server", "gone", "cut", "not_found", "busy",
         "refuses", "floods", "no_text", "redirects"],
)  # fmt: skip
def test_a_failure_ends_in_time_with_one_sentence(answers, says):
    server = Server(*answers)
    thoughts, error = ask(server)
    assert says in error and not any(isinstance(x, Reaction) for x in thoughts)
    assert not server.answers
    assert server.closed == sum(not isinstance(x, Exception) for x in answers)


def test_the_ladder():
    # Busy: once more. A schema that is refused: in words, from then on.
    assert ask(Server((503, [""]), (200, streamed(GOOD))))[1] == ""
    server = Server((400, [""]), (200, streamed(GOOD)), (200, streamed(GOOD)))

    async def twice():
        model = ChatEndpoint("http://x", "m", settings=QUICK, transport=server)
        for _ in range(2):
            assert isinstance([x async for x in model("Hello", DialogueState())][-1], Reaction)

    asyncio.run(twice())
    assert [x["response_format"]["type"] for x in server.bodies] == [
        "json_schema", "json_object", "json_object"
    ]  # fmt: skip
    assert "JSON schema" in server.bodies[1]["messages"][0]["content"]
    # Wrong form: once more without sampling and in one piece, unless something was said already.
    server = Server((200, streamed('{"action": "Opens."}')), (200, whole(GOOD)))
    assert ask(server)[1] == ""
    assert [(x["stream"], x["temperature"]) for x in server.bodies] == [(True, 0.6), (False, 0.0)]
    broken = json.dumps(ANSWER | {"stable": "x"})
    thoughts, error = ask(Server((200, streamed(broken))))
    assert "wrong form" in error and isinstance(thoughts[-1], Sentence)
    late = ChatSettings(repeat_s=0.0)
    assert "wrong form" in ask(Server((200, streamed("{}"))), late)[1]


def test_an_answer_that_is_not_wanted_any_more_is_closed():
    server = Server((200, [*streamed(GOOD)[:8], 60.0]))

    async def run():
        model = ChatEndpoint("http://x", "m", settings=ChatSettings(), transport=server)
        first = asyncio.Event()

        async def read():
            async for _ in model("Hello", DialogueState()):
                first.set()

        task = asyncio.create_task(read())
        await first.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

    asyncio.run(run())
    assert server.closed == 1


def test_a_hundred_damaged_answers_end_in_an_answer_or_an_error():
    rng = random.Random(1)
    for _ in range(100):
        text = mutated(rng).encode(errors="replace").decode()[:20_000]
        server = Server((200, streamed(text, 200)), (200, whole(mutated(rng))))
        thoughts, error = ask(server)
        assert bool(error) != (bool(thoughts) and isinstance(thoughts[-1], Reaction))


def test_an_address_that_is_none_is_refused():
    for url in ("", "localhost:8080", "file:///etc/passwd", "http://", "http://[::1"):
        with pytest.raises(ValueError, match="--llm"):
            ChatEndpoint(url, "m")
