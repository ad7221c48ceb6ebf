import numpy as np
import pytest

from jax_avatar.live.speech_gate import SpeechGate
from tests.live.helpers import voice


@pytest.mark.parametrize("pieces", [1, 7, 500])
def test_the_gate_lets_through_utterances_and_nothing_else(pieces):
    def quiet(seconds):
        return voice(seconds, seed=2, rate=8000) / 100

    said = [voice(1.0, rate=8000), voice(0.5, seed=3, rate=8000)]
    track = np.concatenate([quiet(2), said[0], quiet(0.3), said[1], quiet(2), said[0], quiet(2)])
    gate, heard, utterances = SpeechGate(8000), [], []
    for part in np.array_split(track, pieces):
        for piece in gate(part):
            if piece is None:
                utterances.append(np.concatenate(heard))
                heard = []
            else:
                heard.append(piece)
    assert not heard
    before, after = 1600, 4800
    assert [len(u) for u in utterances] == [
        before + 8000 + 2400 + 4000 + after, before + 8000 + after
    ]  # fmt: skip
    np.testing.assert_array_equal(utterances[1][before : before + 8000], said[0])
