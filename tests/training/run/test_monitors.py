import json

import jax.numpy as jnp
import numpy as np
import pytest

from jax_avatar.training.run.loop import train
from jax_avatar.training.run.monitors import (
    ALARMS,
    add_clips,
    add_scores,
    bin_shares,
    find_alarms,
    measure_clips,
    measure_data,
    new_monitor,
    summarise,
)
from jax_avatar.training.run.step import LoopConfig
from tests.training.run.test_guards import StumblingTask

FRAMES, CHANNELS = 3, 4
SHAPE = (40, 9, 4, 4, CHANNELS)


def make_clips(seed=0):
    """Clips whose channels have means and contrasts of their own, a little different in each."""
    rng = np.random.default_rng(seed)
    mean = np.arange(CHANNELS) + 0.2 * rng.standard_normal((SHAPE[0], 1, 1, 1, CHANNELS))
    return (mean + rng.standard_normal(SHAPE)).astype(np.float32)


DATA = measure_data(make_clips(), FRAMES)


def figures_of(clips):
    watch = add_clips(new_monitor(CHANNELS), jnp.asarray(clips), jnp.array(True), FRAMES)
    figures = summarise(watch, 0, DATA, every=1, max_critic_steps=10)[1]
    return {name: float(value) for name, value in figures.items()}


def darker_by_block(clips):
    return clips - 0.5 * np.repeat(np.arange(3), FRAMES)[:, None, None, None]


def jumping(clips):
    sign = np.repeat([1, -1, 1], FRAMES)[:, None, None, None]
    return clips * 0.3 + 2 * sign


def still(clips):
    return np.repeat(clips[:, :1], SHAPE[1], axis=1)


def test_other_clips_of_the_same_kind_set_no_alarm():
    figures = figures_of(make_clips(1))
    assert not any(find_alarms(figures).values())
    assert figures["monitor/motion"] == pytest.approx(1, abs=0.02)
    assert figures["monitor/border_jump"] == pytest.approx(1, abs=0.02)
    assert figures["monitor/slope"] < 0.05 and figures["monitor/mean_shift"] < 1


LAST = np.array([0, 0, 0, 0.4], np.float32)  # one channel, so that clips move hardly more


@pytest.mark.parametrize(
    ("change", "alarm"),
    [
        (still, "motion"),
        (lambda clips: clips + np.array([0, 0, 0.8, 0], np.float32), "mean_shift"),
        (lambda clips: clips + LAST * (clips - clips.mean((1, 2, 3), keepdims=True)), "std_shift"),
    ],
)
def test_what_goes_wrong_sets_its_alarm(change, alarm):
    found = find_alarms(figures_of(change(make_clips(1))))
    assert found[alarm].startswith(f"monitor/{alarm} is ")
    assert [name for name, text in found.items() if text] == [alarm]
    assert set(found) == {name for name, *_ in ALARMS}


def test_drift_jumps_and_large_values_are_measured():
    clips = make_clips(1)
    assert figures_of(darker_by_block(clips))["monitor/slope"] == pytest.approx(0.5, abs=0.05)
    assert figures_of(jumping(clips))["monitor/border_jump"] > 5
    measured = measure_clips(jnp.asarray(clips).at[:, 0, 0, 0, 0].set(5.0), FRAMES)
    base = measure_clips(jnp.asarray(clips).at[:, 0, 0, 0, 0].set(0.0), FRAMES)
    np.testing.assert_allclose(measured["large"] - base["large"], 1 / clips[0].size, rtol=1e-4)


def test_clips_that_left_early_do_not_count():
    watch = new_monitor(CHANNELS)
    for clips, is_final in ((make_clips(1), True), (jnp.full(SHAPE, jnp.nan), False)):
        watch = add_clips(watch, jnp.asarray(clips), jnp.array(is_final), FRAMES)
    figures = summarise(watch, 0, DATA, every=1, max_critic_steps=10)[1]
    assert float(figures["monitor/motion"]) == pytest.approx(
        figures_of(make_clips(1))["monitor/motion"]
    )


