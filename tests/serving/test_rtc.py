"""WebRTC against a real server, by a real peer."""

import asyncio
from pathlib import Path

import numpy as np
import pytest

from jax_avatar.live.session import LiveChunk
from jax_avatar.serving import app
from jax_avatar.serving.links.webrtc import ice_server
from jax_avatar.serving.links.webrtc_tracks import ChunkPlayer
from jax_avatar.serving.messages import Limits
from jax_avatar.streaming.format import StreamFormat
from tests.live.helpers import voice
from tests.serving.rtc_client import Peer, post
from tests.serving.test_server import TOKEN, nothing_leaks, served  # noqa: F401


@pytest.fixture(autouse=True)
def loopback(monkeypatch):
    """No network is needed: peers meet on this machine's own address."""
    monkeypatch.setattr("aioice.ice.get_host_addresses", lambda **_: ["127.0.0.1"])


def test_what_is_said_into_the_microphone_is_seen_and_heard_in_sync(served):  # noqa: F811
    async def talk():
        async with Peer(served.port) as peer:
            assert (await peer.offer())[0] == 200
            created = await peer.until("session.created")
            assert created["fps"] == 16 and created["width"] == 64 and "mime" not in created
            await asyncio.sleep(1.5)
            assert not [e for e in peer.events if e["type"].startswith("playback")]
            peer.microphone.speech = voice(1.0, rate=48_000)
            started = await peer.until("playback_started")
            finished = await peer.until("playback_finished")
            await peer.hears(finished["at_s"] + 0.2)
            return peer, started, finished

    peer, started, finished = asyncio.run(talk())
    frames = np.stack(peer.frames)
    assert frames.shape[1:] == (64, 64, 3)
    steps = np.diff(peer.times) * 16  # a packet may get lost on a busy machine
    np.testing.assert_allclose(steps, np.maximum(1, steps.round()), atol=0.02)
    loud = peer.loud_s
    # What is said is played with the 0.2 s before it and the 0.6 s after it. On a busy machine
    # packets may be lost, and the microphone may stutter.
    assert 0.4 < len(loud) / 48_000 < 1.1
    assert -0.05 < loud[0] - started["at_s"] - 0.2 < 0.5
    assert 1.5 < finished["position_s"] < 2.0 and finished["interrupted"] is False


def test_an_interrupt_silences_the_tracks(served):  # noqa: F811
    async def talk():
        async with Peer(served.port) as peer:
            await peer.offer(sample_rate=16_000)
            await peer.until("session.created")
            peer.speak(voice(20.0))
            await peer.until("playback_started")
            await asyncio.sleep(0.5)
            peer.send("clear")
            cleared = await peer.until("cleared")
            await peer.hears(cleared["at_s"] + 0.5)
            peer.send("nonsense")
            assert (await peer.until("error"))["code"] == "bad_message"
            return peer, cleared

    peer, cleared = asyncio.run(talk())
    assert 0 < cleared["position_s"] < 15
    assert peer.loud_s[-1] <= cleared["at_s"] + 0.2


def test_seats_are_shared_with_the_other_protocol_and_freed_when_a_peer_leaves(served):  # noqa: F811
    async def visit():
        async with Peer(served.port) as one, Peer(served.port) as two:
            await one.offer()
            await one.until("session.created")
            with served.client() as other:
                await asyncio.to_thread(other.until, "session.created")
                status, error = await two.offer()
                assert status == 503 and error["code"] == "busy" and error["fatal"]
                levels = served.get("/metrics", Authorization="Bearer open sesame")[1]
                assert 'avatar_sessions{protocol="webrtc"} 1.0' in levels
                assert 'avatar_sessions{protocol="websocket"} 1.0' in levels
            assert await asyncio.to_thread(served.wait_until_free, 1) == 1
        assert await asyncio.to_thread(served.wait_until_free, 2) == 2

    asyncio.run(visit())


def test_a_peer_that_vanishes_leaves_nothing_behind(served, monkeypatch):  # noqa: F811
    monkeypatch.setattr(served.state, "limits", Limits(vanished_s=3.0))

    async def vanish():
        async with Peer(served.port) as peer:
            await peer.offer()
            await peer.until("session.created")
            peer.speak(voice(1.0))
            await peer.until("playback_started")
            for transceiver in peer.connection.getTransceivers():  # as if killed
                await transceiver.receiver.transport.transport.stop()  # ICE alone says no goodbye
            assert await asyncio.to_thread(served.wait_until_free) == 2

    asyncio.run(vanish())


def test_who_answers_no_checks_frees_the_seat(served, monkeypatch):  # noqa: F811
    monkeypatch.setattr(served.state, "limits", Limits(connect_s=1.0))

    async def offer_only():
        async with Peer(served.port) as peer:
            await peer.connection.setLocalDescription(await peer.connection.createOffer())
            sdp = peer.connection.localDescription.sdp
            post_it = asyncio.to_thread(
                post, served.port, "session.create", version=1, token="open sesame", sdp=sdp
            )
            assert (await post_it)[0] == 200
            assert served.wait_until_free(1, limit_s=0) == 1  # it holds a session until then
            assert await asyncio.to_thread(served.wait_until_free) == 2

    asyncio.run(offer_only())


