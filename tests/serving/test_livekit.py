"""The avatar of a LiveKit agent, with the real package; only the server is replaced."""

import asyncio
import contextlib
import inspect
import json
import types

import numpy as np
import pytest

pytest.importorskip("livekit.agents")
from livekit import api, rtc
from livekit.agents.voice.avatar import (
    AudioSegmentEnd,
    DataStreamAudioOutput,
    VideoGenerator,
)

from jax_avatar.io.audio import LowLatencyResampler
from jax_avatar.io.watermark import mark
from jax_avatar.layout import parse_layout
from jax_avatar.live.session import LiveSession, LiveSettings
from jax_avatar.serving.links.livekit.access import avatar_token
from jax_avatar.serving.links.livekit.video import AvatarVideoGenerator
from jax_avatar.serving.links.livekit.worker import avatar_options, serve_room
from jax_avatar.streaming.session import AvatarSession
from jax_avatar.testing import save_model
from jax_avatar.weights.folder import load_model
from tests.live.helpers import FastClock, voice
from tests.serving.livekit_rooms import meet

RATE, FRAME_S = 24_000, 1 / 16


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    portrait = np.random.default_rng(0).uniform(-1, 1, (1, 1, 64, 64, 3)).astype(np.float32)
    model = load_model(save_model(tmp_path_factory.mktemp("model")))
    session = AvatarSession(model, portrait, parse_layout("1", 4))
    session.warm_up()
    return session


def live_on(session, speed=1.0, **settings):
    session.reset()
    settings = LiveSettings(chunk_frames=1, **settings)
    return LiveSession(session, settings, clock=FastClock(speed))


