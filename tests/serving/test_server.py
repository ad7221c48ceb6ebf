import gc
import io
import json
import random
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import jax
import numpy as np
import pytest
import uvicorn
from PIL import Image
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from jax_avatar.dialogue.demo_brain import DemoBrain
from jax_avatar.dialogue.driver import Parts
from jax_avatar.layout import parse_layout
from jax_avatar.portraits.view import PortraitView
from jax_avatar.serving.messages import Limits
from jax_avatar.serving.pool import SessionPool
from jax_avatar.serving.server import make_config
from jax_avatar.serving.server_state import ServerState
from jax_avatar.streaming.decode import NotFinite
from jax_avatar.streaming.session import AvatarSession
from jax_avatar.testing import save_model
from jax_avatar.weights.folder import SMALL, load_model
from tests.dialogue.test_hearing import loud
from tests.live.helpers import voice
from tests.serving.client import Client, base64_of

TOKEN = "open sesame"
LIMITS = Limits(portrait_bytes=100_000, portrait_pixels=1_000_000, audio_bytes=50_000)


def free_port():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return taken.getsockname()[1]


class Served:
    """A server in a thread of its own, with two sessions."""

    def __init__(self, folder):
        model = load_model(folder)
        portrait = np.random.default_rng(0).uniform(-1, 1, (1, 1, 64, 64, 3)).astype(np.float32)

        def build(shared):
            return AvatarSession(shared or model, portrait, parse_layout("1", 4))

        image = np.random.default_rng(1).integers(0, 255, (80, 70, 3), np.uint8)
        self.state = ServerState(SessionPool(build, most=2), image, token=TOKEN, limits=LIMITS)
        self.port = free_port()
        self.server = uvicorn.Server(make_config(self.state, "127.0.0.1", self.port))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()

    def get(self, path, **headers):
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    @property
    def url(self):
        return f"ws://127.0.0.1:{self.port}/v1/avatar"

    def client(self, **fields):
        return Client(self.url, **({"token": TOKEN} | fields))

    def wait_until_free(self, sessions=2, limit_s=20):
        """Waits until so many sessions are free; returns how many are free in the end."""
        ends = time.monotonic() + limit_s
        while self.state.pool.free != sessions and time.monotonic() < ends:
            time.sleep(0.05)
        return self.state.pool.free


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served(save_model(tmp_path_factory.mktemp("model")))
    for _ in range(1000):
        try:
            status, _ = served.get("/readyz")
        except OSError:
            status = None
        if status == 200:
            break
        time.sleep(0.1)
    assert served.state.pool.count == 2, served.state.pool.budget
    yield served
    served.server.should_exit = True
    served.thread.join(20)


@pytest.fixture(autouse=True)
def nothing_leaks(served):
    yield
    assert served.wait_until_free() == 2, "a session was not given back"
    assert not served.state.connections


def is_moving(frames):
    return np.abs(np.diff(frames.astype(int), axis=0)).mean((1, 2, 3))


def test_a_voice_comes_back_as_picture_and_sound(served):
    with served.client() as client:
        created = client.until("session.created")
        assert created["mime"].startswith('video/mp4; codecs="avc1.') and created["fps"] == 16
        client.read(1.0)
        client.speak(voice(1.5))
        client.send("audio.commit")
        started = client.until("playback_started")
        finished = client.until("playback_finished")
        client.read(0.5)
    assert finished["position_s"] == 1.5 and finished["interrupted"] is False
    frames, sound, times = client.decoded()
    assert frames.shape[1:] == (64, 64, 3)
    start = started["at_s"] + created["delay_s"]
    loud = np.flatnonzero(np.abs(sound) > 0.02) / 48_000
    # The first frame shows from 0 on; the others keep to the clock of the sound.
    assert abs(loud[0] - start) < 0.15 and 1.2 < loud[-1] - loud[0] < 1.7
    np.testing.assert_allclose(np.diff(times[1:]), 1 / 16, atol=1e-4)


