"""Turn-taking by a simulated clock: every (state, event) pair, every time-out, random events."""

import random
import subprocess
import sys
from dataclasses import replace
from typing import get_args

import pytest

from jax_avatar.dialogue.agent import (
    Act,
    ActionKnown,
    Agent,
    AgentSettings,
    Ask,
    Cleared,
    DropVoice,
    EndSegment,
    Event,
    Heard,
    HearFailed,
    PlaybackFinished,
    PlaybackStarted,
    Prompt,
    ReactionKnown,
    Say,
    SentenceKnown,
    Show,
    Silence,
    SilenceShown,
    SpeakFailed,
    Spoken,
    StopThinking,
    Tell,
    ThinkFailed,
    TimePassed,
    Transcribe,
    Typed,
    VoiceBegan,
    VoiceEnded,
    VoiceLasts,
    deadline,
    step,
)
from jax_avatar.dialogue.reaction import ACTIONS, STABLE, Reaction, Situation
from jax_avatar.live.turn import State

SETTINGS = AgentSettings()
NOD = ACTIONS["nod"]


def reaction(say="Yes, I do.", action=NOD):
    state = Situation(scene="", pose="", holding=(), mood="calm", language="en")
    return Reaction(action=action, say=say, stable=STABLE, state=state)


class Run:
    """A machine, its clock, and the effects since the latest look."""

    def __init__(self):
        self.agent, self.now, self.effects = Agent(), 0.0, []

    def __call__(self, *events, after=0.0):
        for event in events:
            self.now += after
            self.agent, effects = step(self.agent, event, self.now)
            self.effects += effects
        return self

    def until_due(self):
        self.now = deadline(self.agent, SETTINGS)
        return self(TimePassed())

    def take(self, *kinds):
        """Effects of some kinds since the latest look."""
        found = [x for x in self.effects if isinstance(x, kinds or object)]
        self.effects = []
        return found

    @property
    def state(self):
        return self.agent.state

    def told(self, kind):
        return [x.data for x in self.effects if isinstance(x, Tell) and x.kind == kind]


def idle():
    return Run()


def listening():
    return idle()(VoiceBegan())


def hearing():
    """The utterance is over and being transcribed."""
    return listening()(VoiceEnded(1, 0.5), after=2)


def thinking():
    return hearing()(Heard(1, "Do you agree?"), after=0.5)


def voicing():
    """A sentence has been handed over, nothing is heard yet."""
    return thinking()(ActionKnown(1, NOD), SentenceKnown(1, "Yes, I do."), Spoken(1, 1.0))


def speaking():
    return voicing()(PlaybackStarted(), after=0.2)


def ending():
    """The whole answer is known and handed over."""
    return speaking()(ReactionKnown(1, reaction()))


def interrupted():
    return speaking()(VoiceBegan(), VoiceLasts(), after=0.2)


