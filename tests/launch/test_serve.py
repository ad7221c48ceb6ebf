"""The server as a process of its own."""

import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed

from jax_avatar.testing import save_model
from tests.launch.one_process import refusals
from tests.live.helpers import voice
from tests.serving.client import Client
from tests.serving.test_server import free_port

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_model(tmp_path_factory.mktemp("model"))


def start(folder, port, *arguments, is_fast=False):
    """A server; `is_fast` compiles programs that run in real time, which takes longer."""
    command = [sys.executable, str(ROOT / "launch" / "serve.py"), f"--checkpoint={folder}",
               f"--port={port}", *arguments]  # fmt: skip
    cache = os.environ.get("JAX_CACHE_DIR", str(ROOT / ".jax_cache"))
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": cache}
    environment.pop("XLA_FLAGS", None)
    if is_fast:
        environment.pop("JAX_DISABLE_MOST_OPTIMIZATIONS", None)
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)


def wait_until_ready(process, port, limit_s=120):
    ends = time.monotonic() + limit_s
    while time.monotonic() < ends:
        assert process.poll() is None, process.stderr.read()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=5) as answer:
                return answer.read()
        except OSError:
            time.sleep(0.2)
    raise AssertionError("never ready")


def test_sigterm_lets_sessions_end_and_admits_no_more(folder):
    port = free_port()
    process = start(folder, port, "--sessions=2", "--mesh=1")
    try:
        wait_until_ready(process, port)
        url = f"ws://127.0.0.1:{port}/v1/avatar"
        with Client(url) as client:
            client.until("session.created")
            process.send_signal(signal.SIGTERM)
            assert client.until("draining")["seconds"] == 30
            with Client(url) as late:
                assert late.until("error")["code"] == "draining"
            client.speak(voice(0.8))
            client.send("audio.commit")
            assert client.until("playback_finished")["position_s"] == 0.8
            client.send("close")
            with pytest.raises(ConnectionClosed):
                client.until("never")
        assert process.wait(15) == 0
    finally:
        process.kill()


def test_parts_of_a_conversation_that_are_none_are_refused(folder):
    told = {
        "--llm gpt: expected demo": ["--llm=gpt", "--asr="],
        "takes --llm_model": ["--llm=http://x/v1", "--asr="],
        "nowhere.txt": ["--llm=http://x/v1", "--llm_model=m", "--llm_system=nowhere.txt", "--asr="],
        "--llm a.gguf: there is no such file": ["--llm=a.gguf", "--asr="],
        "--talk takes a voice": ["--tts="],
        "--asr nowhere:hear": ["--asr=nowhere:hear"],
        "--tts ftp://x": ["--tts=ftp://x"],
    }
    lines = [[f"--checkpoint={folder}", "--talk", *flags] for flags in told.values()]
    for says, (code, said) in zip(told, refusals("launch.serve", lines, os.environ), strict=True):
        assert code == 2 and says in said, said


def test_what_cannot_be_served_is_refused_at_once(folder):
    process = start(folder, free_port(), "--mesh=7")
    _, said = process.communicate(timeout=120)
    assert process.returncode == 2 and "do not spread" in said and "Traceback" not in said