def test_an_interrupt_is_heard_within_half_a_second(served):
    with served.client() as client:
        client.until("session.created")
        client.speak(voice(20.0))
        client.until("playback_started")
        client.read(0.5)
        client.send("clear")
        cleared = client.until("cleared")
        assert 0 < cleared["position_s"] < 5
        client.until("state")
        client.read(1.5)
        created = client.events[0]
        _, sound, _ = client.decoded()
        loud = np.flatnonzero(np.abs(sound) > 0.02) / 48_000 - created["delay_s"]
        assert loud[-1] <= cleared["at_s"] + 0.15
        assert len(sound) / 48_000 > cleared["at_s"] + 0.5
        client.send("clear")
        assert client.until("cleared")["position_s"] == 0


def test_a_message_beyond_every_limit_ends_its_connection_only(served):
    with served.client() as client:
        client.until("session.created")
        client.socket.send(b"x" * (LIMITS.message_bytes + 2))
        with pytest.raises(ConnectionClosed) as closed:
            client.until("never")
        assert closed.value.rcvd.code == 1009


def image_bytes(kind="PNG", size=(40, 50)):
    out = io.BytesIO()
    Image.new("RGB", size, (200, 30, 30)).save(out, kind)
    return out.getvalue()


def test_a_portrait_is_uploaded_only_with_consent_and_only_if_it_is_one(served):
    with served.client(portrait=base64_of(image_bytes()), consent=True) as client:
        (warning,) = client.until("session.created")["warnings"]
        assert "no face was found" in warning
        client.read(1.0)
    frames, _, _ = client.decoded()
    with served.client() as client:
        assert client.until("session.created")["warnings"] == []
        client.read(1.0)
    assert np.abs(client.decoded()[0][0].astype(int) - frames[0]).mean() > 1
    for portrait, consent, code in [
        (image_bytes(), None, "consent"),
        (b"", True, "bad_portrait"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), True, "bad_portrait"),
        (image_bytes()[:60], True, "bad_portrait"),
        (image_bytes(size=(4, 4)), True, "bad_portrait"),
        (image_bytes("GIF", (1100, 1100)), True, "bad_portrait"),
        (b"/etc/passwd", True, "bad_portrait"),
        (bytes(LIMITS.portrait_bytes + 1), True, "too_large"),
    ]:
        with served.client(portrait=base64_of(portrait), consent=consent) as client:
            error = client.until("error")
            assert error["code"] == code and error["fatal"], error


def test_a_client_chooses_a_face_and_the_full_picture_where_the_model_frames_by_it(served):
    with io.BytesIO() as file:
        Image.open(SMALL.parent / "portraits" / "amara.png").convert("RGB").save(file, "JPEG")
        fields = {"portrait": base64_of(file.getvalue()), "consent": True}
    for chosen in ({"face": 1}, {"frame": "full"}):
        with served.client(**fields, **chosen) as client:
            error = client.until("error")
            assert error["code"] == "bad_portrait" and "frames by the face" in error["message"]
    served.state.view = PortraitView("face")
    try:
        with served.client(**fields, face=2) as client:
            error = client.until("error")
            assert error["code"] == "bad_portrait" and "shows 1 face" in error["message"]
        with served.client(**fields, frame="full") as client:
            created = client.until("session.created")
            assert (created["width"], created["height"]) == (256, 256)
            client.read(1.0)
        assert client.decoded()[0].shape[1:] == (256, 256, 3)
    finally:
        served.state.view = PortraitView()


def test_only_those_who_know_the_token_come_in(served):
    for fields in ({"token": "wrong"}, {"token": None}):
        with Client(served.url, **fields) as client:
            assert client.until("error")["code"] == "unauthorised"
    with served.client(version=2) as client:
        assert client.until("error")["code"] == "version"
    assert served.get("/metrics")[0] == 401
    status, text = served.get("/metrics", Authorization=f"Bearer {TOKEN}")
    assert status == 200 and 'avatar_sessions_refused_total{code="unauthorised"}' in text
    assert "avatar_seats 2.0" in text and "avatar_block_seconds_bucket" in text
    assert 'avatar_sessions{protocol="websocket"} 0.0' in text
    with pytest.raises(InvalidStatus), connect(served.url, origin="http://evil.example"):
        pass


