"""The worker as a process of its own; what it does in a room is tested with the package."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from jax_avatar.testing import save_model

WORKER = Path(__file__).parents[2] / "launch" / "livekit_worker.py"


def run(*arguments, **environment):
    command = [sys.executable, str(WORKER), *arguments]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("LIVEKIT_", "XLA_FLAGS"))}
    cache = os.environ.get("JAX_CACHE_DIR", str(WORKER.parents[1] / ".jax_cache"))
    environment |= {"JAX_COMPILATION_CACHE_DIR": cache}
    done = subprocess.run(
        command, env=clean | environment, stderr=subprocess.PIPE, text=True, timeout=300
    )
    return done.returncode, done.stderr


def test_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "livekit", None)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(WORKER))
    assert ended.value.code == 2 and 'pip install ".[livekit]"' in capsys.readouterr().err


def test_it_says_how_to_get_into_a_room_before_it_compiles():
    pytest.importorskip("livekit.agents")
    code, text = run("--url=ws://127.0.0.1:9", LIVEKIT_API_KEY="key")
    assert code == 2 and "LIVEKIT_API_SECRET" in text and "compiling" not in text
    assert "Traceback" not in text


@pytest.mark.slow
def test_where_there_is_no_server_it_says_so(tmp_path):
    pytest.importorskip("livekit.agents")
    folder = save_model(tmp_path / "model")
    access = {"LIVEKIT_API_KEY": "key", "LIVEKIT_API_SECRET": "s" * 32}
    code, text = run(f"--checkpoint={folder}", "--url=ws://127.0.0.1:9", "--room=x", **access)
    assert code == 2 and "compiling" in text and "cannot join a room" in text
    assert "Traceback" not in text
