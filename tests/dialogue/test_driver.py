"""A whole conversation in simulated time, with a live session without devices."""

import asyncio
import contextlib
import random
import threading
import time

import numpy as np
import pytest

from jax_avatar.dialogue.agent import AgentSettings
from jax_avatar.dialogue.driver import Dialogue, Parts, Threads
from jax_avatar.dialogue.reaction import ACTIONS, STABLE, DialogueState, Reaction
from jax_avatar.dialogue.think import Action, Sentence, ThinkError
from jax_avatar.live.turn import State
from tests.dialogue.test_hearing import loud, seconds
from tests.live.simulated import SimulatedClock, simulate, simulated_session

NOD = ACTIONS["nod"]
SITUATION = DialogueState().situation


class Mind:
    """Answers after a delay, or fails in one of many ways; counts what it leaves open."""

    def __init__(self, say=("Yes, I do.", "And you?"), fails="", pause_s=0.1):
        self.say, self.fails, self.pause_s, self.heard, self.states, self.open = (
            say,
            fails,
            pause_s,
            [],
            [],
            0,
        )

    async def __call__(self, heard, state):
        self.heard.append(heard)
        self.states.append(state)
        self.open += 1
        try:
            if self.fails == "silent":
                await asyncio.sleep(1e6)
            if self.fails == "at_once":
                raise ThinkError("no network")
            if self.fails == "bug":
                raise RuntimeError("secret words")
            await asyncio.sleep(0.3)
            yield Action(NOD)
            for text in self.say:
                yield Sentence(text)
                await asyncio.sleep(self.pause_s)
                if self.fails == "gone":
                    raise ThinkError("gone")
                if self.fails == "ends":
                    return
            yield Reaction(action=NOD, say=" ".join(self.say), stable=STABLE, state=SITUATION)
        finally:
            self.open -= 1


class Talk:
    """A conversation; a context manager that runs it in simulated time."""

    def __init__(self, mind=None, hear=lambda samples: "Do you agree?", speak=None, **settings):
        self.live = simulated_session(lambda: 0.2)
        speak = speak or (lambda text: (seconds(1.0, 0.1), 16_000))
        self.mind = mind or Mind()
        parts = Parts(hear, lambda: loud, self.mind, speak, AgentSettings(**settings))
        self.dialogue = Dialogue(self.live, parts, clock=SimulatedClock(), call=self.call)
        self.told, self.states, self.sound = [], [], []
        self.hangs = set()  # functions that never return

    async def call(self, limit_s, function, *arguments):
        async with asyncio.timeout(limit_s):
            await asyncio.sleep(1e6 if function in self.hangs else 0.2)
            return function(*arguments)

    async def __aenter__(self):
        await self.live.__aenter__()
        self.tasks = [asyncio.create_task(x) for x in (self.show(), self.dialogue.run())]
        await asyncio.sleep(1)
        return self

    async def __aexit__(self, *exception):
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        assert not self.dialogue._tasks and not self.mind.open
        await self.live.close()

    async def show(self):
        async for chunk in self.live:
            self.dialogue.show(chunk)
            self.sound.append((self.now, float(np.abs(chunk.sound).max(initial=0))))
            self.states += [e.data["state"] for e in chunk.events if e.name == "state"]

    @property
    def now(self):
        return asyncio.get_running_loop().time()

    @property
    def state(self):
        return self.dialogue.agent.state

    async def say(self, duration_s, quiet_s=1.0):
        """Sound of the user in real time, then quiet."""
        for level, length in ((0.1, duration_s), (0.0, quiet_s)):
            for _ in range(round(length / 0.02)):
                self.dialogue.hear(seconds(0.02, level, seed=None))
                await asyncio.sleep(0.02)

    async def until(self, state, limit_s=60.0):
        async with asyncio.timeout(limit_s):
            while self.state is not state:
                await asyncio.sleep(0.02)

    def messages(self):
        while not self.dialogue.messages.empty():
            self.told.append(self.dialogue.messages.get_nowait())
        return self.told

    def kinds(self):
        return [kind for kind, _ in self.messages()]


