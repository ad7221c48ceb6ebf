"""Turn-taking: the states of a conversation.

            audio is played                    clear
    IDLE ---------------------> SPEAKING ---------------> INTERRUPTED
     ^  <---------------------     ^  ^                        |
     |      end of speech          |  |                        | silence is shown
     +--> LISTENING --> THINKING --+  +------------------------+--> IDLE

A session moves to SPEAKING, IDLE and INTERRUPTED by itself. The application sets LISTENING (the
user talks) and THINKING (an answer is being made).
"""

import enum

__all__ = ["State", "TurnState"]


class State(enum.Enum):
    """State of the avatar."""

    IDLE = "idle"
    LISTENING = "listening"
    THINKING = "thinking"
    SPEAKING = "speaking"
    INTERRUPTED = "interrupted"


_WAITING = {State.IDLE, State.LISTENING, State.THINKING}
_NEXT = {
    State.IDLE: {*_WAITING, State.SPEAKING},
    State.LISTENING: {*_WAITING, State.SPEAKING},
    State.THINKING: {*_WAITING, State.SPEAKING, State.INTERRUPTED},
    State.SPEAKING: {State.IDLE, State.INTERRUPTED, State.SPEAKING},
    State.INTERRUPTED: {*_WAITING, State.SPEAKING, State.INTERRUPTED},
}


class TurnState:
    """Current state, and the transitions from it."""

    def __init__(self):
        self.state = State.IDLE

    def to(self, state: State) -> bool:
        """Moves to a state; returns True if it changed.

        Raises:
            ValueError: no transition leads there. Speech must be interrupted before listening.
        """
        if state not in _NEXT[self.state]:
            possible = ", ".join(sorted(s.value for s in _NEXT[self.state] - {self.state}))
            raise ValueError(
                f"an avatar that is {self.state.value} cannot become {state.value}; expected one "
                f"of {possible} (clear() interrupts speech)."
            )
        is_new, self.state = state != self.state, state
        return is_new