EVENTS = {
    "voice_began": VoiceBegan(),
    "voice_lasts": VoiceLasts(),
    "voice_ended": VoiceEnded(2, 0.5),
    "heard": Heard(1, "Do you agree?"),
    "heard_nothing": Heard(1, " \x00"),
    "hear_failed": HearFailed(1, "no network"),
    "typed": Typed("And you?"),
    "typed_nothing": Typed(" "),
    "action": ActionKnown(1, NOD),
    "sentence": SentenceKnown(1, "Well."),
    "stale": SentenceKnown(0, "Too late."),
    "whole": ReactionKnown(1, reaction()),
    "whole_silent": ReactionKnown(1, reaction("")),
    "think_failed": ThinkFailed(1, "no network"),
    "spoken": Spoken(1, 1.0),
    "speak_failed": SpeakFailed(1, "no voice"),
    "started": PlaybackStarted(),
    "finished": PlaybackFinished(),
    "cleared": Cleared(),
    "silence": SilenceShown(),
    "time": TimePassed(),
}
N, L, T, S, X = State.IDLE, State.LISTENING, State.THINKING, State.SPEAKING, State.INTERRUPTED
# Of each event the state after it, in the order of the columns; "." stays without any effect.
COLUMNS = (idle, listening, hearing, thinking, voicing, speaking, ending, interrupted)
TABLE = {
    "voice_began":   (L, L, L, L, L, S, S, X),
    "voice_lasts":   (".", ".", ".", ".", ".", ".", ".", "."),
    "voice_ended":   (".", L, ".", ".", ".", ".", ".", L),
    "heard":         (".", ".", T, ".", ".", ".", ".", "."),
    "heard_nothing": (".", ".", N, ".", ".", ".", ".", "."),
    "hear_failed":   (".", ".", N, ".", ".", ".", ".", "."),
    "typed":         (T, T, T, T, T, T, T, T),
    "typed_nothing": (".", ".", ".", ".", ".", ".", ".", "."),
    "action":        (".", ".", ".", T, ".", ".", ".", "."),
    "sentence":      (".", ".", ".", T, T, S, ".", "."),
    "stale":         (".", ".", ".", ".", ".", ".", ".", "."),
    "whole":         (".", ".", ".", T, T, S, ".", "."),
    "whole_silent":  (".", ".", ".", T, T, S, ".", "."),
    "think_failed":  (".", ".", ".", T, T, S, ".", "."),
    "spoken":        (".", ".", ".", ".", ".", ".", ".", "."),
    "speak_failed":  (".", ".", ".", ".", ".", ".", ".", "."),
    "started":       (".", ".", ".", ".", S, ".", ".", "."),
    "finished":      (".", ".", ".", ".", ".", ".", N, "."),
    "cleared":       (".", N, N, N, N, X, X, "."),
    "silence":       (".", ".", ".", ".", ".", ".", ".", L),
    "time":          (".", ".", ".", ".", ".", ".", ".", "."),
}  # fmt: skip
DUE = (None, N, N, T, N, S, X, L)  # of each column, the state after its deadline


@pytest.mark.parametrize("name", TABLE)
def test_every_event_in_every_state(name):
    for start, expected in zip(COLUMNS, TABLE[name], strict=True):
        run = start()
        before = run.state
        run.take()
        run(EVENTS[name])
        if expected == ".":
            assert run.state is before and not run.effects, (start.__name__, run.effects)
        else:
            assert run.state is expected, start.__name__
        assert (run.agent.turn is not None) == (run.state in (T, S))


def test_the_table_is_complete():
    assert set(TABLE) == set(EVENTS)
    assert {type(event) for event in EVENTS.values()} == set(get_args(Event))
    assert {column().state for column in COLUMNS} == set(State)


@pytest.mark.parametrize(("start", "expected"), zip(COLUMNS[1:], DUE[1:], strict=True))
def test_every_state_but_idle_has_a_deadline(start, expected):
    run = start()
    run.now = deadline(run.agent, SETTINGS) - 0.001
    run.take()
    assert not run(TimePassed()).effects
    run.until_due()
    assert run.state is expected and run.effects
    assert deadline(Agent(), SETTINGS) is None


