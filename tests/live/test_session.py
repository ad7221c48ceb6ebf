import asyncio
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.layout import parse_layout
from jax_avatar.live.clock import Clock
from jax_avatar.live.session import LiveSession, LiveSettings
from jax_avatar.live.turn import State
from jax_avatar.streaming.session import AvatarSession
from jax_avatar.testing import save_model
from jax_avatar.weights.folder import load_model
from tests.live.helpers import (
    FPS,
    PER_FRAME,
    RATE,
    FastClock,
    events,
    finished,
    frames_of,
    recording,
    seconds,
    sound_of,
    voice,
    watch,
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sessions(folder):
    """Layout -> a warm session, made once."""

    @functools.cache
    def warm(layout):
        portrait = np.random.default_rng(0).uniform(-1, 1, (1, 1, 64, 64, 3)).astype(np.float32)
        session = AvatarSession(load_model(folder), portrait, parse_layout(layout, 4))
        session.warm_up()
        return session

    return warm


@pytest.fixture(params=["1", "5"])
def session(sessions, request):
    return sessions(request.param)


@pytest.fixture
def alone(sessions):
    """The session on one device only."""
    return sessions("1")


def live_on(session, encode_prompt=None, **settings):
    session.reset()
    settings = LiveSettings(**settings)
    return LiveSession(session, settings, encode_prompt=encode_prompt, clock=FastClock())


def replay(session, heard):
    """Video of all audio of a live session, streamed at once."""
    session.reset()
    return np.concatenate([*session.push(np.concatenate(heard)), *session.finish()])


def jumps_of(whole, got):
    """Jumps over dropped frames: `(index in what was shown, index in the whole)` of each."""
    jumps, at = [], 0
    for n, frame in enumerate(got):
        skipped = next(k for k in range(len(whole) - at) if (whole[at + k] == frame).all())
        if skipped:
            jumps.append((n, at + skipped))
        at += skipped + 1
    return jumps


def test_speech_is_spoken_whole_and_in_step_with_its_sound(session):
    live = live_on(session)

    async def run():
        async with live:
            idle = await watch(live, seconds(0.5))
            live.push_audio(voice(2.0), RATE)
            live.end_segment()
            return idle, await watch(live, finished)

    with recording(session) as heard:
        idle, talk = asyncio.run(run())
    assert not sound_of(idle).any()
    sound = sound_of(talk)
    first = np.flatnonzero(sound)[0]
    np.testing.assert_array_equal(sound[first : first + 2 * RATE], voice(2.0))
    for chunk in talk:
        assert len(chunk.sound) == len(chunk.frames) * PER_FRAME
    starts = [chunk.start_s for chunk in idle + talk]
    counts = [len(chunk.frames) for chunk in idle + talk]
    np.testing.assert_allclose(starts, np.cumsum([0, *counts[:-1]]) / FPS)
    (end,) = events(talk, "playback_finished")
    assert end.data == {"position_s": 2.0, "interrupted": False}
    assert [e.data["state"] for e in events(talk, "state")] == ["speaking", "idle"]
    # The frames are those of what was heard; only idle ones gave way, once, to speech.
    got, given = frames_of(idle + talk), np.concatenate(heard)
    ((jump, at),) = jumps_of(replay(session, heard), got)
    assert at - jump == live.stats.dropped > 0 and jump * PER_FRAME <= first + len(sound_of(idle))
    shown = sound_of(idle + talk)[jump * PER_FRAME :]
    np.testing.assert_array_equal(shown, given[at * PER_FRAME :][: len(shown)])


def test_an_interrupt_drops_speech_and_goes_on_in_silence(session):
    live = live_on(session)

    def speaking(chunks):
        return bool(events(chunks, "playback_started")) and len(chunks) > 3

    async def run():
        async with live:
            live.push_audio(voice(20.0), RATE)
            live.end_segment()
            before = await watch(live, speaking)
            position = live.clear()
            assert live.queued_s == 0 and live.state is State.INTERRUPTED and live.clear() == 0
            bridge = await watch(live, lambda chunks: live.state is State.IDLE)
            return before, position, bridge, await watch(live, seconds(2.5))

    with recording(session) as heard:
        before, position, bridge, after = asyncio.run(run())
    spoken = np.count_nonzero(sound_of(before)) / RATE
    assert position == pytest.approx(spoken, abs=1e-3) and position > 0
    assert not sound_of(bridge + after).any()
    told = events(bridge + after, "playback_finished")
    assert [e.data for e in told] == [{"position_s": position, "interrupted": True}]
    # Face and pose go on: it is one stream, with idle and then muted frames left out.
    got = frames_of(before + bridge + after)
    jumps = jumps_of(replay(session, heard), got)
    assert 1 <= len(jumps) <= 3 and sum(n >= len(frames_of(before)) for n, _ in jumps) == 1
    assert jumps[-1][1] - jumps[-1][0] == live.stats.dropped
    # What comes after the jump is the video of silence alone.
    _, at = jumps[-1]
    last = max(i for i, block in enumerate(heard) if block.any())
    assert at * PER_FRAME >= sum(map(len, heard[: last + 1])) - 2 * PER_FRAME


def test_a_microphone_is_heard_without_a_gap(alone):
    """Pieces of 20 ms, in real time."""
    live, samples = live_on(alone, target_delay_s=0.25), voice(3.0)

    async def speak():
        clock, sent = FastClock(), 0
        began = clock.now()
        while sent < len(samples):
            await asyncio.sleep(0.02 / clock.speed)
            come = round((clock.now() - began) * RATE)
            live.push_audio((samples[sent:come] * 32767).astype(np.int16), RATE)
            sent = come
        live.end_segment()

    async def run():
        async with live:
            await watch(live, seconds(1.3))
            talk, _ = await asyncio.gather(watch(live, finished), speak())
            return talk

    sound = sound_of(asyncio.run(run()))
    first = np.flatnonzero(sound)[0]
    np.testing.assert_allclose(sound[first : first + len(samples)], samples, atol=1e-4)
    assert live.stats.missing_s == 0


def test_unfinished_speech_that_stops_is_followed_by_silence_and_live_idling(alone):
    live = live_on(alone)

    async def run():
        async with live:
            live.push_audio(voice(1.0), RATE)
            return await watch(live, seconds(5))

    chunks = asyncio.run(run())
    frames, sound = frames_of(chunks), sound_of(chunks)
    assert not sound[-2 * RATE :].any() and live.state is State.SPEAKING
    assert 0 < live.stats.missing_s
    held = live.queued_s
    assert np.count_nonzero(sound) == pytest.approx((1.0 - held) * RATE, abs=3)
    same = (np.diff(frames[-2 * FPS :].astype(int), axis=0) == 0).all((1, 2, 3))
    assert not same.all(), "the picture froze"


def test_nothing_grows_while_nobody_takes_frames_or_hours_pass(alone):
    live = live_on(alone)

    async def run():
        async with live:
            await watch(live, seconds(1))
            await asyncio.sleep(1.5)  # nobody takes frames
            ready = live.ready_frames
            await watch(live, seconds(4))
            return ready, live.ready_frames

    with recording(alone) as heard:
        ready = asyncio.run(run())
    block = alone.format.block_frames
    assert max(ready) <= 4 * block and live.stats.late >= 1
    held = sum(map(len, heard)) - (live.stats.frames + live.stats.dropped) * PER_FRAME
    assert held <= 4 * block * PER_FRAME and 0 < alone.samples_wanted <= block * PER_FRAME
    assert len(heard) < 20


def test_a_prompt_is_encoded_aside_and_given_between_blocks(session):
    rng = np.random.default_rng(3)
    states = 5 * rng.normal(size=(1, 2, session.model.dit.config.text_width)).astype(np.float32)
    live = live_on(session, {"a woman sings": jnp.asarray(states)}.get)

    async def run():
        async with live:
            before = await watch(live, seconds(0.5))
            await live.set_prompt("a woman sings")
            return before + await watch(live, seconds(6))

    with recording(session) as heard:
        chunks = asyncio.run(run())
    assert len(events(chunks, "prompt_changed")) == 1
    (at,) = (n for n, block in enumerate(heard) if isinstance(block, str))
    blocks = [block for block in heard if isinstance(block, np.ndarray)]
    session.reset()
    plain, changed = [], []
    for video, prompt in ((plain, False), (changed, True)):
        session.reset()
        for n, block in enumerate(blocks):
            if prompt and n == at:
                session.set_text(jnp.asarray(states))
            video += session.push(block)
        video += session.finish()
    plain, changed = np.concatenate(plain), np.concatenate(changed)
    border = max(0, at * session.format.block_frames - 3)
    np.testing.assert_array_equal(plain[:border], changed[:border])
    assert (plain[border : border + 12] != changed[border : border + 12]).any()
    got = frames_of(chunks)
    np.testing.assert_array_equal(got, changed[: len(got)])


def test_models_without_prompts_and_closed_sessions_say_so(alone):
    live = live_on(alone)

    async def run():
        async with live:
            with pytest.raises(ValueError, match="takes no prompt"):
                await live.set_prompt("x")
        with pytest.raises(ValueError, match="is closed"):
            live.push_audio(voice(0.1), RATE)
        assert [chunk async for chunk in live] == []

    asyncio.run(run())


def test_a_failure_on_the_devices_reaches_whoever_watches(alone):
    live = live_on(alone)

    def feed(samples):
        raise RuntimeError("out of memory")

    async def run():
        with recording(alone):
            alone.feed = feed
            async with live:
                await watch(live, seconds(1))

    with pytest.raises(RuntimeError, match="out of memory"):
        asyncio.run(run())


def test_waiting_is_given_up_although_the_signal_comes_at_the_same_moment():
    async def run():
        signal = asyncio.Event()
        waiting = asyncio.create_task(Clock().wait(signal, 60))
        await asyncio.sleep(0.01)
        signal.set()
        waiting.cancel()
        await asyncio.sleep(0.01)
        assert waiting.cancelled()

    asyncio.run(run())
