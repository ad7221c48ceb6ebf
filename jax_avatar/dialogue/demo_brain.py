"""Demo brain: scripted and retrieved answers, without a language model and without a network.

It follows requests for actions, tells the time, and answers some questions about itself from a
table, by the words that a question shares with it. It understands nothing.
"""

import json
import math
import re
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

from jax_avatar.dialogue.answers import sentences
from jax_avatar.dialogue.reaction import ACTIONS, STABLE, DialogueState, Reaction
from jax_avatar.dialogue.think import Action, Sentence, Thought

__all__ = ["DEMO", "DemoBrain"]

DEMO = "demo"
"""Its name among minds."""

_COMMANDS = (  # in this order; a person's left is on the right of the picture
    ("look_right", r"\b(?:your|you're) left\b"),
    ("look_left", r"\b(?:your|you're) right\b"),
    ("look_left", r"\b(?:look|turn)\b.*\bleft\b"),
    ("look_right", r"\b(?:look|turn)\b.*\bright\b"),
    ("shake_head", r"\bshak(?:e|ing)\b.*\bhead\b"),
    ("tilt_head", r"\btilt"),
    ("raise_brows", r"\b(?:eye)?brows?\b|\blook surprised\b"),
    ("nod", r"\bnod"),
    ("smile", r"\bsmil|\blaugh\b"),
)
_DONE = ("Like this.", "Of course.", "With pleasure.", "Here you are.")
_TIME = r"\bwhat(?:'s| is)?(?: the)? time\b|\bthe time\b|\bo'?clock\b"
_DAY = r"\bwhat(?:'s| is)? (?:the )?(?:day|date)\b|\bwhich day\b"
_LOST = (
    "I am only a demo brain, and I do not know that. Ask me what I can do.",
    "That is beyond me. A language model would know; I have a short script.",
    "I have no answer to that in my script. You could ask me to nod, or what time it is.",
)
_TABLE = Path(__file__).with_suffix(".json")
_LEAST = 0.6  # similarity below which nothing fits
_EVERYWHERE = {
    "a",
    "an",
    "the",
    "is",
    "to",
    "of",
    "and",
    "it",
    "that",
    "this",
    "please",
    "me",
    "my",
}


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z']+", text.lower())) - _EVERYWHERE


class DemoBrain:
    """A `Think` without a model."""

    def __init__(self, now: Callable[[], time.struct_time] = time.localtime):
        """Counts the words of its table.

        Args:
            now: local time.
        """
        self._now = now
        table = json.loads(_TABLE.read_text(encoding="utf-8"))
        self._table = [
            (_words(q), row["say"], row["action"]) for row in table for q in row["asked"]
        ]
        counts = Counter(word for row, _, _ in self._table for word in row)
        self._weights = {word: math.log(1 + len(self._table) / n) for word, n in counts.items()}

    async def __call__(self, heard: str, state: DialogueState) -> AsyncIterator[Thought]:
        """Yields an answer at once; see `Think`."""
        say, name = self.answer(heard, state.turn)
        action = ACTIONS.get(name, STABLE)
        yield Action(action)
        for sentence in sentences(say, is_first=True, is_closed=True):
            yield Sentence(sentence)
        yield Reaction(action=action, say=say, stable=STABLE, state=state.situation)

    def answer(self, heard: str, turn: int) -> tuple[str, str]:
        """Answer and name of the action, empty for none.

        Args:
            heard: text of the user.
            turn: number of turns so far; answers that mean the same take turns by it.
        """
        text = heard.lower().replace("’", "'")
        command = _command(text)
        if fact := self._fact(text):
            return fact, command
        if command:
            return _DONE[turn % len(_DONE)], command
        words = _words(text)
        score, say, name = max((self._similarity(words, row), *rest) for row, *rest in self._table)
        if score < _LEAST:
            return _LOST[turn % len(_LOST)], "shake_head"
        return say, name

    def _fact(self, text: str) -> str:
        if re.search(_TIME, text):
            return time.strftime("It is %I:%M %p.", self._now()).replace("It is 0", "It is ")
        if re.search(_DAY, text):
            return time.strftime("Today is %A.", self._now())
        return ""

    def _similarity(self, words: set[str], row: set[str]) -> float:
        """Cosine of the angle between two sets of words, rare words weighing more."""

        def length(of: set[str]) -> float:
            rarest = math.log(1 + len(self._table))  # of words that no row has
            return math.sqrt(sum(self._weights.get(word, rarest) ** 2 for word in of))

        return length(words & row) ** 2 / (length(words) * length(row) or 1)


def _command(text: str) -> str:
    """Name of the action that a text asks for; empty for none."""
    return next((name for name, pattern in _COMMANDS if re.search(pattern, text)), "")