def test_a_turn_from_voice_to_voice():
    run = listening()
    assert run.take() == [Show(L)]
    run(VoiceEnded(1, 0.5), after=2)
    assert run.take() == [Transcribe(1)]
    run(Heard(1, "Do you agree?"), after=0.5)
    told, show, ask = run.take()
    assert told.data == {"text": "Do you agree?", "final": True} and show == Show(T)
    assert ask == Ask(1, "Do you agree?", Agent().memory)
    run(ActionKnown(1, NOD), SentenceKnown(1, "Yes, I do."), after=0.1)
    assert run.take() == [Prompt(NOD), Say(1, "Yes, I do.")]
    run(Spoken(1, 1.0), after=0.2)
    run(ReactionKnown(1, reaction()))
    told, end = run.take()
    assert told.data["action"] == NOD and told.data["id"] == 1 and end == EndSegment()
    run(PlaybackStarted(), after=0.3)
    timing = run.told("turn.timing")[0]
    parts = {"endpoint": 0.5, "transcript": 0.5, "think": 0.1, "say": 0.1, "voice": 0.2,
             "picture": 0.3, "react": 1.7}  # fmt: skip
    assert timing == pytest.approx({"id": 1, **parts})
    run.take()
    run(PlaybackFinished(), after=1.0)
    assert run.take() == [Prompt(STABLE), Show(N)]
    memory = run.agent.memory
    assert memory.completed and memory.spoken == "Yes, I do." and memory.situation.mood == "calm"
    assert [turn.heard for turn in memory.turns] == ["Do you agree?"]


def test_typed_text_is_timed_without_an_ear():
    run = idle()(Typed("Hello"))(SentenceKnown(1, "Hi."), Spoken(1, 1.0), after=0.2)
    timing = run(PlaybackStarted(), after=0.1).told("turn.timing")[0]
    assert timing == pytest.approx(
        {"id": 1, "say": 0.2, "voice": 0.2, "picture": 0.1, "react": 0.5}
    )


def test_a_user_who_goes_on_is_answered_as_a_whole():
    run = thinking()
    run.take()
    run(VoiceBegan(), after=0.3)
    assert run.take() == [StopThinking(), Silence(), Show(L)]
    run(SentenceKnown(1, "Too late."), ReactionKnown(1, reaction()))
    assert not run.take()
    run(VoiceEnded(2, 0.5), Heard(2, "I mean, really?"))
    assert run.take(Ask)[0].heard == "Do you agree? I mean, really?"
    # A cough is no words: the question before it still stands.
    run(VoiceBegan(), VoiceEnded(3, 0.5), Heard(3, ""))
    assert run.take(Ask)[0].heard == "Do you agree? I mean, really?"


def test_a_voice_that_lasts_interrupts_and_a_short_noise_does_not():
    run = ending()
    run.take()
    run(VoiceBegan(), VoiceEnded(2, 0.5))
    assert run.state is S and not run.take()
    run(VoiceBegan(), VoiceLasts(), after=0.2)
    *effects, told = run.take()
    assert effects == [StopThinking(), Silence(), Prompt(STABLE)] and run.state is X
    assert told.data["position_s"] == pytest.approx(0.4)
    memory = run.agent.memory
    assert not memory.completed and memory.interrupted_at_s == pytest.approx(0.4)
    run(SilenceShown())
    assert run.state is L
    run(VoiceEnded(3, 0.5), Heard(3, "Stop."))
    assert run.take(Ask)[0].state is memory


def test_only_sentences_that_were_heard_count_as_said():
    run = speaking()(SentenceKnown(1, "Second."), Spoken(1, 2.0), SentenceKnown(1, "Third."))
    run(Spoken(1, 2.0))(VoiceBegan(), VoiceLasts(), after=0.6)  # after 1.2 s
    assert run.agent.memory.spoken == "Yes, I do. Second."


def test_its_own_words_are_no_question():
    said = "I was rendered by a small model."
    run = thinking()(SentenceKnown(1, said), Spoken(1, 2.0), ReactionKnown(1, reaction(said)))
    run(PlaybackStarted(), VoiceBegan())
    run(PlaybackFinished(), after=2)
    assert run.state is L
    run(VoiceEnded(2, 0.5))
    run.take()
    run(Heard(2, "was rendered by a small motel"))
    assert run.state is N and run.take() == [Show(N)]
    # The same words in silence are the user's, and other words at any time.
    run(VoiceBegan(), VoiceEnded(3, 0.5), after=3)
    assert run(Heard(3, said)).state is T
    run(SentenceKnown(2, said), Spoken(2, 2.0), PlaybackStarted(), VoiceBegan(), VoiceLasts())
    run(VoiceEnded(4, 0.5))
    assert run(Heard(4, "What does small mean?")).state is T


