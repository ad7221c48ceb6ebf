"""Mistakes against the rules of a conversation."""

from tests.planted.mistake import Mistake, tests_in

__all__ = ["CONVERSATION"]

agent = tests_in("dialogue/test_agent")
answers = tests_in("dialogue/test_answers")
chat = tests_in("dialogue/test_chat")
driver = tests_in("dialogue/test_driver")
hearing = tests_in("dialogue/test_hearing")
voice = tests_in("dialogue/test_tts")

# fmt: off
CONVERSATION = tuple(Mistake("talk", *row) for row in (
    ("a model that is silent is waited for", "dialogue/agent.py",
     "    if not turn.is_whole:\n        return last\n",
     "    if not turn.is_whole:\n        return None\n",
     agent("every_state_but_idle_has_a_deadline")),
    ("a short noise interrupts", "dialogue/agent.py",
     "        case State.SPEAKING | State.INTERRUPTED:\n            return voiced, ()\n",
     "        case State.SPEAKING:\n            return _interrupt(voiced, now)\n",
     agent("a_voice_that_lasts_interrupts_and_a_short_noise_does_not")),
    ("an answer of an earlier turn is spoken", "dialogue/agent.py",
     "return turn if turn and turn.number == number and not turn.is_whole else None",
     "return turn if turn and not turn.is_whole else None",
     agent("every_event_in_every_state")),
    ("the avatar answers its own words", "dialogue/agent.py",
     "if text and not (agent.is_over and _is_echo(text, agent.said)):", "if text:",
     agent("its_own_words_are_no_question")),
    ("the first half of a question is forgotten", "dialogue/agent.py",
     "kept = replace(voiced, heard=(agent.turn.heard,))", "kept = voiced",
     agent("a_user_who_goes_on_is_answered_as_a_whole")),
    ("sentences count as said before they are heard", "dialogue/agent.py",
     "if length and start < now:", "if length:",
     agent("only_sentences_that_were_heard_count_as_said")),
    ("an answer may have fields of its own", "dialogue/reaction.py",
     'strict=True, extra="forbid"', 'strict=True, extra="ignore"',
     answers("another_form_is_an_error")),
    ("an action is taken before it is checked", "dialogue/answers.py",
     "            self._captions.validate_python(text, strict=True)\n", "            pass\n",
     answers("a_thousand_damaged_answers_are_clean_or_refused")),
    ("half a sentence is spoken", "dialogue/answers.py",
     "        if end is None and not is_closed:\n", "        if end is None and False:\n",
     answers("an_answer_cut_anywhere_gives_the_same_thoughts")),
    ("a language model may be silent for ever", "dialogue/chat.py",
     "limit_s = min(limit_s, ends - time.monotonic())", "limit_s = 1e9",
     chat("a_failure_ends_in_time_with_one_sentence")),
    ("what was spoken is asked for again", "dialogue/chat.py",
     "        if reader.has_spoken:\n", "        if False:\n", chat("the_ladder")),
    ("the avatar's own voice interrupts it", "dialogue/ear.py",
     "        if not self._played:\n", "        if True:\n",
     hearing("its_own_voice_does_not_interrupt_and_the_users_does")),
    ("an utterance loses its soft beginning", "dialogue/ear.py",
     "self._is_open, self._parts = True, list(self._before)",
     "self._is_open, self._parts = True, [chunk]", hearing("an_utterance_begins_lasts_and_ends")),
    ("weights of any origin are loaded", "dialogue/packages.py",
     "    if found != _KNOWN.get(path.name):\n", "    if False:\n",
     voice("weights_that_nobody_knows_are_refused")),
    ("an answer that is not wanted goes on", "dialogue/driver.py",
     "                    self._thinking.cancel()\n", "                    pass\n",
     driver("a_voice_interrupts_and_the_sound_stops")),
    ("a sentence is spoken after an interrupt", "dialogue/driver.py",
     "                if before != self._num_silenced:\n", "                if False:\n",
     driver("a_hundred_interrupts_leave_nothing_behind")),
    ("the client is told what broke inside", "dialogue/driver.py",
     "isinstance(error, (ValueError, *said))", "isinstance(error, Exception)",
     driver("a_mind_that_fails_is_told_once_and_it_listens_again")),
))
# fmt: on
