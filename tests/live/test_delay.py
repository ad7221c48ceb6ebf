"""Delay from a microphone to its picture, in simulated time."""

import asyncio

import numpy as np
import pytest

from tests.live.helpers import FPS, RATE, finished, seconds, sound_of, voice, watch
from tests.live.simulated import BLOCK, LOOKAHEAD, SimulatedClock, simulate, simulated_session

PIECE_S = 0.02


def block_times(least, most, seed=0):
    rng = np.random.default_rng(seed)
    return lambda: float(rng.uniform(least, most))


async def watch_timed(live, until):
    """Chunks, and the times of their delivery."""
    times = []

    def note(chunks):
        times.append(SimulatedClock().now())
        return until(chunks)

    return await watch(live, note), times


async def talk(live, samples, lateness=lambda: 0.0):
    """Microphone; returns its start time. Late pieces keep their order."""
    clock, piece = SimulatedClock(), round(PIECE_S * RATE)
    began = clock.now()
    for start in range(0, len(samples), piece):
        part = samples[start : start + piece]
        due = began + (start + len(part)) / RATE + lateness()
        await asyncio.sleep(max(0.0, due - clock.now()))
        live.push_audio(part, RATE)
    live.end_segment()
    return began


def converse(live, pauses, samples, lateness=lambda: 0.0):
    """Repeats an utterance after each pause; returns delays, gaps and all sound."""

    async def run():
        delays, gaps = [], []
        async with live:
            chunks = await watch(live, seconds(3))
            for pause in pauses:
                before = live.stats.missing_s
                talking = asyncio.create_task(talk_after(pause))
                more, times = await watch_timed(live, finished)
                loud = next(t for chunk, t in zip(more, times, strict=True) if chunk.sound.any())
                delays.append(loud - await talking)
                gaps.append(live.stats.missing_s - before)
                chunks += more
        return np.array(delays), np.array(gaps), sound_of(chunks)

    async def talk_after(pause):
        await asyncio.sleep(pause)
        return await talk(live, samples, lateness)

    return simulate(run())


PAUSES = np.linspace(1.0, 1.75, 16)


def test_a_microphone_waits_for_a_block_and_little_more_whenever_it_begins():
    least, most = 0.13, 0.17
    live = simulated_session(block_times(least, most))
    delays, gaps, sound = converse(live, PAUSES, voice(1.0))
    needed = BLOCK / FPS + LOOKAHEAD / RATE + most + PIECE_S
    assert needed - 0.16 < delays.min() and delays.max() < needed + 0.05
    assert gaps.max() == live.stats.late_s == 0
    heard = sound[np.abs(sound) > 0]
    np.testing.assert_array_equal(heard, np.tile(voice(1.0), len(PAUSES)))


def test_blocks_that_begin_to_take_longer_are_begun_sooner():
    """Only the first frames of slow blocks are late."""
    took = 0.14
    live = simulated_session(lambda: took)

    async def run():
        nonlocal took
        async with live:
            await watch(live, seconds(15))
            before = live.stats.late
            took = 0.4
            await watch(live, seconds(5))
            first = live.stats.late
            await watch(live, seconds(30))
            return before, first, live.stats.late

    before, first, after = simulate(run())
    assert before == 0 and 1 <= first <= 3 and after == first


def test_speech_that_comes_a_little_late_leaves_no_gap():
    live = simulated_session(block_times(0.13, 0.17))
    _, gaps, _ = converse(live, PAUSES, voice(2.0), block_times(0.0, 0.05, seed=3))
    assert gaps.max() == 0


def test_a_bad_network_leaves_gaps_only_until_it_is_known():
    """One piece in ten, and those behind it, come 0.2 s late."""
    live, rng = simulated_session(lambda: 0.14), np.random.default_rng(0)
    _, gaps, sound = converse(
        live, np.tile(PAUSES, 2), voice(2.0), lambda: 0.2 * (rng.uniform() < 0.1)
    )
    assert gaps[:8].any() and np.count_nonzero(gaps[8:]) <= 2
    heard = sound[np.abs(sound) > 0]
    np.testing.assert_array_equal(heard, np.tile(voice(2.0), 2 * len(PAUSES)))


@pytest.mark.parametrize("frames", [1, 2, 4])
def test_frames_come_at_their_time(frames):
    live = simulated_session(block_times(0.13, 0.17), chunk_frames=frames)

    async def run():
        async with live:
            return await watch_timed(live, seconds(10))

    chunks, times = simulate(run())
    off = np.array(times) - [chunk.start_s for chunk in chunks]
    assert live.stats.late == 0 and np.ptp(off) < 1 / FPS