def test_a_full_server_says_busy_and_those_inside_do_not_notice(served):
    with served.client() as one, served.client() as two:
        one.until("session.created"), two.until("session.created")
        with served.client() as three:
            error = three.until("error")
            assert error["code"] == "busy" and error["fatal"]
        one.speak(voice(1.0))
        one.send("audio.commit")
        one.until("playback_finished")
        two.read(0.2)
        assert not [e for e in two.events if e["type"].startswith("playback")]
        assert np.abs(two.decoded()[1]).max() < 0.01


def test_an_idle_session_is_ended(served):
    served.state.idle_s = 1.0
    try:
        with served.client() as client:
            assert client.until("session.closed", 10)["reason"] == "idle"
    finally:
        served.state.idle_s = 300.0


def test_clients_that_vanish_leave_nothing_behind(served):
    for _ in range(5):
        client = served.client()
        client.until("session.created")
        client.speak(voice(1.0))
        client.socket.socket.shutdown(socket.SHUT_RDWR)  # as if killed
        assert served.wait_until_free() == 2
        assert not served.state.connections


def held():
    """Numbers of arrays on devices, threads and open files."""
    gc.collect()
    files = Path("/proc/self/fd")
    return {
        "arrays": len(jax.live_arrays()),
        "threads": threading.active_count(),
        "files": len(list(files.iterdir())) if files.exists() else 0,
    }


def test_twenty_who_come_and_go_leave_nothing_behind(served):
    def come_and_go(times):
        for _ in range(times):
            with served.client() as client:
                client.until("session.created")
                client.speak(voice(0.3))
                client.read(0.1)
            assert served.wait_until_free() == 2

    come_and_go(3)
    before = held()
    come_and_go(20)
    after = held()
    assert all(after[name] <= before[name] + 1 for name in before), (before, after)


def test_a_client_that_takes_nothing_is_let_go(served, monkeypatch):
    """Its pongs are stuck behind unread messages, so it seems dead."""
    for name in ("ws_ping_interval", "ws_ping_timeout"):
        monkeypatch.setattr(served.server.config, name, 2)
    with connect(served.url, max_queue=1, max_size=None) as client:
        client.send(json.dumps({"type": "session.create", "version": 1, "token": TOKEN}))
        assert served.wait_until_free(1) == 1  # it is admitted
        assert served.wait_until_free(2, limit_s=60) == 2


def rubbish(rng):
    """An invalid message, or nearly a valid one."""
    good = [
        '{"type": "audio.append", "audio": "AAAA"}', '{"type": "clear"}',
        '{"type": "prompt.update", "text": "x"}', '{"type": "state.update", "state": "idle"}',
        '{"type": "session.create", "version": 1}', '{"type": "speech.create", "text": "x"}',
        '{"type": "audio.commit"}',
    ]  # fmt: skip
    text = rng.choice(good)
    return rng.choice([
        lambda: text[: rng.randrange(len(text))],
        lambda: text.replace('"', rng.choice(["'", "", "\\", "\u0000", "💥"]), 3),
        lambda: "[" * rng.randrange(1, 5000),
        lambda: json.dumps(rng.choice([None, 1, [], "x", {}, {"type": 3}, {"type": None}])),
        lambda: json.dumps({"type": "audio.append", "audio": rng.choice([1, "é", "A", [], {}])}),
        lambda: json.dumps({"type": "state.update", "state": rng.choice(["speaking", "x" * 999])}),
        lambda: json.dumps({"type": "clear", "path": "/etc/passwd"}),
        lambda: "9" * 5000,
        lambda: rng.randbytes(2 * rng.randrange(50) + 1),
        lambda: rng.randbytes(50_002) if rng.random() < 0.1 else b"x",
    ])()  # fmt: skip