def test_a_question_is_answered():
    async def run():
        async with Talk() as talk:
            await talk.say(1.5)
            await talk.until(State.SPEAKING)
            await talk.until(State.IDLE)
            assert talk.states == ["listening", "thinking", "speaking", "idle"]
            assert talk.kinds() == ["heard", "turn", "turn.timing"]
            timing = talk.told[2][1]
            parts = {k: v for k, v in timing.items() if k not in ("id", "react")}
            assert sum(parts.values()) == pytest.approx(timing["react"], abs=0.04)
            assert timing["react"] < 2.0 and timing["endpoint"] == pytest.approx(0.5, abs=0.05)
            memory = talk.dialogue.agent.memory
            assert memory.spoken == "Yes, I do. And you?" and memory.completed
            heard = sum(1 for _, level in talk.sound if level) / 8  # chunks of 1/8 s
            assert heard == pytest.approx(2.0, abs=0.3)
            # The next turn knows this one.
            talk.dialogue.type("And now?")
            await talk.until(State.SPEAKING)
            assert talk.mind.states[1].turns[0].heard == "Do you agree?"

    simulate(run())


def test_a_voice_interrupts_and_the_sound_stops():
    async def run():
        async with Talk(Mind(say=("Yes.",) * 9, pause_s=0.9)) as talk:
            await talk.say(1.0)
            await talk.until(State.SPEAKING)
            await asyncio.sleep(1.2)
            began = talk.now
            await talk.say(0.3)  # a short noise changes nothing
            assert talk.state is State.SPEAKING
            began = talk.now
            await talk.say(1.0, quiet_s=0.0)
            assert talk.state in (State.INTERRUPTED, State.LISTENING)
            last = max(at for at, level in talk.sound if level)
            assert last - began < 0.4 + 0.3
            assert talk.mind.open == 0
            await talk.say(0.0, quiet_s=0.6)
            await talk.until(State.THINKING)
            assert talk.mind.states[1].interrupted_at_s > 1 and not talk.mind.states[1].completed
            await talk.until(State.SPEAKING)
            await talk.until(State.IDLE)

    simulate(run())


@pytest.mark.parametrize(
    ("mind", "says"),
    [
        (Mind(fails="silent"), "the answer took too long"),
        (Mind(fails="at_once"), "no network"),
        (Mind(fails="bug"), "the answer failed"),
        (Mind(fails="gone"), "gone"),
        (Mind(fails="ends"), "the answer ended early"),
    ],
    ids=lambda x: getattr(x, "fails", None),
)
def test_a_mind_that_fails_is_told_once_and_it_listens_again(mind, says):
    async def run():
        async with Talk(mind) as talk:
            await talk.say(1.0)
            await talk.until(State.SPEAKING)  # the fallback, or what was said before
            await talk.until(State.IDLE)
            errors = [data["message"] for kind, data in talk.messages() if kind == "error"]
            assert errors == [says]
            mind.fails = ""
            await talk.say(1.0)
            await talk.until(State.SPEAKING)

    simulate(run())


def test_a_voice_that_fails_or_hangs_costs_its_turn():
    def mute(text):
        raise ValueError("no voice today")

    def none(text):
        return [], 16_000

    def wrong(text):
        return np.full(100, np.nan), 16_000

    async def run(speak, hangs, says):
        async with Talk(speak=speak, speak_s=2.0) as talk:
            talk.hangs |= {speak} if hangs else set()
            frames = talk.live.stats.frames
            talk.dialogue.type("Hello")
            await talk.until(State.THINKING)
            await talk.until(State.IDLE, limit_s=8.0)
            assert [d["message"] for k, d in talk.messages() if k == "error"] == [says]
            await asyncio.sleep(1)
            assert talk.live.stats.frames > frames  # the frame loop goes on

    simulate(run(mute, False, "no voice today"))
    simulate(run(none, False, "speech came without a sound."))
    simulate(run(wrong, False, "audio holds NaN or infinity; expected floats in [-1, 1]."))
    simulate(run(lambda text: None, True, "speech took too long"))


def test_ears_that_hear_nothing_or_fail_ask_nothing():
    def deaf(samples):
        raise ValueError("no network")

    async def run(hear, says):
        async with Talk(hear=hear) as talk:
            await talk.say(1.0)
            await talk.until(State.IDLE)
            assert [d["message"] for k, d in talk.messages() if k == "error"] == says
            assert not talk.mind.heard

    simulate(run(lambda samples: "", []))
    simulate(run(deaf, ["no network"]))