def pieces_of(samples, channels=1):
    """Pieces of 100 ms at 24 kHz, as an agent sends them."""
    for start in range(0, len(samples), RATE // 10):
        part = (samples[start : start + RATE // 10] * 32767).astype(np.int16)
        yield rtc.AudioFrame(np.repeat(part, channels).tobytes(), RATE, channels, len(part))


def samples_of(frame):
    return np.frombuffer(frame.data, np.int16) / 32768


def test_the_contract_is_the_packages():
    assert not AvatarVideoGenerator.__abstractmethods__
    for name in VideoGenerator.__abstractmethods__:
        theirs, ours = getattr(VideoGenerator, name), getattr(AvatarVideoGenerator, name)
        assert list(inspect.signature(theirs).parameters) == list(
            inspect.signature(ours).parameters
        )
    # `clear_buffer` may be either, says its annotation.
    assert inspect.iscoroutinefunction(AvatarVideoGenerator.push_audio)
    assert not inspect.iscoroutinefunction(AvatarVideoGenerator.__aiter__)


async def take(generator, until, limit_s=180):
    """Items until `until(all items so far)`."""
    got = []
    async with asyncio.timeout(limit_s):
        async for item in generator:
            got.append(item)
            if until(got):
                return got


def count(got, kind):
    return sum(isinstance(item, kind) for item in got)


@pytest.mark.parametrize("channels", [1, 2])
def test_a_segment_comes_as_pictures_with_their_sound_and_an_end(session, channels):
    speech = voice(1.2, rate=RATE)

    async def speak():
        async with live_on(session, 4.0) as live:
            generator = AvatarVideoGenerator(live)
            stream = aiter(generator)
            before = await take(stream, lambda got: count(got, rtc.VideoFrame) == 8)
            for piece in pieces_of(speech, channels):
                await generator.push_audio(piece)
            await generator.push_audio(AudioSegmentEnd())
            got = await take(stream, lambda got: count(got, AudioSegmentEnd))
            return before, got, await take(stream, lambda got: count(got, rtc.VideoFrame) == 8)

    before, got, after = asyncio.run(speak())
    assert count(before, rtc.AudioFrame) == count(after, rtc.AudioFrame) == 0
    assert (before[0].width, before[0].height) == (64, 64)
    sounds = [i for i, item in enumerate(got) if isinstance(item, rtc.AudioFrame)]
    # From the first to the last, each piece follows the picture that it belongs to.
    assert all(isinstance(got[i - 1], rtc.VideoFrame) for i in sounds)
    assert np.ptp(np.diff(sounds)) == 0 and isinstance(got[-1], AudioSegmentEnd)
    played = sum(got[i].duration for i in sounds)
    assert 1.2 <= played <= 1.2 + 2 * FRAME_S
    heard = np.concatenate([samples_of(got[i]) for i in sounds])
    resample = LowLatencyResampler(16_000)
    said = np.concatenate([resample(speech, RATE), resample.finish()])
    at = np.correlate(heard, said, "valid").argmax()
    np.testing.assert_allclose(heard[at : at + len(said)], said, atol=1e-3)


def test_frames_are_marked_unless_it_is_told_otherwise(session):
    async def first_frames(**options):
        async with live_on(session) as live:
            stream = aiter(AvatarVideoGenerator(live, **options))
            got = await take(stream, lambda got: count(got, rtc.VideoFrame) == 2)
        return np.stack([np.frombuffer(frame.data, np.uint8).reshape(64, 64, 3) for frame in got])

    marked, plain = (asyncio.run(first_frames(**o)) for o in ({}, {"is_marked": False}))
    np.testing.assert_array_equal(marked, mark(plain))
    assert (marked != plain).any()


def test_an_interrupt_ends_sound_at_once_and_speech_that_waited_is_dropped(session):
    async def interrupt():
        async with live_on(session, 4.0, most_waiting_s=2.0) as live:
            generator = AvatarVideoGenerator(live)
            stream = aiter(generator)

            is_over = False

            async def push():
                for piece in pieces_of(voice(6.0, rate=RATE)):
                    if not is_over:
                        await generator.push_audio(piece)

            pushing = asyncio.create_task(push())
            await take(stream, lambda got: count(got, rtc.AudioFrame) == 4)
            assert not pushing.done() and live.queued_s <= 2.0
            is_over = True
            stops = asyncio.create_task(generator.clear_buffer())
            # The piece that was taken last is put away when the next is asked for.
            await take(stream, lambda got: True)
            await stops
            await pushing
            await generator.push_audio(AudioSegmentEnd())
            silence = await take(stream, lambda got: count(got, rtc.VideoFrame) == 16)
            for piece in pieces_of(voice(0.5, rate=RATE)):
                await generator.push_audio(piece)
            await generator.push_audio(AudioSegmentEnd())
            again = await take(stream, lambda got: count(got, AudioSegmentEnd))
            return silence, again

    silence, again = asyncio.run(interrupt())
    assert count(silence, rtc.AudioFrame) == count(silence, AudioSegmentEnd) == 0
    played = sum(item.duration for item in again if isinstance(item, rtc.AudioFrame))
    assert 0.5 <= played <= 0.5 + 2 * FRAME_S


def test_an_agent_speaks_is_interrupted_and_leaves(session):
    """The package's sender, receiver, runner and synchroniser; only the rooms are ours."""

    async def converse():
        agent, avatar = meet()
        speech = DataStreamAudioOutput(agent, destination_identity="avatar", sample_rate=RATE,
                                       wait_playback_start=True)  # fmt: skip
        started, finished = asyncio.Queue(), asyncio.Queue()
        speech.on("playback_started", started.put_nowait)
        speech.on("playback_finished", finished.put_nowait)
        async with asyncio.timeout(180), live_on(session) as live:
            serving = asyncio.create_task(serve_room(live, avatar))
            for piece in pieces_of(voice(1.0, rate=RATE)):
                await speech.capture_frame(piece)
            speech.flush()
            await started.get()
            whole = await finished.get()
            for piece in pieces_of(voice(20.0, rate=RATE)):
                await speech.capture_frame(piece)
            await started.get()
            await asyncio.sleep(0.5)
            speech.clear_buffer()
            cut = await finished.get()
            await asyncio.sleep(0.2)
            assert live.queued_s == 0
            agent_there = avatar.remote_participants.pop("agent")
            avatar.emit("participant_disconnected", agent_there)
            await serving
        return avatar.local_participant, whole, cut

    avatar, whole, cut = asyncio.run(converse())
    assert avatar.published == ["avatar_audio", "avatar_video"]
    assert [method for method, _ in avatar.calls] == [
        "lk.playback_started", "lk.playback_finished", "lk.playback_started", "lk.playback_finished"
    ]  # fmt: skip
    assert json.loads(avatar.calls[1][1])["interrupted"] is False
    # Where pieces come late there are gaps, which count.
    assert whole.interrupted is False and 1.0 <= whole.playback_position < 4
    assert cut.interrupted is True and 0 < cut.playback_position < 15


@contextlib.asynccontextmanager
async def agent_with(session, **settings):
    """Output of an agent with a queue of its events, served by an avatar."""
    agent, avatar = meet()
    speech = DataStreamAudioOutput(agent, destination_identity="avatar", sample_rate=RATE,
                                   wait_playback_start=True)  # fmt: skip
    events = asyncio.Queue()
    for name in ("playback_started", "playback_finished"):
        speech.on(name, lambda event, name=name: events.put_nowait((name, event)))
    async with asyncio.timeout(60), live_on(session, **settings) as live:
        serving = asyncio.create_task(serve_room(live, avatar))
        yield speech, events
        avatar.emit("participant_disconnected", avatar.remote_participants.pop("agent"))
        await serving


async def say(speech, seconds):
    for piece in pieces_of(voice(seconds, rate=RATE)):
        await speech.capture_frame(piece)
    speech.flush()
    await asyncio.sleep(0)  # an agent has other things to do, too


def test_segments_in_quick_succession_are_finished_each(session):
    async def converse():
        async with agent_with(session, speed=2.0) as (speech, events):
            lengths = (0.6, 0.1, 0.4)
            for seconds in lengths:
                await say(speech, seconds)
            got = []
            while sum(name == "playback_finished" for name, _ in got) < len(lengths):
                got.append(await asyncio.wait_for(events.get(), 20))
            await asyncio.wait_for(speech.wait_for_playout(), 1)
            return lengths, [event for name, event in got if name == "playback_finished"]

    lengths, finished = asyncio.run(converse())
    for seconds, event in zip(lengths, finished, strict=True):
        assert not event.interrupted and event.playback_position >= seconds - 0.01


@pytest.mark.parametrize("segments", [1, 2])
def test_a_clear_before_any_sound_is_answered_at_once(session, segments):
    async def converse():
        async with agent_with(session) as (speech, events):
            await say(speech, 0.3)
            while (await events.get())[0] != "playback_finished":
                pass
            for _ in range(segments):
                await speech.capture_frame(next(iter(pieces_of(voice(0.02, rate=RATE)))))
                speech.flush()
            speech.clear_buffer()
            began = asyncio.get_running_loop().time()
            await speech.wait_for_playout()
            took = asyncio.get_running_loop().time() - began
            got = [events.get_nowait() for _ in range(events.qsize())]
            await say(speech, 0.3)  # and the next one is spoken
            while (last := await events.get())[0] != "playback_finished":
                pass
            return took, got, last[1]

    took, got, last = asyncio.run(converse())
    assert took < 1.0  # the agent gives up after two seconds
    assert [(name, event.interrupted) for name, event in got] == [
        ("playback_finished", True)
    ] * segments
    assert not last.interrupted and last.playback_position >= 0.29


def test_a_runner_that_fails_is_not_waited_for(session):
    async def fail():
        _, avatar = meet()
        async with asyncio.timeout(180), live_on(session) as live:
            serving = asyncio.create_task(serve_room(live, avatar, agent="agent"))
            await asyncio.sleep(0.1)
            stream = types.SimpleNamespace(attributes={}, stream_id="x")  # says nothing of its rate
            avatar.stream_handlers["lk.audio_stream"](types.SimpleNamespace(info=stream), "agent")
            await serving

    with pytest.raises(ValueError, match="sample_rate"):
        asyncio.run(fail())


def test_the_token_lets_the_avatar_publish_for_its_agent():
    claims = api.TokenVerifier("key", "s" * 32).verify(
        avatar_token("key", "s" * 32, "room 1", "avatar", agent="agent 7")
    )
    assert claims.identity == "avatar" and claims.video.room == "room 1"
    assert claims.video.room_join and claims.attributes == {"lk.publish_on_behalf": "agent 7"}


def test_options_say_what_the_tracks_hold(session):
    with contextlib.closing(asyncio.new_event_loop()):
        options = avatar_options(LiveSession(session))
    assert (options.video_width, options.video_height, options.video_fps) == (64, 64, 16)
    assert (options.audio_sample_rate, options.audio_channels) == (16_000, 1)
