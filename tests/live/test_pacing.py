"""Pacing without a device or a clock: beginnings of blocks, takeovers, lateness."""

import math
from dataclasses import replace

import pytest

from jax_avatar.live.jitter_buffer import SpeechStatus
from jax_avatar.live.pacing import (
    LiveSettings,
    Progress,
    StepTimes,
    reserve_s,
    seconds_to_block,
    seconds_to_delivery,
    takes_over,
)
from jax_avatar.streaming.format import StreamFormat

FORM = StreamFormat(16, 16_000, 64, 64, block_frames=12, piece_frames=4)
SETTINGS = LiveSettings(lead_s=0.3)
SILENCE = SpeechStatus(is_enough=False, is_starting=False, is_running=False)
STARTING = SpeechStatus(is_enough=True, is_starting=True, is_running=False)
RUNNING = SpeechStatus(is_enough=False, is_starting=False, is_running=True)


def wait(progress, speech=SILENCE, now=10.0, settings=SETTINGS):
    return seconds_to_block(FORM, settings, progress, speech, now)


def after_blocks(count, *, seconds=0.2, start=10.0):
    """Progress after blocks whose frames have come, but were not delivered."""
    progress = Progress()
    for _ in range(count):
        progress = progress.begin(FORM, SILENCE, 0.0).promise(3)
        for _ in range(3):
            progress = progress.receive(FORM, 4, seconds)
    return progress.start_at(start)


def test_blocks_begin_until_the_first_frames_are_ready():
    progress = Progress()
    assert wait(progress) == 0
    progress = progress.begin(FORM, SILENCE, 0.0).promise(3)
    assert wait(progress) == 0  # two may be under way
    progress = progress.begin(FORM, SILENCE, 0.0).promise(3)
    assert wait(progress) == math.inf
    progress = progress.receive(FORM, 1, 0.2)
    assert wait(progress) == math.inf
    assert seconds_to_delivery(FORM, progress.start_at(7.0), 7.0) == 0


def test_a_block_of_silence_begins_when_its_frames_are_due_less_the_time_it_takes():
    progress = after_blocks(1, seconds=0.2)
    assert wait(progress) == pytest.approx(0.75 - 0.2 + 0.5 / 16)
    assert wait(progress, now=10.5) == pytest.approx(0.25 - 0.2 + 0.5 / 16)
    progress = progress.begin(FORM, SILENCE, 0.0).promise(3)
    assert wait(progress) == pytest.approx(1.5 - 0.2 + 0.5 / 16)  # those under way count


def test_the_reserve_grows_with_what_is_known():
    steps = StepTimes()
    for seconds in (0.1, 0.1, 0.1, 0.5):
        steps = steps.add(seconds)
    assert steps.median_s == 0.1 < steps.usual_s < 0.5
    tolerance = 0.5 / 16
    assert reserve_s(FORM, SETTINGS, steps, SILENCE) == steps.usual_s - tolerance
    assert reserve_s(FORM, SETTINGS, steps, RUNNING) == steps.median_s - tolerance
    assert reserve_s(FORM, SETTINGS, steps, STARTING) == steps.usual_s + SETTINGS.lead_s
    for _ in range(16):  # slow blocks are forgotten
        steps = steps.add(0.2)
    assert len(steps.recent) == 16 and steps.median_s == steps.usual_s == 0.2


def test_no_block_begins_while_nobody_takes_frames():
    assert wait(after_blocks(2), STARTING) == 0
    assert wait(after_blocks(3), STARTING) == math.inf


def test_speech_after_silence_replaces_the_frames_that_are_ready():
    progress = after_blocks(2)
    assert takes_over(progress, STARTING) and not takes_over(progress, RUNNING)
    progress = progress.begin(FORM, STARTING, 0.0).promise(3)
    assert progress.is_overtaken and progress.ready == 24
    progress = progress.receive(FORM, 4, 0.2)
    assert not progress.is_overtaken and progress.ready == 4 and progress.stats.dropped == 24


def test_frames_of_blocks_before_the_takeover_are_kept_until_it():
    progress = after_blocks(1).begin(FORM, SILENCE, 0.0).promise(3)
    progress = progress.clear()
    assert wait(progress) == 0
    progress = progress.begin(FORM, SILENCE, 0.0).promise(3)
    assert not progress.is_cleared
    for _ in range(3):
        assert not progress.is_overtaken
        progress = progress.receive(FORM, 4, 0.2)
    assert progress.ready == 24 and progress.is_overtaken
    assert progress.receive(FORM, 4, 0.2).stats.dropped == 24


def test_in_a_pipeline_a_takeover_is_followed_until_it_comes():
    """A pipeline promises a block only when others have followed it."""
    progress = after_blocks(2).clear().begin(FORM, SILENCE, 0.0)
    assert progress.takeover == progress.promised == 6 and wait(progress) == 0
    progress = progress.begin(FORM, SILENCE, 0.0).promise(3)
    assert progress.takeover == 6 and wait(progress) > 0


def test_late_frames_put_off_all_others_but_not_within_a_frame():
    progress = after_blocks(1)
    assert seconds_to_delivery(FORM, progress, 10.0) == 0
    progress = progress.deliver(FORM, 2, 1 / 16)
    assert seconds_to_delivery(FORM, progress, 10.0) == 2 / 16 and progress.stats.late == 0
    progress = progress.deliver(FORM, 2, 0.2)
    assert seconds_to_delivery(FORM, progress, 10.0) == pytest.approx(4 / 16 + 0.2)
    assert (progress.stats.frames, progress.ready) == (4, 8)
    assert (progress.stats.late, progress.stats.late_s) == (1, 0.2)
    assert seconds_to_delivery(FORM, replace(progress, ready=0), 10.0) == math.inf


def test_missing_speech_and_the_duration_of_whole_blocks_are_counted():
    progress = Progress().begin(FORM, RUNNING, 0.05).begin(FORM, RUNNING, 0.1)
    assert progress.stats.missing_s == pytest.approx(0.15)
    for seconds in (0.1, 0.2, 0.3):
        assert progress.stats.step_s == 0
        progress = progress.receive(FORM, 4, seconds)
    assert progress.stats.step_s == 0.3 and progress.steps.recent == (0.1,)