def test_a_pause_is_transcribed_before_it_is_known_as_the_end():
    async def run():
        lengths = []

        def hear(samples):
            lengths.append(len(samples) / 16_000)
            return "Do you agree?"

        async with Talk(hear=hear) as talk:
            await talk.say(1.0, quiet_s=0.3)
            await talk.say(1.0)
            await talk.until(State.SPEAKING)
            assert lengths == pytest.approx([1.2, 2.5], abs=0.1)  # once a pause, not at the end
            timing = dict(talk.messages())["turn.timing"]
            assert timing["transcript"] < 0.05  # it takes 0.2 s, in the half second of quiet
            await talk.until(State.IDLE)
            talk.hangs = {hear}
            await talk.say(1.0)
            await talk.until(State.IDLE, limit_s=10)
            assert dict(talk.messages())["error"]["message"] == "speech recognition took too long"

    simulate(run())


def test_an_action_without_words_is_shown():
    async def run():
        async with Talk(Mind(say=())) as talk:
            talk.dialogue.type("Nod")
            await talk.until(State.SPEAKING)
            began = talk.now
            await talk.until(State.IDLE)
            assert talk.now - began == pytest.approx(2.0, abs=0.3)

    simulate(run())


def test_a_hundred_interrupts_leave_nothing_behind():
    async def run():
        rng, pushed = random.Random(0), []
        async with Talk() as talk:
            push = talk.live.push_audio
            talk.live.push_audio = lambda *pcm: pushed.append(talk.state) or push(*pcm)
            for _ in range(100):
                talk.dialogue.type("Hello")
                await asyncio.sleep(rng.uniform(0, 3))
                talk.dialogue.clear()
                await asyncio.sleep(rng.uniform(0, 0.5))
            await talk.until(State.IDLE)
            assert len(talk.dialogue._tasks) == 2  # voice and prompts, which always run
            assert talk.dialogue.agent.number == 100
            assert pushed and set(pushed) <= {
                State.THINKING,
                State.SPEAKING,
            }  # nothing after its turn
            talk.messages()
            talk.dialogue.type("Hello")
            await talk.until(State.SPEAKING)

    simulate(run())


@pytest.mark.slow
def test_an_hour_of_talk_leaves_nothing_behind():
    async def run():
        rng = random.Random(0)
        async with Talk() as talk:
            turns, sizes = 0, []
            while talk.now < 3600:
                talk.hangs = {talk.dialogue._parts.speak} if rng.random() < 0.1 else set()
                talk.mind.fails = rng.choice(["", "", "", "silent", "at_once", "bug", "gone"])
                await talk.say(rng.uniform(0.2, 3), quiet_s=rng.uniform(0.2, 3))
                with contextlib.suppress(TimeoutError):  # not every sound is answered
                    if rng.random() < 0.5:
                        await talk.until(State.SPEAKING, limit_s=5)
                await talk.until(State.IDLE, limit_s=120)
                turns += 1
                agent = talk.dialogue.agent
                sizes.append(len(talk.dialogue._tasks) + len(agent.memory.turns) + len(agent.times))
            talk.messages()
            assert turns > 200 and max(sizes[50:]) <= max(sizes[:50]) <= 20
            assert talk.live.time_s == pytest.approx(talk.now, abs=2)  # the picture never waits

    simulate(run())


def test_prompts_follow_the_speech():
    async def run():
        prompts = []
        talk = Talk()

        async def set_prompt(text):
            prompts.append((talk.state, text))

        talk.live.set_prompt = set_prompt
        talk.dialogue._takes_prompt = True
        async with talk:
            talk.dialogue.type("Nod")
            await talk.until(State.SPEAKING)
            await talk.until(State.IDLE)
            await asyncio.sleep(0.1)
        assert prompts == [(State.THINKING, NOD), (State.IDLE, STABLE)]

    simulate(run())


def test_a_call_that_hangs_is_left_alone():
    async def run():
        call, release = Threads(most=2), threading.Event()
        assert await call(5.0, lambda x: x + 1, 1) == 2
        with pytest.raises(ZeroDivisionError):
            await call(5.0, lambda: 1 / 0)
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await call(0.01, release.wait)
        with pytest.raises(ValueError, match="have not ended"):
            await call(5.0, lambda: 1)
        release.set()
        ends = time.monotonic() + 5
        while time.monotonic() < ends:
            with contextlib.suppress(ValueError):
                assert await call(5.0, lambda: 1) == 1
                return
            await asyncio.sleep(0.01)
        raise AssertionError("never free again")

    asyncio.run(run())
