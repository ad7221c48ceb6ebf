"""Turn-taking of a conversation: a pure state machine, `(agent, event, now) -> (agent, effects)`.

         voice              text             first sound           voice for 0.4 s
    IDLE ------> LISTENING ------> THINKING ------------> SPEAKING ---------------> INTERRUPTED
     ^              | no words        | failure              | last sound               |
     +--------------+-----------------+----------------------+---- silence is shown ----+

Events come from the ear, the language model, the voice and the live session; effects go to them.
Nothing here waits, has a clock or can fail. Every state but IDLE has a deadline, so that none can
last for ever, whatever the others do.

Source: InteractiveAvatar (arXiv 2606.22905), State-Cycling: an action lasts as long as its speech.
"""

import difflib
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from jax_avatar.dialogue.reaction import SAY_CHARS, DialogueState, Reaction, cleaned
from jax_avatar.live.turn import State

__all__ = [
    "Act",
    "ActionKnown",
    "Agent",
    "AgentSettings",
    "Ask",
    "Cleared",
    "DropVoice",
    "Effect",
    "EndSegment",
    "Event",
    "HearFailed",
    "Heard",
    "PlaybackFinished",
    "PlaybackStarted",
    "Prompt",
    "ReactionKnown",
    "Say",
    "SentenceKnown",
    "Show",
    "Silence",
    "SilenceShown",
    "SpeakFailed",
    "Spoken",
    "StopThinking",
    "Tell",
    "ThinkFailed",
    "TimePassed",
    "Transcribe",
    "Typed",
    "VoiceBegan",
    "VoiceEnded",
    "VoiceLasts",
    "deadline",
    "step",
]

_MOST_SENTENCES = 16
_ECHO_WORDS = 3  # fewer are an answer that happens to be the same
_ECHO_SHARE = 0.7


@dataclass(frozen=True)
class AgentSettings:
    """Limits of each state in seconds, and words.

    Attributes:
        listen_s: the user speaks without a pause.
        hear_s: from the end of the user's speech to its text.
        think_s: from the question to the whole answer.
        speak_s: until a sentence is synthesised.
        play_s: until sound that was handed over is heard; after its end, until that is reported.
        stop_s: from an interrupt to silence.
        act_s: an action without speech lasts.
        fallback: said where there is no answer; empty for nothing.
    """

    listen_s: float = 35.0
    hear_s: float = 8.0
    think_s: float = 8.5
    speak_s: float = 10.0
    play_s: float = 5.0
    stop_s: float = 3.0
    act_s: float = 2.0
    fallback: str = "Sorry, I lost my thread. Could you say that again?"


# ---- events ----------------------------------------------------


@dataclass(frozen=True)
class VoiceBegan:
    """The user begins to speak."""


@dataclass(frozen=True)
class VoiceLasts:
    """The user has spoken long enough to interrupt, and it is no echo."""


@dataclass(frozen=True)
class VoiceEnded:
    """The user's turn is over: `quiet_s` after the last sound of utterance `utterance`."""

    utterance: int
    quiet_s: float


@dataclass(frozen=True)
class Heard:
    """Text of an utterance; empty if no words were heard."""

    utterance: int
    text: str


@dataclass(frozen=True)
class HearFailed:
    """An utterance could not be transcribed."""

    utterance: int
    why: str


@dataclass(frozen=True)
class Typed:
    """Text that the user typed."""

    text: str


@dataclass(frozen=True)
class ActionKnown:
    """The language model has chosen an action."""

    turn: int
    action: str


@dataclass(frozen=True)
class SentenceKnown:
    """The language model has written one more sentence."""

    turn: int
    text: str


@dataclass(frozen=True)
class ReactionKnown:
    """The answer is complete; all its sentences came before."""

    turn: int
    reaction: Reaction


@dataclass(frozen=True)
class ThinkFailed:
    """No more will come of the answer."""

    turn: int
    why: str


@dataclass(frozen=True)
class Spoken:
    """The next sentence's sound, so many seconds, was handed to the live session."""

    turn: int
    seconds: float


@dataclass(frozen=True)
class SpeakFailed:
    """The next sentence cannot be spoken."""

    turn: int
    why: str


@dataclass(frozen=True)
class PlaybackStarted:
    """First frames with sound were delivered."""


