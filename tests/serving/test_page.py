"""The page in a real browser, with a microphone that plays a file."""

import shutil
import wave

import numpy as np
import pytest

from tests.serving.test_server import TOKEN, served  # noqa: F401
from tests.streaming.live import voice

webdriver = pytest.importorskip("selenium.webdriver")
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="apt-get install chromium-driver"),
]


@pytest.fixture
def browser(tmp_path):
    samples = (voice(30.0, rate=48_000) * 32767).astype("<i2")
    with wave.open(str(tmp_path / "voice.wav"), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(48_000)
        file.writeframes(samples.tobytes())
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
        "--window-size=420,800", "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream", f"--use-file-for-fake-audio-capture={tmp_path}/voice.wav",
    ):  # fmt: skip
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(executable_path=DRIVER)
    browser = webdriver.Chrome(options=options, service=service)
    yield browser
    browser.quit()


def test_somebody_talks_and_interrupts(served, browser, tmp_path):  # noqa: F811
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    def wait(script, limit_s=30):
        WebDriverWait(browser, limit_s, 0.1).until(lambda b: b.execute_script(f"return {script}"))

    def pixels():
        """What the video shows, averaged over 8 x 8 pixels."""
        return np.array(browser.execute_script("""
            const canvas = document.createElement("canvas");
            const video = document.querySelector("video");
            canvas.width = canvas.height = 8;
            const context = canvas.getContext("2d");
            context.drawImage(video, 0, 0, 8, 8);
            return Array.from(context.getImageData(0, 0, 8, 8).data);
        """))  # fmt: skip

    browser.get(f"http://127.0.0.1:{served.port}/#token={TOKEN}")
    browser.find_element(By.ID, "go").click()
    wait("document.querySelector('video').currentTime > 1")
    assert pixels().std() > 0
    talk = browser.find_element(By.ID, "talk")
    ActionChains(browser).click_and_hold(talk).perform()
    wait("document.body.dataset.state == 'speaking'")
    wait("Number(document.body.dataset.reaction) > 0")
    before = pixels()
    wait("document.querySelector('video').currentTime > 4")
    assert np.abs(before - pixels()).max() > 0
    browser.find_element(By.ID, "interrupt").send_keys("\ue00c")  # Escape
    ActionChains(browser).release().perform()
    wait("document.body.dataset.state == 'idle'")
    wait("document.querySelector('video').muted == false")
    assert "FPS" in browser.find_element(By.ID, "figures").text
    bar = browser.find_element(By.ID, "bar").rect
    assert bar["x"] >= 0 and bar["x"] + bar["width"] <= browser.execute_script("return innerWidth")
    browser.find_element(By.ID, "leave").click()
    wait("document.getElementById('start').hidden == false")
    severe = [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
    assert not severe, severe
