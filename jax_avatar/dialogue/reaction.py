"""Reaction to what was heard, and the state of a conversation between turns.

Everything in them was written by a language model: it is text of bounded length without control
characters, or a word of a closed list, and nothing else.

Source: InteractiveAvatar (arXiv 2606.22905), the Reasoning-Reaction Module.
"""

import functools
import unicodedata
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, create_model

__all__ = [
    "ACTIONS",
    "SAY_CHARS",
    "STABLE",
    "DialogueState",
    "Reaction",
    "Situation",
    "TurnRecord",
    "cleaned",
    "reaction_model",
]

ACTIONS = {
    "smile": "The person smiles.",
    "nod": "The person nods.",
    "shake_head": "The person shakes the head.",
    "look_left": "The person looks to the left of the picture.",
    "look_right": "The person looks to the right of the picture.",
    "raise_brows": "The person raises the eyebrows.",
    "tilt_head": "The person tilts the head.",
}
"""Names of actions and their captions, as in the training data."""

STABLE = "The person looks at the camera."
"""Caption without an action."""

SAY_CHARS = 600
"""Most characters of an answer."""

_PROMPT_CHARS = 160
_TURNS = 6


def cleaned(text: str, most: int) -> str:
    """Text in one line, without control, format and private characters, cut at a word.

    Args:
        text: anything that `str` can hold, lone surrogates included.
        most: characters of the result at most.
    """
    # Longer input is cut first: what is made of a character is never longer than it.
    printable = "".join(" " if unicodedata.category(c)[0] == "C" else c for c in text[: 8 * most])
    line = " ".join(printable.split())
    if len(line) <= most:
        return line
    head, space, _ = line[: most + 1].rpartition(" ")
    return head.rstrip() if space and head else line[:most]


def _text(most: int) -> Any:
    shorten = AfterValidator(lambda text: cleaned(text, most))
    return Annotated[str, shorten, Field(json_schema_extra={"maxLength": most})]


def _first_four(items: Any) -> Any:
    return items[:4] if isinstance(items, list) else items


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Situation(_Strict):
    """Part of the state that a reaction sets.

    Attributes:
        scene: what surrounds the avatar.
        pose: how it sits or stands.
        holding: what it has in its hands, at most four things.
        mood: of the avatar.
        language: that it speaks, for example "en" or "zh-CN".
    """

    scene: _text(120)
    pose: _text(80)
    holding: Annotated[tuple[_text(40), ...], BeforeValidator(_first_four), Field(strict=False)]
    mood: _text(40)
    language: Annotated[str, Field(pattern=r"^[a-z]{2,3}(-[A-Z]{2})?$")]


class Reaction(_Strict):
    """Answer of the language model to what was heard.

    Attributes:
        action: caption of what the avatar does while it speaks.
        say: text that it speaks; empty for an action in silence.
        stable: caption of how it is afterwards.
        state: its situation afterwards.
    """

    action: _text(_PROMPT_CHARS)
    say: _text(SAY_CHARS)
    stable: _text(_PROMPT_CHARS)
    state: Situation


class TurnRecord(_Strict):
    """A past turn, for the language model."""

    heard: str
    said: str
    action: str


class DialogueState(_Strict):
    """State of a conversation between turns; at most a few kB, and only in memory.

    Attributes:
        turn: number of turns so far.
        stable: caption of the avatar without an action.
        situation: of the avatar.
        completed: False if the latest answer was interrupted.
        spoken: text of the latest answer whose sound was delivered.
        interrupted_at_s: seconds of the latest answer that were delivered; None if all.
        turns: the latest six.
    """

    turn: int = 0
    stable: str = STABLE
    situation: Situation = Situation(scene="", pose="", holding=(), mood="friendly", language="en")
    completed: bool = True
    spoken: str = ""
    interrupted_at_s: float | None = None
    turns: tuple[TurnRecord, ...] = ()

    def after(
        self, heard: str, reaction: Reaction | None, spoken: str, interrupted_at_s: float | None
    ) -> "DialogueState":
        """State after a turn.

        Args:
            heard: text of the user.
            reaction: None if the model gave no complete one; the situation stays.
            spoken: text whose sound was delivered.
            interrupted_at_s: seconds of sound delivered; None if all of it.
        """
        said = cleaned(spoken, SAY_CHARS)
        action = reaction.action if reaction else self.stable
        record = TurnRecord(heard=cleaned(heard, SAY_CHARS), said=said, action=action)
        changed: dict[str, Any] = {
            "turn": self.turn + 1, "completed": interrupted_at_s is None, "spoken": said,
            "interrupted_at_s": interrupted_at_s, "turns": (*self.turns, record)[-_TURNS:],
        }  # fmt: skip
        if reaction:
            changed |= {"stable": reaction.stable, "situation": reaction.state}
        return self.model_copy(update=changed)


@functools.cache
def reaction_model(
    actions: tuple[str, ...] = (), stables: tuple[str, ...] = (STABLE,)
) -> type[Reaction]:
    """Reaction whose captions are of closed lists; its JSON schema has them, too.

    Args:
        actions: captions of actions; any text if empty, for `stable` as well.
        stables: captions without an action.
    """
    if not actions:
        return Reaction
    stable = Literal[stables]
    action = Literal[(*actions, *stables)]
    return create_model("Reaction", __base__=Reaction, action=(action, ...), stable=(stable, ...))
