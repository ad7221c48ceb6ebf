"""The demo brain, a GGUF file, and the choice between them."""

import asyncio
import json
import sys
import time
from types import SimpleNamespace

import pytest

from jax_avatar.data.talking_people import motion
from jax_avatar.dialogue.chat import ChatEndpoint
from jax_avatar.dialogue.demo_brain import DemoBrain
from jax_avatar.dialogue.minds import find_mind
from jax_avatar.dialogue.reaction import ACTIONS, STABLE, DialogueState, Reaction
from jax_avatar.dialogue.think import Action, Sentence, ThinkError
from tests.dialogue.test_answers import ANSWER, NOD


def thoughts_of(think, heard="Do you agree?"):
    async def run():
        return [x async for x in think(heard, DialogueState())]

    return asyncio.run(run())


def test_actions_are_those_of_the_training_data():
    assert {k: f"The person {v}." for k, v in motion.ACTIONS.items()} == ACTIONS


@pytest.mark.parametrize(
    ("heard", "action", "says"),
    [
        ("Hello there!", "smile", "good to see you"),
        ("Nod if you agree.", "nod", ""),
        ("Please shake your head.", "shake_head", ""),
        ("Look to your left and tell me the time.", "look_right", "It is 4:05 PM."),
        ("turn left", "look_left", ""),
        ("What's the time?", "", "It is 4:05 PM."),
        ("What day is it?", "", "Today is Friday."),
        ("Are you a real person?", "shake_head", "generated video"),
        ("What is the capital of France?", "shake_head", "demo brain"),
        ("", "shake_head", "demo brain"),
    ],
)
def test_the_demo_brain_follows_requests_and_admits_what_it_is(heard, action, says):
    now = time.strptime("2026-11-27 16:05", "%Y-%m-%d %H:%M")
    first, *spoken, reaction = thoughts_of(DemoBrain(lambda: now), heard)
    caption = ACTIONS.get(action, STABLE)
    assert first == Action(caption) and reaction.action == caption
    assert says in reaction.say and " ".join(x.text for x in spoken) == reaction.say


class Llama:
    """In place of xllamacpp.Server."""

    def __init__(self, parameters):
        self.bodies, self.text, self.is_stopped = [], json.dumps(ANSWER), False
        Llama.latest = self

    def handle_chat_completions(self, body, callback=None):
        self.bodies.append(body)
        for start in range(0, len(self.text) if callback else 0, 10):
            if self.text == "broken":
                raise RuntimeError("broken")
            delta = {"content": self.text[start : start + 10]}
            if callback({"choices": [{"delta": delta}]}):
                self.is_stopped = True
                return
            time.sleep(0.002)


def test_a_gguf_file_answers_and_stops_when_it_is_not_wanted(monkeypatch, tmp_path):
    def parameters():
        threads = SimpleNamespace(n_threads=0)
        return SimpleNamespace(model=SimpleNamespace(), cpuparams=threads, cpuparams_batch=threads)

    fake = SimpleNamespace(CommonParams=parameters, Server=Llama)
    monkeypatch.setitem(sys.modules, "xllamacpp", fake)
    with pytest.raises(ValueError, match="no such file"):
        find_mind(str(tmp_path / "a.gguf"))
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    think = find_mind(str(tmp_path / "a.gguf"))
    llama = Llama.latest
    assert llama.bodies[0]["max_tokens"] == 1  # the instructions are read before the first question
    thoughts = thoughts_of(think)
    assert thoughts[0] == Action(NOD) and isinstance(thoughts[-1], Reaction)
    assert llama.bodies[1]["response_format"]["json_schema"]["strict"]

    async def first():
        answer = think("Hello", DialogueState())
        async for thought in answer:
            await answer.aclose()
            return thought

    assert asyncio.run(first()) == Action(NOD)
    ends = time.monotonic() + 5
    while not llama.is_stopped:
        assert time.monotonic() < ends
        time.sleep(0.01)
    llama.text = "broken"
    with pytest.raises(ThinkError, match=r"llama\.cpp failed"):
        thoughts_of(think)
    llama.text = "{}"
    with pytest.raises(ThinkError, match="wrong form"):
        thoughts_of(think)
    assert not any(isinstance(x, Sentence) for x in thoughts_of(DemoBrain(), "")[:1])


def test_a_mind_is_found_by_its_name(tmp_path):
    assert isinstance(find_mind("demo"), DemoBrain)
    system = tmp_path / "system.txt"
    system.write_text("You are a pirate. {actions}")
    assert isinstance(find_mind("http://x/v1", "m", system=str(system)), ChatEndpoint)
    with pytest.raises(ValueError, match="--llm_model"):
        find_mind("http://x/v1")
    with pytest.raises(ValueError, match="expected demo"):
        find_mind("gpt")