def test_errors_are_compared_bin_by_bin_however_they_come():
    sigma = jnp.array([0.3, 0.7, 0.9, 0.98, 0.97])
    critic, teacher = jnp.array([1.0, 2, 3, 4, 6]), jnp.array([2.0, 2, 2, 2, 3])
    at_once = add_scores(new_monitor(CHANNELS), sigma, critic, teacher, 5.0)
    parts = new_monitor(CHANNELS)
    for part in (slice(0, 2), slice(2, 5)):
        parts = add_scores(parts, sigma[part], critic[part], teacher[part], 5.0)
    _, figures = summarise(parts, 0, None, every=1, max_critic_steps=10)
    np.testing.assert_allclose(parts.critic, at_once.critic)
    assert [float(figures[f"monitor/gap_bin{i}"]) for i in range(4)] == [0.5, 1.0, 1.5, 2.0]
    assert float(figures["monitor/gap"]) == pytest.approx(16 / 11)
    shares = bin_shares(sigma, 5.0)
    np.testing.assert_allclose([shares[f"level_bin{i}"] for i in range(4)], [0.2, 0.2, 0.2, 0.4])
    broken = add_scores(parts, sigma, critic.at[1].set(jnp.nan), teacher, 5.0)
    assert np.isfinite(broken.critic).all()


def test_a_critic_that_lags_learns_more_often_until_it_has_caught_up():
    watch, steps = new_monitor(CHANNELS), []
    for number, gap in enumerate([1.1] * 5 + [None] + [0.9] * 4):
        for step in range(3 * number, 3 * number + 3):
            if gap:
                one = jnp.ones(1)
                watch = add_scores(watch, 0.5 * one, gap * one, one, 5.0)
            watch, figures = summarise(watch, step, None, every=3, max_critic_steps=10)
            assert np.isfinite(figures["monitor/gap"]) == bool(gap and step % 3 == 2)
        steps.append(int(watch.critic_steps))
        assert not watch.critic.any() and not watch.teacher.any()
    assert steps == [2, 4, 8, 10, 10, 10, 5, 2, 1, 1]


def test_clips_that_move_too_much_ring_as_those_that_move_too_little_do():
    said = {v: find_alarms({"monitor/motion": v})["motion"] for v in (0.4, 0.6, 1.2, 1.3)}
    assert said[0.6] == said[1.2] == ""
    assert "below 0.5" in said[0.4] and "above 1.25" in said[1.3]


class AlarmingTask(StumblingTask):
    """Has a monitor that is reviewed every fourth step and goes wrong in between."""

    def loss(self, params, batch, key):
        value, _ = super().loss(params, batch, key)
        motion = jnp.where(batch["number"] % 4 == 3, batch["motion"], jnp.nan)
        return value, {"monitor/motion": motion}

    def batches(self, step):
        motion = np.float32(0.3 if 8 <= step < 16 else 0.8)
        return super().batches(step) | {"number": np.int32(step), "motion": motion}


def test_an_alarm_is_one_line_a_metric_and_in_the_bar(tmp_path, caplog, capfd):
    config = LoopConfig(num_steps=20, warmup_steps=0, log_every=2, checkpoint_every=20)
    train(AlarmingTask(bad=(0, 0)), config, tmp_path)
    warnings = [record.message for record in caplog.records if "monitor/" in record.message]
    assert warnings == ["step 12: monitor/motion is 0.3, below 0.5: clips move too little"]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    seen = {line["step"]: line.get("alarm/motion") for line in lines}
    assert seen == {2: None, 4: 0, 6: None, 8: 0, 10: None, 12: 1, 14: None, 16: 1, 18: None, 20: 0}
    assert all(("monitor/motion" in line) == (line["step"] % 4 == 0) for line in lines)
    bar = capfd.readouterr().err.split("\r")[-1]
    # Step, total, time gone and left, speed, loss.
    assert "20/20" in bar and "<" in bar and "step" in bar and "loss=" in bar