@dataclass(frozen=True)
class PlaybackFinished:
    """The last sound of a segment was delivered."""


@dataclass(frozen=True)
class Cleared:
    """The user interrupts by a button."""


@dataclass(frozen=True)
class SilenceShown:
    """First frames of silence after an interrupt were delivered."""


@dataclass(frozen=True)
class TimePassed:
    """The deadline may have passed."""


Event = (
    VoiceBegan | VoiceLasts | VoiceEnded | Heard | HearFailed | Typed | ActionKnown | SentenceKnown
    | ReactionKnown | ThinkFailed | Spoken | SpeakFailed | PlaybackStarted | PlaybackFinished
    | Cleared | SilenceShown | TimePassed
)  # fmt: skip


# ---- effects ---------------------------------------------------


@dataclass(frozen=True)
class Show:
    """Set IDLE, LISTENING or THINKING in the live session."""

    state: State


@dataclass(frozen=True)
class Transcribe:
    """Transcribe an utterance."""

    utterance: int


@dataclass(frozen=True)
class DropVoice:
    """Forget the utterance that is under way."""


@dataclass(frozen=True)
class Ask:
    """Ask the language model."""

    turn: int
    heard: str
    state: DialogueState


@dataclass(frozen=True)
class StopThinking:
    """Close the language model's answer."""


@dataclass(frozen=True)
class Say:
    """Synthesise a sentence, after those before it, and play it."""

    turn: int
    text: str


@dataclass(frozen=True)
class Act:
    """Play silence, in which an action is seen."""

    turn: int
    seconds: float


@dataclass(frozen=True)
class EndSegment:
    """No more sound belongs to this answer."""


@dataclass(frozen=True)
class Silence:
    """Stop all sound at once, and drop sentences that wait for the synthesiser."""


@dataclass(frozen=True)
class Prompt:
    """Change the prompt, where the model takes one."""

    text: str


@dataclass(frozen=True)
class Tell:
    """Tell the client."""

    kind: str
    data: dict[str, Any]


Effect = (
    Show | Transcribe | DropVoice | Ask | StopThinking | Say | Act | EndSegment | Silence | Prompt
    | Tell
)  # fmt: skip
Effects = tuple[Effect, ...]