@pytest.fixture
def speaking(served):
    """The server with a synthesiser; "slow" waits until `go` is set, "bad" fails."""
    begun, go = threading.Event(), threading.Event()

    def speak(text):
        if text == "slow":
            begun.set()
            go.wait(30)
        if text == "none":
            raise ValueError("nothing to say.")
        return (voice(0.8), 16_000) if text != "bad" else 1 / 0

    served.state.speak = speak
    yield begun, go
    go.set()
    served.state.speak = None


def test_typed_text_is_spoken_and_what_cannot_be_is_told(served, speaking):
    with served.client() as client:
        assert client.until("session.created")["takes_text"] is True
        for text, code in (("none", "refused"), ("bad", "refused"), ("x" * 501, "too_large")):
            client.send("speech.create", text=text)
            error = client.until("error")
            assert error["code"] == code and not error["fatal"] and "1 / 0" not in error["message"]
        client.send("speech.create", text="hello")
        assert client.until("playback_finished")["position_s"] == 0.8


def test_an_interrupt_also_stops_text_that_is_not_yet_sound(served, speaking):
    with served.client() as client:
        client.until("session.created")
        for _ in range(3):
            client.send("speech.create", text="slow")
        begun, go = speaking
        assert begun.wait(30)
        client.send("clear")
        client.until("cleared", 5)  # the session does not wait for the synthesis
        go.set()
        client.read(1.5)
        assert not [e for e in client.events if e["type"] == "playback_started"]
        client.send("speech.create", text="hello")
        assert client.until("playback_finished")["position_s"] == 0.8


@pytest.fixture
def talking(served):
    """The server with a conversation; its ear takes anything loud for one question."""
    served.state.talk = Parts(
        hear=lambda samples: "Nod if you agree.", detector=lambda: loud, think=DemoBrain(),
        speak=lambda text: (voice(1.5), 16_000),
    )  # fmt: skip
    yield
    served.state.talk = None


def test_the_avatar_holds_a_conversation_by_itself(served, talking):
    def say(client, samples):
        for start in range(0, len(samples), 1600):
            pcm = (samples[start : start + 1600] * 32767).astype("<i2").tobytes()
            client.send("user.append", audio=base64_of(pcm))

    quiet = np.zeros(16_000, np.float32)
    with served.client() as client:
        created = client.until("session.created")
        assert created["talks"] and created["listens"]
        say(client, np.concatenate([voice(1.0, seed=2), quiet]))
        assert client.until("heard")["text"] == "Nod if you agree."
        turn = client.until("turn")
        assert turn["action"] == "The person nods." and turn["id"] == 1
        timing = client.until("turn.timing")
        parts = [timing[k] for k in ("endpoint", "transcript", "think", "say", "voice", "picture")]
        assert sum(parts) == pytest.approx(timing["react"], abs=0.04)
        client.read(0.3)
        say(client, voice(0.8, seed=3))
        assert 0 < client.until("interrupted")["position_s"] < 1.5
        say(client, quiet)
        assert client.until("turn")["id"] == 2
        client.until("playback_started")
        client.send("user.text", text="Hello!")
        assert "good to see you" in client.until("turn")["say"]
        for kind, fields in (
            ("audio.append", {"audio": ""}),
            ("speech.create", {"text": "Hi."}),
            ("state.update", {"state": "idle"}),
        ):
            client.send(kind, **fields)
            assert "holds the conversation" in client.until("error")["message"]
        client.until("playback_started")
        client.send("clear")
        client.until("cleared")
        say(client, voice(9.0))
        assert "faster than real time" in client.until("error")["message"]
    assert (
        'avatar_turn_seconds_count{part="react"}'
        in served.get("/metrics", authorization=f"Bearer {TOKEN}")[1]
    )


def test_a_server_without_a_conversation_says_so(served):
    with served.client() as client:
        created = client.until("session.created")
        assert not created["talks"] and not created["listens"]
        for kind, fields in (("user.append", {"audio": ""}), ("user.text", {"text": "Hi."})):
            client.send(kind, **fields)
            assert "--talk" in client.until("error")["message"]


