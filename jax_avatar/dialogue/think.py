"""The protocol of answers, and what a language model is asked.

heard, state --Think--> Action, Sentence, Sentence, ..., Reaction

The action and the sentences come while the answer is written, so that sound begins early.
"""

import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jax_avatar.dialogue.reaction import ACTIONS, STABLE, DialogueState, Reaction, reaction_model

__all__ = ["Action", "Question", "Sentence", "Think", "ThinkError", "Thought"]

_SYSTEM = Path(__file__).parent / "system.txt"
_MOST_TOKENS = 320


class ThinkError(ValueError):
    """No answer will come; the message says why."""


@dataclass(frozen=True)
class Action:
    """Caption of the answer's action; comes once, or not before the whole reaction."""

    text: str


@dataclass(frozen=True)
class Sentence:
    """A sentence to be spoken."""

    text: str


Thought = Action | Sentence | Reaction

Think = Callable[[str, DialogueState], AsyncIterator[Thought]]
"""Text of the user, and the state -> action, sentences, and the whole reaction at last.

Raises ThinkError if no answer will come. Closing the iterator stops the work behind it."""


@dataclass(frozen=True)
class Question:
    """Request to a language model: instructions, and the form of its answer.

    Attributes:
        system: instructions; "{actions}" and "{stable}" in it stand for the captions.
        actions: captions of actions, a closed list; any text if empty.
        stable: captions without an action, as `actions`.
    """

    system: str = ""
    actions: tuple[str, ...] = tuple(ACTIONS.values())
    stable: tuple[str, ...] = (STABLE,)

    @property
    def model(self) -> type[Reaction]:
        """Type of a valid answer."""
        return reaction_model(self.actions, self.stable)

    def body(
        self, heard: str, state: DialogueState, *, has_schema: bool = True, temperature: float = 0.6
    ) -> dict[str, Any]:
        """Request to a chat completion endpoint, without the name of the model.

        Args:
            heard: text of the user; it enters as a JSON value.
            state: before this turn.
            has_schema: False puts the JSON schema into the instructions instead.
            temperature: of sampling.
        """
        schema = self.model.model_json_schema()
        system = self.system or _SYSTEM.read_text(encoding="utf-8")
        system = system.replace("{actions}", "\n".join(f"- {x}" for x in self.actions))
        system = system.replace("{stable}", "\n".join(f"- {x}" for x in self.stable))
        form: dict[str, Any] = {"type": "json_object"}
        if has_schema:
            named = {"name": "reaction", "strict": True, "schema": schema}
            form = {"type": "json_schema", "json_schema": named}
        else:
            system = f"{system}\nThe JSON schema of the answer:\n{json.dumps(schema)}"
        user = {
            "state": state.model_dump(exclude={"turns"}),
            "turns": [turn.model_dump() for turn in state.turns],
            "heard": heard,
        }
        return {
            "temperature": temperature,
            "max_tokens": _MOST_TOKENS,
            "messages": [
                {"role": "system", "content": system},
                {"role": "user", "content": json.dumps(user, ensure_ascii=False)},
            ],
            "response_format": form,
        }