# ---- state -----------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """An answer that is being made or spoken.

    Attributes:
        number: from 1.
        heard: text that is answered.
        sentences: asked of the voice, in order; an action in silence is an empty one.
        lengths: seconds of those that are done, 0 for those that failed.
        is_whole: True if no more sentences will come.
        reaction: the whole answer, if it came.
        action: its action, which is known earlier.
        has_failed: True if the client was told of a failure.
        started_at: time of the first sound; None before.
    """

    number: int
    heard: str
    sentences: tuple[str, ...] = ()
    lengths: tuple[float, ...] = ()
    is_whole: bool = False
    reaction: Reaction | None = None
    action: str = ""
    has_failed: bool = False
    started_at: float | None = None

    @property
    def is_done(self) -> bool:
        """True if all sound of the answer was handed over, or has failed."""
        return self.is_whole and len(self.lengths) == len(self.sentences)

    @property
    def has_sound(self) -> bool:
        """True if sound of the answer was handed over."""
        return any(self.lengths)

    def spoken(self, now: float) -> str:
        """Sentences that have begun to be heard."""
        if self.started_at is None:
            return ""
        said, start = [], self.started_at
        for text, length in zip(self.sentences, self.lengths, strict=False):
            if length and start < now:
                said.append(text)
            start += length
        return " ".join(said)


@dataclass(frozen=True)
class Agent:
    """State of the machine.

    Attributes:
        state: one of five.
        since: time of the last progress in this state.
        asked_at: time of the latest question to the language model.
        sound_until: time at which sound that was handed over ends.
        turn: being answered; in THINKING and SPEAKING only.
        number: of the latest turn.
        heard: texts that are not answered yet.
        is_voiced: True while the user speaks.
        is_over: True if that began while the avatar spoke, or just after.
        waiting: utterances that are being transcribed.
        said: what the avatar said last, to recognise its echo.
        memory: state of the conversation.
        times: of the current turn, by name.
    """

    state: State = State.IDLE
    since: float = 0.0
    asked_at: float = 0.0
    sound_until: float = -1e9
    turn: Turn | None = None
    number: int = 0
    heard: tuple[str, ...] = ()
    is_voiced: bool = False
    is_over: bool = False
    waiting: frozenset[int] = frozenset()
    said: str = ""
    memory: DialogueState = field(default_factory=DialogueState)
    times: dict[str, float] = field(default_factory=dict)


def deadline(agent: Agent, settings: AgentSettings) -> float | None:
    """Time at which `TimePassed` is due; None in IDLE."""
    match agent.state:
        case State.IDLE:
            return None
        case State.LISTENING:
            return agent.since + (settings.listen_s if agent.is_voiced else settings.hear_s)
        case State.INTERRUPTED:
            return agent.since + settings.stop_s
    turn, last = agent.turn, agent.asked_at + settings.think_s
    if agent.state is State.THINKING and turn.has_sound:
        return agent.times["spoken"] + settings.play_s
    if not turn.is_whole:
        return last
    if agent.state is State.THINKING:
        return min(agent.since, last) + settings.speak_s
    if not turn.is_done:
        return agent.since + settings.speak_s
    return max(agent.since, agent.sound_until) + settings.play_s


def step(
    agent: Agent, event: Event, now: float, settings: AgentSettings | None = None
) -> tuple[Agent, Effects]:
    """State after an event, and what is to be done.

    Args:
        agent: state before.
        event: what has happened; one that is out of date changes nothing.
        now: seconds on any clock that does not go back.
        settings: defaults if not given.

    Returns:
        The state, and effects in order.
    """
    return _HANDLERS[type(event)](agent, event, now, settings or AgentSettings())


# ---- the user speaks -------------------------------------------


def _voice_began(agent: Agent, event: VoiceBegan, now: float, settings: AgentSettings):
    is_over = agent.state is State.SPEAKING or now < agent.sound_until + 1
    voiced = replace(agent, is_voiced=True, is_over=is_over)
    match agent.state:
        case State.SPEAKING | State.INTERRUPTED:
            return voiced, ()
        case State.THINKING:  # the question goes on; what was heard of it stays
            kept = replace(voiced, heard=(agent.turn.heard,))
            return _to(kept, State.LISTENING, now, StopThinking(), Silence())
        case State.LISTENING:
            return replace(voiced, since=now), ()
    return _to(voiced, State.LISTENING, now)


def _voice_lasts(agent: Agent, event: VoiceLasts, now: float, settings: AgentSettings):
    if agent.state is State.SPEAKING and agent.is_voiced:
        return _interrupt(agent, now)
    return agent, ()


def _voice_ended(agent: Agent, event: VoiceEnded, now: float, settings: AgentSettings):
    quiet = replace(agent, is_voiced=False)
    if agent.state not in (State.LISTENING, State.INTERRUPTED) or not agent.is_voiced:
        return quiet, ()
    times = {"ended": now - event.quiet_s, "closed": now}
    waiting = agent.waiting | {event.utterance}
    quiet = replace(quiet, since=now, waiting=waiting, times=times)
    if agent.state is State.LISTENING:
        return quiet, (Transcribe(event.utterance),)
    return _to(quiet, State.LISTENING, now, Transcribe(event.utterance))


def _heard(agent: Agent, event: Heard, now: float, settings: AgentSettings):
    if event.utterance not in agent.waiting:
        return agent, ()
    agent = replace(agent, waiting=agent.waiting - {event.utterance})
    text, told = cleaned(event.text, SAY_CHARS), ()
    if text and not (agent.is_over and _is_echo(text, agent.said)):
        agent = replace(agent, heard=(*agent.heard, text))
        told = (Tell("heard", {"text": text, "final": True}),)
    if agent.is_voiced or agent.waiting:
        return agent, told
    agent, effects = _ask(agent, now) if agent.heard else _to(agent, State.IDLE, now)
    return agent, told + effects


def _hear_failed(agent: Agent, event: HearFailed, now: float, settings: AgentSettings):
    if event.utterance not in agent.waiting:
        return agent, ()
    agent, effects = _heard(agent, Heard(event.utterance, ""), now, settings)
    return agent, (_error("not_heard", event.why), *effects)


def _typed(agent: Agent, event: Typed, now: float, settings: AgentSettings):
    text = cleaned(event.text, SAY_CHARS)
    if not text:
        return agent, ()
    stopping: Effects = ()
    if agent.state is State.THINKING:
        agent, stopping = replace(agent, heard=(agent.turn.heard,)), (StopThinking(), Silence())
    elif agent.state is State.SPEAKING:
        agent, stopping = _interrupt(agent, now)
    agent = replace(agent, heard=(*agent.heard, text), waiting=frozenset(), times={})
    agent, effects = _ask(agent, now)
    return agent, (*stopping, Tell("heard", {"text": text, "final": True}), *effects)


def _cleared(agent: Agent, event: Cleared, now: float, settings: AgentSettings):
    match agent.state:
        case State.SPEAKING:
            return _interrupt(agent, now)
        case State.THINKING:
            return _to(agent, State.IDLE, now, StopThinking(), Silence())
        case State.LISTENING:
            return _to(replace(agent, is_voiced=False), State.IDLE, now, DropVoice())
    return agent, ()


# ---- the answer comes ------------------------------------------


def _action_known(agent: Agent, event: ActionKnown, now: float, settings: AgentSettings):
    if (turn := _open_turn(agent, event.turn)) is None or turn.action:
        return agent, ()
    times = {"action": now} | agent.times
    return replace(agent, turn=replace(turn, action=event.action), times=times), ()


def _sentence_known(agent: Agent, event: SentenceKnown, now: float, settings: AgentSettings):
    turn, text = _open_turn(agent, event.turn), cleaned(event.text, SAY_CHARS)
    if turn is None or not text or len(turn.sentences) == _MOST_SENTENCES:
        return agent, ()
    return _say(agent, turn, text, now)


def _reaction_known(agent: Agent, event: ReactionKnown, now: float, settings: AgentSettings):
    if (turn := _open_turn(agent, event.turn)) is None:
        return agent, ()
    reaction = event.reaction
    turn = replace(turn, is_whole=True, reaction=reaction, action=reaction.action)
    told = Tell(
        "turn",
        {
            "id": turn.number,
            "action": reaction.action,
            "say": reaction.say,
            "stable": reaction.stable,
        },
    )
    if not turn.sentences:
        turn = replace(turn, sentences=("",))
        act = (Prompt(turn.action), Act(turn.number, settings.act_s))
        return replace(agent, turn=turn, since=now), (told, *act)
    agent, effects = _end_if_done(replace(agent, turn=turn), now)
    return agent, (told, *effects)


def _think_failed(agent: Agent, event: ThinkFailed, now: float, settings: AgentSettings):
    if (turn := _open_turn(agent, event.turn)) is None:
        return agent, ()
    agent, told = _told(replace(agent, turn=replace(turn, is_whole=True)), "not_answered", event)
    if turn.sentences:  # what was said already must do
        agent, effects = _end_if_done(agent, now)
    elif fallback := cleaned(settings.fallback, SAY_CHARS):
        agent, effects = _say(agent, agent.turn, fallback, now)
    else:
        agent, effects = _finish(agent, now)
    return agent, told + effects


def _spoken(agent: Agent, event: Spoken, now: float, settings: AgentSettings):
    if (turn := _waiting_turn(agent, event.turn)) is None:
        return agent, ()
    turn = replace(turn, lengths=(*turn.lengths, event.seconds))
    until = max(now, agent.sound_until) + event.seconds
    times = {"spoken": now} | agent.times if event.seconds else agent.times
    agent = replace(agent, turn=turn, since=now, sound_until=until, times=times)
    return _end_if_done(agent, now)


def _speak_failed(agent: Agent, event: SpeakFailed, now: float, settings: AgentSettings):
    if (turn := _waiting_turn(agent, event.turn)) is None:
        return agent, ()
    agent = replace(agent, turn=replace(turn, lengths=(*turn.lengths, 0.0)), since=now)
    agent, told = _told(agent, "not_spoken", event)
    agent, effects = _end_if_done(agent, now)
    return agent, told + effects


# ---- the answer is played --------------------------------------


def _playback_started(agent: Agent, event: PlaybackStarted, now: float, settings: AgentSettings):
    if agent.state is not State.THINKING or not agent.turn.has_sound:
        return agent, ()
    turn = replace(agent.turn, started_at=now)
    until = now + sum(turn.lengths)
    told = Tell("turn.timing", {"id": turn.number, **_timing(agent, now)})
    said = " ".join(turn.sentences)
    agent = replace(agent, state=State.SPEAKING, turn=turn, sound_until=until, said=said)
    return agent, (told,)


def _playback_finished(agent: Agent, event: PlaybackFinished, now: float, settings: AgentSettings):
    if agent.state is State.SPEAKING and agent.turn.is_done:
        return _finish(agent, now)
    return agent, ()


def _silence_shown(agent: Agent, event: SilenceShown, now: float, settings: AgentSettings):
    if agent.state is not State.INTERRUPTED:
        return agent, ()
    return _to(agent, State.LISTENING if agent.is_voiced else State.IDLE, now)


def _time_passed(agent: Agent, event: TimePassed, now: float, settings: AgentSettings):
    due = deadline(agent, settings)
    if due is None or now < due:
        return agent, ()
    match agent.state:
        case State.INTERRUPTED:
            return _silence_shown(agent, SilenceShown(), now, settings)
        case State.LISTENING if agent.is_voiced:
            return _to(replace(agent, is_voiced=False), State.IDLE, now, DropVoice())
        case State.LISTENING:
            failed = replace(agent, waiting=frozenset())
            told = _error("not_heard", "speech recognition took too long")
            agent, effects = _ask(failed, now) if failed.heard else _to(failed, State.IDLE, now)
            return agent, (told, *effects)
    turn = agent.turn
    if agent.state is State.THINKING and turn.has_sound:  # the live session does not play it
        return _to(agent, State.IDLE, now, StopThinking(), Silence())
    if not turn.is_whole:
        event = ThinkFailed(turn.number, "the answer took too long")
        agent, effects = _think_failed(agent, event, now, settings)
        return agent, (StopThinking(), *effects)
    if not turn.is_done:
        agent, told = _told(agent, "not_spoken", SpeakFailed(turn.number, "speech took too long"))
        missing = (0.0,) * (len(turn.sentences) - len(turn.lengths))
        agent = replace(agent, turn=replace(agent.turn, lengths=turn.lengths + missing), since=now)
        agent, effects = _end_if_done(agent, now)
        return agent, told + effects
    return _interrupt(agent, now)  # its end was not reported


# ---- helpers ---------------------------------------------------


def _to(agent: Agent, state: State, now: float, *effects: Effect) -> tuple[Agent, Effects]:
    """Moves to IDLE or LISTENING; what belongs to an answer is forgotten."""
    heard = agent.heard if state is State.LISTENING else ()
    waiting = agent.waiting if state is State.LISTENING else frozenset()
    agent = replace(
        agent, state=state, since=now, turn=None, heard=heard, waiting=waiting,
        sound_until=min(agent.sound_until, now),
    )  # fmt: skip
    return agent, (*effects, Show(state))


def _ask(agent: Agent, now: float) -> tuple[Agent, Effects]:
    """Asks the language model about all that was heard."""
    turn = Turn(agent.number + 1, cleaned(" ".join(agent.heard), SAY_CHARS))
    times = {name: agent.times[name] for name in ("ended", "closed") if name in agent.times}
    agent = replace(
        agent, state=State.THINKING, since=now, asked_at=now, turn=turn, number=turn.number,
        heard=(), waiting=frozenset(), times=times | {"asked": now},
    )  # fmt: skip
    return agent, (Show(State.THINKING), Ask(turn.number, turn.heard, agent.memory))


def _open_turn(agent: Agent, number: int) -> Turn | None:
    """The turn of that number, if more of its answer may come."""
    turn = agent.turn
    return turn if turn and turn.number == number and not turn.is_whole else None


def _waiting_turn(agent: Agent, number: int) -> Turn | None:
    """The turn of that number, if it waits for sound."""
    turn = agent.turn
    is_waiting = turn and turn.number == number and len(turn.lengths) < len(turn.sentences)
    return turn if is_waiting else None


def _say(agent: Agent, turn: Turn, text: str, now: float) -> tuple[Agent, Effects]:
    """Asks the voice for a sentence; the action is for the block that holds the first."""
    is_first = not turn.sentences
    since = now if len(turn.lengths) == len(turn.sentences) else agent.since
    turn = replace(turn, sentences=(*turn.sentences, text))
    said = f"{agent.said} {text}" if agent.state is State.SPEAKING else agent.said
    times = {"sentence": now} | agent.times
    agent = replace(agent, turn=turn, since=since, said=said, times=times)
    prompt = (Prompt(turn.action),) if is_first and turn.action else ()
    return agent, (*prompt, Say(turn.number, text))


def _end_if_done(agent: Agent, now: float) -> tuple[Agent, Effects]:
    """Ends the segment when all its sound was handed over."""
    if not agent.turn.is_done:
        return agent, ()
    if agent.turn.has_sound:
        return agent, (EndSegment(),)
    return _finish(agent, now)


def _finish(agent: Agent, now: float) -> tuple[Agent, Effects]:
    """Ends an answer that was not interrupted; the action ends with it."""
    turn = agent.turn
    memory = agent.memory.after(turn.heard, turn.reaction, turn.spoken(now), None)
    state = State.LISTENING if agent.is_voiced else State.IDLE
    return _to(replace(agent, memory=memory), state, now, Prompt(memory.stable))


def _interrupt(agent: Agent, now: float) -> tuple[Agent, Effects]:
    """Stops an answer that is being heard."""
    turn = agent.turn
    position = max(0.0, now - turn.started_at)
    memory = agent.memory.after(turn.heard, turn.reaction, turn.spoken(now), position)
    agent = replace(
        agent, state=State.INTERRUPTED, since=now, turn=None, sound_until=now, memory=memory
    )
    told = Tell("interrupted", {"id": turn.number, "position_s": round(position, 3)})
    return agent, (StopThinking(), Silence(), Prompt(memory.stable), told)


def _told(agent: Agent, code: str, event: ThinkFailed | SpeakFailed) -> tuple[Agent, Effects]:
    """Tells the client of a failure, once a turn."""
    if agent.turn.has_failed:
        return agent, ()
    return replace(agent, turn=replace(agent.turn, has_failed=True)), (_error(code, event.why),)


def _error(code: str, why: str) -> Tell:
    return Tell("error", {"code": code, "message": cleaned(why, 200), "fatal": False})


def _timing(agent: Agent, now: float) -> dict[str, float]:
    """Seconds of each part between the user's last sound and the first of the answer.

    A part whose beginning or end did not happen is absent; its time belongs to the next one.
    """
    names = {"closed": "endpoint", "asked": "transcript", "action": "think", "sentence": "say",
             "spoken": "voice", "shown": "picture"}  # fmt: skip
    times = agent.times | {"shown": now}
    before = first = times.get("ended", times["asked"])
    parts = {}
    for event, part in names.items():
        if event in times and times[event] >= before and (event != "asked" or "ended" in times):
            parts[part] = round(times[event] - before, 3)
            before = times[event]
    return {**parts, "react": round(now - first, 3)}


def _is_echo(text: str, said: str) -> bool:
    """True if most of a text are words that the avatar has just said, in that order."""
    words, own = (re.findall(r"\w+", x.lower()) for x in (text, said))
    if len(words) < _ECHO_WORDS:
        return False
    blocks = difflib.SequenceMatcher(a=words, b=own, autojunk=False).get_matching_blocks()
    return sum(block.size for block in blocks) >= _ECHO_SHARE * len(words)


_HANDLERS: dict[type, Callable[..., tuple[Agent, Effects]]] = {
    VoiceBegan: _voice_began,
    VoiceLasts: _voice_lasts,
    VoiceEnded: _voice_ended,
    Heard: _heard,
    HearFailed: _hear_failed,
    Typed: _typed,
    ActionKnown: _action_known,
    SentenceKnown: _sentence_known,
    ReactionKnown: _reaction_known,
    ThinkFailed: _think_failed,
    Spoken: _spoken,
    SpeakFailed: _speak_failed,
    PlaybackStarted: _playback_started,
    PlaybackFinished: _playback_finished,
    Cleared: _cleared,
    SilenceShown: _silence_shown,
    TimePassed: _time_passed,
}
