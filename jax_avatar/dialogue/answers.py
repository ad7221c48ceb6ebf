"""Reading an answer while it is written: pieces of JSON -> action, sentences, reaction."""

import itertools
from collections.abc import Iterator

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json

from jax_avatar.dialogue.reaction import SAY_CHARS, Reaction, cleaned
from jax_avatar.dialogue.think import Action, Sentence, ThinkError, Thought

__all__ = ["AnswerReader", "sentences"]

_MOST_CHARS = 8000
_LONGEST, _FIRST_COMMA, _FIRST_SPACE = 160, 12, 40
_ENDS, _ENDS_ALONE = ".!?", "。！？…"


def sentences(text: str, *, is_first: bool, is_closed: bool) -> Iterator[str]:
    """Sentences at the beginning of a text, for a synthesiser.

    A sentence ends at its mark, or where it gets too long. The first one may end at a comma or
    after some words, so that sound begins early. The cuts do not depend on how the text arrives.

    Args:
        text: in one line.
        is_first: True at the beginning of an answer.
        is_closed: False if more may follow; its last words then wait.
    """
    while text:
        end = _end_of_sentence(text, is_first=is_first)
        if end is None and not is_closed:
            return
        piece, text = text[:end], text[len(text) if end is None else end :]
        if piece.strip():
            yield piece.strip()
            is_first = False


def _end_of_sentence(text: str, *, is_first: bool) -> int | None:
    """End of the first sentence; None if it may go on."""
    for i, (char, after) in enumerate(itertools.pairwise(text)):
        if char in _ENDS_ALONE or (char in _ENDS and after == " "):
            return i + 1
        if is_first and char == "," and after == " " and i >= _FIRST_COMMA:
            return i + 1
        if is_first and char == " " and i >= _FIRST_SPACE:
            return i
        if i == _LONGEST:
            cut = max(text.rfind(",", 1, i), text.rfind(" ", 1, i))
            return cut + 1 if cut > 0 else i
    return None


class AnswerReader:
    """Reads one answer, a JSON object that arrives in pieces.

    Nothing is repaired: a complete answer that is not as its type demands is an error.
    """

    def __init__(self, model: type[Reaction]):
        """Starts with nothing.

        Args:
            model: type of a valid answer.
        """
        self._model, self._text = model, ""
        self._captions = TypeAdapter(model.model_fields["action"].annotation)
        self._has_action, self._said = False, ""

    @property
    def has_spoken(self) -> bool:
        """True if a sentence was given away."""
        return bool(self._said)

    def read(self, piece: str) -> Iterator[Thought]:
        """Takes a piece; yields what is complete by it.

        Raises:
            ThinkError: the answer is too long, or contradicts what was given away.
        """
        self._text += piece.encode(errors="replace").decode()  # no lone surrogates
        if len(self._text) > _MOST_CHARS:
            raise ThinkError(f"an answer of over {_MOST_CHARS} characters.")
        closed, open_ = self._parse(partial=True), self._parse(partial="trailing-strings")
        if isinstance(closed, dict) and isinstance(open_, dict):
            yield from self._action(closed.get("action"))
            yield from self._sentences(open_.get("say"), is_closed=False)

    def finish(self) -> Iterator[Thought]:
        """The answer is complete; yields the rest, and the reaction at last.

        Raises:
            ThinkError: the answer is not as its type demands.
        """
        try:
            reaction = self._model.model_validate_json(self._text)
        except ValidationError as invalid:
            error = invalid.errors(include_url=False, include_input=False)[0]
            place = ".".join(str(x) for x in error["loc"])[:40] or "JSON"
            raise ThinkError(
                f"an answer of the wrong form: {place}: {error['msg']}"[:200]
            ) from None
        yield from self._action(reaction.action)
        yield from self._sentences(reaction.say, is_closed=True)
        yield reaction

    def _parse(self, partial: bool | str) -> object:
        try:
            return from_json(self._text, allow_partial=partial)
        except ValueError:
            return None  # half an escape, or no JSON at all: `finish` will tell

    def _action(self, text: object) -> Iterator[Action]:
        # Checked against the closed list now, since it acts before the answer is complete.
        if self._has_action or not isinstance(text, str):
            return
        try:
            self._captions.validate_python(text, strict=True)
        except ValidationError:
            return
        self._has_action = True
        yield Action(cleaned(text, SAY_CHARS))

    def _sentences(self, say: object, *, is_closed: bool) -> Iterator[Sentence]:
        if not isinstance(say, str):
            return
        text = cleaned(say, SAY_CHARS)
        if not text.startswith(self._said):
            raise ThinkError("an answer that changed what was said already.")
        rest = text[len(self._said) :]
        for piece in sentences(rest, is_first=not self._said, is_closed=is_closed):
            self._said = text[: text.index(piece, len(self._said)) + len(piece)]
            yield Sentence(piece)
