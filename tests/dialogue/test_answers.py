"""Answers of language models: cut anywhere, damaged in every way."""

import json
import random

import pytest

from jax_avatar.dialogue.answers import AnswerReader, sentences
from jax_avatar.dialogue.reaction import ACTIONS, STABLE, Reaction, cleaned
from jax_avatar.dialogue.think import Action, Question, Sentence, ThinkError

NOD = ACTIONS["nod"]
STATE = {"scene": "", "pose": "sits", "holding": ["a cup"], "mood": "calm", "language": "en"}
SAY = 'Oh yes, I "do" agree 😀. 你好。 It is 3.5 metres, as I said; is that clear? Good'
ANSWER = {"action": NOD, "say": SAY, "stable": STABLE, "state": STATE}
MODEL = Question().model


def read(text, cuts=()):
    reader, thoughts = AnswerReader(MODEL), []
    for start, stop in zip([0, *cuts], [*cuts, len(text)], strict=True):
        thoughts += reader.read(text[start:stop])
    return thoughts + list(reader.finish())


@pytest.mark.parametrize("ascii_only", [True, False])
def test_an_answer_cut_anywhere_gives_the_same_thoughts(ascii_only):
    text = json.dumps(ANSWER, ensure_ascii=ascii_only)
    whole = read(text)
    assert whole[0] == Action(NOD)
    assert [x.text for x in whole[1:-1]] == [
        'Oh yes, I "do" agree 😀.', "你好。", "It is 3.5 metres, as I said; is that clear?", "Good",
    ]  # fmt: skip
    assert isinstance(whole[-1], Reaction) and whole[-1].state.holding == ("a cup",)
    for cut in range(len(text)):
        assert read(text, [cut]) == whole, text[:cut]
    assert read(text, range(1, len(text))) == whole


def test_what_is_complete_comes_at_once():
    reader = AnswerReader(MODEL)
    assert not list(reader.read('{"action": "The person no'))
    assert list(reader.read('ds.", "sa')) == [Action(NOD)]
    assert not list(reader.read('y": "I do. '))  # blanks at the end say nothing yet
    assert list(reader.read("And")) == [Sentence("I do.")]


def test_sentences_are_cut_for_the_synthesiser():
    def cut(text, is_first=True, is_closed=True):
        return list(sentences(text, is_first=is_first, is_closed=is_closed))

    assert cut("I was in Rome, and it rained.") == ["I was in Rome,", "and it rained."]
    assert cut("I was in Rome, and it rained.", is_first=False) == ["I was in Rome, and it rained."]
    assert cut("Half a sentence", is_closed=False) == []
    long = cut("word " * 100, is_first=False)
    assert max(map(len, long)) <= 160 and " ".join(long) == ("word " * 100).strip()
    assert max(map(len, cut("x" * 500))) <= 161
    assert cut("") == cut("   ") == []


@pytest.mark.parametrize(
    "change",
    [
        {"action": "The person opens a file."},
        {"action": None},
        {"say": 3},
        {"say": ["Yes."]},
        {"stable": NOD},
        {"state": {}},
        {"state": STATE | {"language": "http://example.org"}},
        {"state": STATE | {"holding": "cup"}},
        {"url": "http://example.org"},
    ],
    ids=str,
)
def test_another_form_is_an_error(change):
    with pytest.raises(ThinkError, match="wrong form"):
        read(json.dumps(ANSWER | change))
    for text in ("", "null", "[]", "Sure! {}", json.dumps(ANSWER) + "!", "[" * 7000):
        with pytest.raises(ThinkError):
            read(text)


def test_lengths_are_cut_and_characters_replaced():
    dirty = "a\x00b\u202ec\ufeff\nd " + "word " * 500
    holding = ["x" * 100] * 9
    answer = ANSWER | {"say": dirty, "state": STATE | {"scene": dirty, "holding": holding}}
    *_, reaction = read(json.dumps(answer))
    assert reaction.say.startswith("a b c d word") and 590 < len(reaction.say) <= 600
    assert len(reaction.state.scene) <= 120 and len(reaction.state.holding) == 4
    assert cleaned("x" * 500, 40) == "x" * 40 and cleaned("\ud800\ue000 \t", 9) == ""


def mutated(rng):
    """A damaged answer: of another form, or of damaged text."""
    answer, values = json.loads(json.dumps(ANSWER)), [
        None, True, 3, -1e300, "", "x" * 100_000, "\x00", "\u202eabc", "\ud800", [], {}, [[]], NOD,
        "../../etc/passwd", "${jndi}", "{actions}", ["a"] * 1000, {"say": "x"}, "A. " * 400,
    ]  # fmt: skip
    for _ in range(rng.randrange(3)):
        target = (
            rng.choice([answer, answer["state"]])
            if isinstance(answer.get("state"), dict)
            else answer
        )
        key = rng.choice([*target, "extra"])
        if rng.random() < 0.3:
            target.pop(key, None)
        else:
            target[key] = rng.choice(values)
    items = list(answer.items())
    rng.shuffle(items)
    text = json.dumps(dict(items), ensure_ascii=rng.random() < 0.7)
    for _ in range(rng.choice([0, 0, 1, 3])):
        at = rng.randrange(len(text) + 1)
        piece = rng.choice(
            ["", "\x00", '"', "{", "}", "\\", "\\ud800", "é", ",", "]", text[:at][-50:]]
        )
        text = text[:at] + piece + text[at + rng.choice([0, 0, 1, 5, 200]) :]
    return text[: rng.choice([len(text)] * 4 + [rng.randrange(len(text) + 1)])]


def test_a_thousand_damaged_answers_are_clean_or_refused():
    rng, valid = random.Random(0), 0
    captions = {*ACTIONS.values(), STABLE}
    for _ in range(1000):
        text, thoughts = mutated(rng), []
        reader = AnswerReader(MODEL)
        size = rng.choice([40, 400, 10**7])
        try:
            for start in range(0, len(text), size):
                thoughts += reader.read(text[start : start + size])
            thoughts += reader.finish()
            valid += 1
        except ThinkError as error:
            assert len(str(error)) <= 200
        for thought in thoughts:
            if isinstance(thought, Reaction):
                assert thought.action in captions and thought.stable == STABLE
                assert len(thought.model_dump_json()) < 5000
            elif isinstance(thought, Action):
                assert thought.text in captions
            else:
                assert 0 < len(thought.text) <= 161
                assert cleaned(thought.text, 200) == thought.text
    assert 50 < valid < 900
