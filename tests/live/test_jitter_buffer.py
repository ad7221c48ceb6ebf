import numpy as np
import pytest

from jax_avatar.live.jitter_buffer import JitterBuffer, pcm_samples
from jax_avatar.live.turn import State, TurnState
from jax_avatar.streaming.sample_queue import SampleQueue

RATE = 16_000


def voice(seconds, rate=RATE, seed=1):
    return np.random.default_rng(seed).uniform(-1, 1, round(seconds * rate)).astype(np.float32)


def test_samples_leave_in_order_whatever_the_pieces():
    queue, samples = SampleQueue(), voice(0.5)
    for piece in np.split(samples, [1, 3, 1000, 1000, 5000]):
        queue.append(piece)
    parts = [queue.take(n) for n in (0, 2, 999, 4000, 9999)]
    assert [len(part) for part in parts] == [0, 2, 999, 4000, len(samples) - 5001]
    np.testing.assert_array_equal(np.concatenate(parts), samples)
    assert len(queue) == 0


@pytest.mark.parametrize("rate", [16_000, 24_000, 48_000])
@pytest.mark.parametrize("milliseconds", [1, 37, 10_000])
def test_a_stream_is_resampled_as_the_whole(rate, milliseconds):
    def resampled(size):
        queue, samples = JitterBuffer(RATE), voice(1.0, rate)
        for start in range(0, len(samples), size):
            queue.append(samples[start : start + size], rate)
        queue.end_segment()
        return queue.take(len(queue)).samples

    whole = resampled(rate)
    assert len(whole) == pytest.approx(RATE, abs=2)
    np.testing.assert_allclose(resampled(rate * milliseconds // 1000), whole, atol=1e-6)


def test_speech_that_begins_comes_last_and_goes_on_without_a_gap():
    queue, samples = JitterBuffer(RATE, target_delay=100), voice(0.2)
    queue.append(samples[:1100], RATE)
    first = queue.take(3000)
    assert not first.samples[:2000].any() and first.missing == 0
    queue.append(samples[1100:], RATE)
    queue.end_segment()
    rest = queue.take(3000)
    spoken = np.concatenate([first.samples[first.marks > 0], rest.samples[rest.marks > 0]])
    np.testing.assert_array_equal(spoken, samples)
    assert first.marks[-1] == rest.marks[0] == 1 and rest.marks[-1] == 0


def test_speech_begins_only_with_something_in_hand():
    queue, samples = JitterBuffer(RATE, target_delay=100), voice(0.1)
    queue.append(samples[:1000], RATE)
    assert queue.status(900).is_enough and not queue.status(901).is_enough
    spoken = queue.take(950)
    np.testing.assert_array_equal(spoken.samples[50:], samples[:900])
    assert not spoken.samples[:50].any() and len(queue) == 100
    assert queue.status(100).is_enough and not queue.status(101).is_enough  # without a delay
    queue.end_segment()
    assert queue.status(1000).is_enough


def test_speech_behind_other_speech_puts_no_gap_into_that():
    queue, samples = JitterBuffer(RATE, target_delay=100), voice(0.2)
    queue.append(samples[:2000], RATE)
    queue.end_segment()
    first = queue.take(1000)
    queue.append(samples[2000:2300], RATE)
    spoken = [first, queue.take(1200)]
    assert all(part.marks[:1000].all() for part in spoken)


def test_speech_that_runs_dry_leaves_one_gap_and_loses_nothing():
    queue, samples = JitterBuffer(RATE, target_delay=100), voice(0.5)
    queue.append(samples[:2000], RATE)
    parts = [queue.take(1000), queue.take(1500)]
    assert parts[1].missing == 1500 - 900 and parts[1].marks[0] == 1
    queue.append(samples[2000:], RATE)
    queue.end_segment()
    parts += [queue.take(1500) for _ in range(5)]
    spoken = np.concatenate([part.samples[part.marks > 0] for part in parts])
    np.testing.assert_array_equal(spoken, samples)
    assert [part.missing for part in parts[2:]] == [0] * 5


def test_every_segment_ends_when_its_last_sample_is_played():
    queue = JitterBuffer(RATE)
    for seconds in (0.5, 0.25):
        queue.append(voice(seconds), RATE)
        queue.end_segment()
    queue.end_segment()  # nothing new: no segment
    queue.take(RATE)
    assert queue.play(7999) == [] and queue.play(1) == [0.5]
    assert queue.played_s == 0 and queue.play(4000) == [0.25] and queue.is_silent


@pytest.mark.parametrize(
    ("pcm", "rate", "message"),
    [
        (b"abc", RATE, "3 bytes"),
        (np.zeros((2, 10), np.float32), RATE, "one channel"),
        (np.zeros(10, np.int32), RATE, "int32"),
        (np.full(10, np.nan, np.float32), RATE, "NaN"),
        (np.zeros(10, np.int16), 100, "100 Hz"),
        (np.zeros(RATE * 3, np.int16), RATE, "wait already"),
    ],
)
def test_audio_that_cannot_be_is_refused(pcm, rate, message):
    queue = JitterBuffer(RATE, capacity=2 * RATE)
    with pytest.raises(ValueError, match=message):
        queue.append(pcm, rate)
    assert len(queue) == 0 and not queue.is_open


def test_pcm_of_any_kind_is_the_same_sound():
    samples = np.array([-32768, -1, 0, 1, 32767], np.int16)
    expected = samples / 32768
    for pcm in (samples, samples.tobytes(), expected.astype(np.float32), expected):
        np.testing.assert_allclose(pcm_samples(pcm), expected, atol=1e-7)


def test_an_avatar_that_speaks_must_be_interrupted_before_it_listens():
    turn = TurnState()
    assert turn.to(State.LISTENING) and turn.to(State.THINKING) and turn.to(State.SPEAKING)
    assert not turn.to(State.SPEAKING)
    with pytest.raises(ValueError, match="speaking cannot become listening"):
        turn.to(State.LISTENING)
    assert turn.to(State.INTERRUPTED) and turn.to(State.LISTENING) and turn.to(State.IDLE)


def test_floats_in_the_range_of_integers_are_refused():
    np.testing.assert_array_equal(pcm_samples(np.array([0.5, -3.0, 15.0])), [0.5, -1, 1])
    with pytest.raises(ValueError, match=r"floats up to 3\.277e\+04; expected \[-1, 1\]"):
        pcm_samples(np.array([0.0, -32767.0], np.float32))