def test_a_server_that_cannot_speak_says_what_it_needs(served):
    with served.client() as client:
        assert client.until("session.created")["takes_text"] is False
        client.send("speech.create", text="hello")
        error = client.until("error")
        assert error["code"] == "no_speech" and "flite" in error["message"]


def test_a_thousand_bad_messages_harm_nobody(served):
    rng, sent, codes = random.Random(3), 0, set()
    with served.client() as neighbour:
        neighbour.until("session.created")
        while sent < 1000:
            with served.client() as client:
                if rng.random() < 0.9:
                    client.until("session.created")
                try:
                    for _ in range(30):
                        client.socket.send(rubbish(rng))
                        sent += 1
                    while True:
                        client.take(client.socket.recv(timeout=5))
                except ConnectionClosed:
                    pass
                codes |= {e["code"] for e in client.events if e["type"] == "error"}
                reasons = [e["reason"] for e in client.events if e["type"] == "session.closed"]
                assert reasons in (["too many errors"], []), reasons
            assert served.wait_until_free(1) == 1
            neighbour.read(0.05)  # or it would count as too slow
        neighbour.send("audio.commit")
        neighbour.read(0.5)
        assert not [e for e in neighbour.events if e["type"] == "error"]
    assert {"bad_message", "refused", "too_large"} <= codes
    assert served.get("/readyz")[0] == served.get("/healthz")[0] == 200


def test_the_page_is_served_and_asks_for_nothing_from_elsewhere(served):
    for path in ("/", "/avatar.js", "/style.css", "/microphone.js"):
        status, text = served.get(path)
        assert (
            status == 200
            and "http://" not in text
            and "https://" not in text.replace('location.protocol === "https:"', "")
        )
    for path in ("/../messages.py", "/%2e%2e/app.py", "//etc/passwd"):
        assert served.get(path)[0] == 404


def last_words(client):
    """The last two messages: a fatal error, and the end of the session."""
    with pytest.raises(ConnectionClosed):
        client.read(20)
    error, closed = client.events[-2:]
    assert (error["type"], closed["type"]) == ("error", "session.closed") and error["fatal"]
    return error, closed


HOSTILE = [
    ('{"type": "session.create", "version": 1, "token": "\\ud83d"}', "unauthorised"),
    ('{"type": "session.create", "version": 1, "token": "a\\u0000\\nb"}', "unauthorised"),
    ('{"type": "session.create", "version": 1, "token": "a", "token": "b"}', "bad_message"),
    ('{"type": "session.create", "version": 1, "prompt": "\\udc00"}', "bad_message"),
    ('{"type": "session.create", "version": 1, "prompt": "a\\u0007"}', "bad_message"),
    ('{"type": "session.create", "version": NaN}', "bad_message"),
    ('{"type": "session.create", "version": 1, "sample_rate": Infinity}', "bad_message"),
    ('{"type": "session.create", "version": 1e999}', "bad_message"),
    ('{"type": "session.create", "version": true}', "bad_message"),
    ('{"type": "session.create", "version": "1"}', "bad_message"),
    ('{"type": "session.create", "version": 1, "consent": "yes"}', "bad_message"),
    ('{"type": "session.create", "version": 1, "path": null}', "bad_message"),
    ('{"type": "session.create", "version": %s}' % ("9" * 4000), "bad_message"),
    ('{"type": "session.create", "version": %s}' % ("9" * 5000), "bad_message"),
    (json.dumps({"type": "session.create", "version": -1, "token": TOKEN}), "version"),
    ('{"type": "session.create", "version": 1, "sdp": "\\ud800"}', "bad_message"),
    ('{"type": "\\ud83d\\n"}', "bad_message"),
    ('{"\\ud83d": 1, "type": "clear"}', "bad_message"),
    ('{"type": "session.create", "version": %s}' % ("[" * 100_000), "bad_message"),
    ("x" * 100_000, "bad_message"),
    (b"\xff\xfe" * 100, "bad_message"),
    (b"", "bad_message"),
]