def test_an_action_without_words_is_played_as_silence():
    run = thinking()
    run.take()
    run(ReactionKnown(1, reaction("")))
    _, *effects = run.take()
    assert effects == [Prompt(NOD), Act(1, SETTINGS.act_s)]
    run(Spoken(1, 2.0))
    assert run.take() == [EndSegment()]
    assert run(PlaybackStarted(), PlaybackFinished()).state is N


def test_a_failure_is_told_once_and_the_fallback_spoken():
    run = thinking()
    run.take()
    run(ThinkFailed(1, "no network"))
    told, say = run.take()
    assert told.data["code"] == "not_answered" and say == Say(1, SETTINGS.fallback)
    run(SpeakFailed(1, "no voice"))
    assert run.state is N and run.take(Tell) == []
    silent = replace(SETTINGS, fallback="")
    agent, _ = step(thinking().agent, ThinkFailed(1, ""), 3.0, silent)
    assert agent.state is N


def test_what_was_said_before_a_failure_stands():
    run = speaking()
    run.take()
    run(ThinkFailed(1, "gone"))
    assert [type(x) for x in run.take()] == [Tell, EndSegment]
    assert run(PlaybackFinished(), after=1).state is N
    assert run.agent.memory.spoken == "Yes, I do." and run.agent.memory.situation.mood != "calm"


def test_endless_speech_is_dropped():
    assert listening().until_due().take()[-2:] == [DropVoice(), Show(N)]


def test_an_answer_of_many_sentences_is_cut():
    run = thinking()(*[SentenceKnown(1, "Again.")] * 100)
    assert len(run.take(Say)) == 16


def random_event(rng, agent):
    """An event of any kind, often one that fits the state."""
    turn = rng.choice([agent.number, agent.number, 0, 99])
    utterance = rng.choice([*agent.waiting, rng.randrange(5)])
    text = rng.choice(["", "Yes.", "One, two, three.", "\ud800", "x" * 5000])
    return rng.choice([
        VoiceBegan(), VoiceLasts(), VoiceEnded(rng.randrange(5), 0.5), Heard(utterance, text),
        HearFailed(utterance, text), Typed(text), ActionKnown(turn, text),
        SentenceKnown(turn, text), ReactionKnown(turn, reaction(rng.choice(["", "Yes."]))),
        ThinkFailed(turn, text), Spoken(turn, rng.choice([0.0, 1.0])), SpeakFailed(turn, text),
        PlaybackStarted(), PlaybackFinished(), Cleared(), SilenceShown(), TimePassed(),
    ])  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_it_listens_again(seed):
    rng, run = random.Random(seed), Run()
    asked_at = None
    for _ in range(1000):
        run(random_event(rng, run.agent), after=rng.choice([0.0, 0.1, 1.0]))
        if (due := deadline(run.agent, SETTINGS)) is not None and due <= run.now:
            run(TimePassed())
        if run.state is T:
            asked_at = run.agent.asked_at
            assert run.now <= asked_at + SETTINGS.think_s + SETTINGS.speak_s + SETTINGS.play_s
        assert (run.agent.turn is not None) == (run.state in (T, S))
    # From here nobody does anything any more.
    began, steps = run.now, 0
    while run.state is not N:
        run.until_due()
        steps += 1
    assert (
        steps <= 5
        and run.now - began
        <= SETTINGS.listen_s + SETTINGS.think_s + SETTINGS.speak_s + SETTINGS.play_s
    )


def test_a_conversation_needs_no_jax():
    modules = "agent, jax_avatar.dialogue.chat, jax_avatar.dialogue.ear, jax_avatar.dialogue.tts"
    code = f"import sys, jax_avatar.dialogue.{modules}; sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