def test_picture_and_sound_are_stamped_by_one_clock():
    player = ChunkPlayer(StreamFormat(16, 16_000, 16, 16, 12, 4))
    for k in range(8):  # each chunk shows and sounds its number
        frames = np.full((2, 16, 16, 3), 10 * k, np.uint8)
        sound = np.full(2000, k / 10, np.float32)
        player.play(LiveChunk(frames, sound, np.ones_like(sound), k / 8, ()))

    def taken(track):
        return [track.waiting.get_nowait() for _ in range(track.waiting.qsize())]

    pictures, sounds = taken(player.picture), taken(player.sound)
    assert len(pictures) == 16 and len(sounds) >= 48
    shown = {float(f.pts * f.time_base): f.to_ndarray(format="rgb24")[0, 0, 0] for _, f in pictures}
    for _, piece in sounds:
        at = piece.pts / 48_000 + 0.01
        if min(at % 0.125, -at % 0.125) < 0.02:
            continue  # half of it belongs to the neighbour
        heard = piece.to_ndarray().mean() / 32767
        number = shown[max(t for t in shown if t <= at)] / 10
        assert abs(heard - number / 10) < 0.01, (at, heard, number)
    # What is stamped alike is due together, up to the moment at which its chunk came.
    lags = [due - float(f.pts * f.time_base) for due, f in [*pictures, *sounds]]
    assert max(lags) - min(lags) < 1.0


@pytest.mark.parametrize("fields, status, code", [
    ({"token": "wrong"}, 401, "unauthorised"),
    ({"version": 2}, 400, "version"),
    ({}, 400, "bad_message"),
    ({"sdp": "v=0\r\nm=audio x"}, 400, "bad_message"),
    ({"sdp": "v=0\r\n"}, 400, "bad_message"),
    ({"sdp": 3}, 400, "bad_message"),
    ({"sdp": "x" * 60_000}, 413, "too_large"),
    ({"portrait": "AAAA"}, 400, "consent"),
    ({"portrait": "AAAA", "consent": True}, 400, "bad_portrait"),
    ({"path": "/etc/passwd"}, 400, "bad_message"),
])  # fmt: skip
def test_what_is_no_offer_is_refused_as_on_the_websocket(served, fields, status, code):  # noqa: F811
    got, error = post(
        served.port, "session.create", **({"version": 1, "token": "open sesame"} | fields)
    )
    assert (got, error["code"]) == (status, code), error


def test_servers_for_ice_are_understood_or_refused():
    assert ice_server("stun:stun.example.org:3478").username is None
    turn = ice_server("turn:me:se:cret@example.org:3478?transport=tcp")
    assert (turn.urls, turn.username, turn.credential) == (
        "turn:example.org:3478?transport=tcp", "me", "se:cret"
    )  # fmt: skip
    for url in (
        "example.org",
        "stun:me:secret@example.org",
        "turn:example.org",
        "http://x",
        "stun:",
    ):
        with pytest.raises(ValueError, match="expected stun:HOST"):
            ice_server(url)


def test_without_the_extra_the_answer_says_what_to_install(served, monkeypatch):  # noqa: F811
    monkeypatch.setattr(app, "serve_offer", None)
    status, error = post(served.port, "session.create", version=1)
    assert status == 501 and "webrtc" in error["message"]


@pytest.mark.slow
def test_the_documented_page_code_works_in_chromium(served, tmp_path):  # noqa: F811
    page = pytest.importorskip("tests.serving.page")
    if not (page.CHROMIUM and page.DRIVER):
        pytest.skip(page.PACKAGES)
    docs = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    code = docs.split("```js")[1].split("```")[0].replace("version: 1", "version: 1, token")
    page.write_wav(tmp_path / "voice.wav", voice(30.0, rate=48_000), 48_000)
    options = page.webdriver.ChromeOptions()
    options.binary_location = page.CHROMIUM
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--allow-loopback-in-peer-connection", "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream", "--autoplay-policy=no-user-gesture-required",
        f"--use-file-for-fake-audio-capture={tmp_path}/voice.wav",
    ):  # fmt: skip
        options.add_argument(flag)
    service = page.webdriver.ChromeService(executable_path=page.DRIVER)
    browser = page.webdriver.Chrome(options=options, service=service)
    try:
        browser.set_script_timeout(120)
        browser.get(f"http://127.0.0.1:{served.port}/")
        seen = browser.execute_async_script(
            """
            const [token, code, done] = arguments;
            const run = Object.getPrototypeOf(async () => {}).constructor;
            const events = [], log = (event) => events.push(event);
            const body = code.replace("console.log", "log") + "; return peer;";
            new run("token", "log", body)(token, log).then(async (peer) => {
                const video = document.querySelector("video");
                video.hidden = false; video.muted = true;
                await video.play();
                while (!events.some((event) => event.type === "playback_started"))
                  await new Promise((resolve) => setTimeout(resolve, 100));
                await new Promise((resolve) => setTimeout(resolve, 3000));
                const received = {};
                for (const part of (await peer.getStats()).values())
                  if (part.type === "inbound-rtp") received[part.kind] = part;
                done([events.map((event) => event.type), video.videoWidth, received]);
              }).catch((error) => done(String(error)));
            """,
            TOKEN,
            code,
        )
    finally:
        browser.quit()
    events, width, received = seen
    assert events[0] == "session.created" and "error" not in events and width == 64
    assert received["video"]["framesDecoded"] > 16 and received["audio"]["packetsReceived"] > 50