def test_no_text_causes_a_traceback(served, caplog):
    for message, code in HOSTILE:
        with connect(served.url) as client:
            client.send(message)
            error, closed = (json.loads(client.recv(timeout=10)) for _ in range(2))
            assert (error["type"], error["code"], error["fatal"]) == ("error", code, True), message
            assert closed == {"type": "session.closed", "reason": code}
            assert len(error["message"]) < 500
        request = urllib.request.Request(
            f"http://127.0.0.1:{served.port}/v1/rtc",
            message.encode(errors="replace") if isinstance(message, str) else message,
        )
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request, timeout=10)
        assert refused.value.code in (400, 401), message
    for headers in ({"Origin": "http://["}, {"Origin": "\xe9"}, {"authorization": "Bearer \xe9"}):
        assert served.get("/metrics", **headers)[0] == 401
    assert served.get("/%00")[0] == served.get("/" + "x" * 5000)[0] == 404
    with pytest.raises(InvalidStatus):
        connect(served.url, origin="http://[")
    assert not [r for r in caplog.records if r.exc_info or r.levelname == "ERROR"]


def test_strange_text_in_a_session_is_refused_and_the_session_goes_on(served, speaking, caplog):
    with served.client() as client:
        client.until("session.created")
        for field, value in (("text", "\ud83d"), ("text", "a\x07"), ("text", 10**40)):
            client.send("speech.create", **{field: value})
            error = client.until("error")
            assert error["code"] == "bad_message" and not error["fatal"]
        client.send("state.update", state="\ud83d")
        assert client.until("error")["code"] == "bad_message"
        client.send("speech.create", text="hello\n\t\U0001f600")
        client.until("playback_finished")
    assert not [r for r in caplog.records if r.exc_info]


def test_limits_that_end_a_session_are_errors_first(served, monkeypatch):
    monkeypatch.setattr(served.state, "idle_s", 0.3)
    with served.client() as client:
        error, closed = last_words(client)
        assert error["code"] == closed["reason"] == "idle" and "0.3 s" in error["message"]
    monkeypatch.undo()
    monkeypatch.setattr(served.state, "limits", Limits(messages_per_s=1.0))
    with served.client() as client:
        client.until("session.created")
        for _ in range(12):
            client.send("audio.commit")
        error, closed = last_words(client)
        assert error["code"] == "too_many_messages" and closed["reason"] == "too many messages"
    monkeypatch.setattr(served.state, "limits", Limits(errors=2))
    with served.client() as client:
        client.until("session.created")
        for _ in range(3):
            client.send("nonsense")
        assert last_words(client)[0]["code"] == "too_many_errors"
    monkeypatch.undo()
    monkeypatch.setattr(served.state, "limits", Limits(first_message_s=0.2))
    with connect(served.url) as client:
        error, closed = (json.loads(client.recv(timeout=10)) for _ in range(2))
        assert error["code"] == "timeout" and closed["reason"] == "no session.create"


def test_a_client_that_breaks_off_causes_no_traceback(served, caplog):
    for begun in (False, True):
        client = served.client()
        if begun:
            client.until("session.created")
            client.speak(voice(1.0))
        client.socket.socket.close()  # no farewell
        assert served.wait_until_free() == 2
    assert not [r for r in caplog.records if r.exc_info or r.levelname == "ERROR"]


def test_output_that_is_not_finite_is_told_once(served, monkeypatch, caplog):
    def fetch(self):
        raise NotFinite("the output is NaN from frame 9 on.")

    with served.client() as client:
        client.until("session.created")
        monkeypatch.setattr(AvatarSession, "fetch", fetch)
        error, closed = last_words(client)
    assert error["code"] == "server_failure" and "not finite" in error["message"]
    assert closed["reason"] == "server failure"
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "from frame 9 on" in record.message and not record.exc_info
