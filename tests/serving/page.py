"""The page in headless Chromium, for tests."""

import shutil
import time
import wave

import numpy as np
import pytest

PACKAGES = "needs the Debian packages chromium, chromium-driver and flite, and pip's selenium"
webdriver = pytest.importorskip("selenium.webdriver", reason=PACKAGES)
CHROMIUM, DRIVER, FLITE = (shutil.which(x) for x in ("chromium", "chromedriver", "flite"))
# Remembers each event, and of each frame the time and the middle of the lower face.
WATCH = """
  window.events = []; window.seen = [];
  const Plain = WebSocket;
  window.WebSocket = class extends Plain {
    constructor(...fields) {
      super(...fields);
      this.addEventListener("message", ({ data }) => {
        if (typeof data === "string") events.push(JSON.parse(data));
      });
    }
  };
  document.addEventListener("DOMContentLoaded", () => {
    const video = document.querySelector("video"), canvas = new OffscreenCanvas(8, 8);
    const context = canvas.getContext("2d", { willReadFrequently: true });
    const look = (now, { mediaTime }) => {
      video.requestVideoFrameCallback(look);
      const { videoWidth: w, videoHeight: h } = video;
      context.drawImage(video, 0.38 * w, 0.66 * h, 0.24 * w, 0.16 * h, 0, 0, 8, 8);
      seen.push([mediaTime, ...context.getImageData(0, 0, 8, 8).data]);
    };
    video.requestVideoFrameCallback(look);
  });
"""


class Page:
    """An open page; a context manager that closes its browser."""

    def __init__(self, url, folder, voice, size=(420, 800)):
        """Opens the page; its microphone repeats `voice` (samples at 48 kHz)."""
        write_wav(folder / "microphone.wav", voice, 48_000)
        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in (
            "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
            # Nothing but the page is asked for.
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            "--disable-quic", "--no-first-run", f"--window-size={size[0]},{size[1]}",
            "--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream",
            f"--use-file-for-fake-audio-capture={folder}/microphone.wav",
        ):  # fmt: skip
            options.add_argument(flag)
        options.add_experimental_option("prefs", {"download.default_directory": str(folder)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        service = webdriver.ChromeService(executable_path=DRIVER)
        self.browser = webdriver.Chrome(options=options, service=service)
        self.browser.set_script_timeout(60)
        self.browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": WATCH})
        self.browser.get(url)

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.browser.quit()

    def __getitem__(self, name):
        return self.browser.find_element("id", name)

    def js(self, expression):
        return self.browser.execute_script(f"return {expression}")

    def until(self, expression, limit_s=120):
        """Waits until an expression of JavaScript is true; returns its value."""
        ends = time.monotonic() + limit_s
        while not (value := self.js(expression)):
            assert time.monotonic() < ends, f"never: {expression}"
            time.sleep(0.1)
        return value

    def hold(self, name):
        """Presses the mouse on an element, until `release`."""
        webdriver.ActionChains(self.browser).click_and_hold(self[name]).perform()

    def key_down(self, key):
        webdriver.ActionChains(self.browser).key_down(key).perform()

    def key_up(self, key):
        webdriver.ActionChains(self.browser).key_up(key).perform()

    def release(self):
        webdriver.ActionChains(self.browser).release().perform()

    def resize(self, width, height):
        """Shows the page at the size of a phone, which may be below that of a window."""
        size = {"width": width, "height": height, "deviceScaleFactor": 2, "mobile": True}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def event(self, kind, count=1, such="true"):
        """Waits for the `count`-th event of a kind with such fields."""
        return self.until(f"events.filter((e) => e.type === '{kind}' && {such})[{count - 1}]")

    def clock(self, event):
        """Time of an event on the clock of the player."""
        return event["at_s"] + self.event("session.created")["delay_s"]

    def motion(self, start, stop):
        """Mean motion of the mouth between frames in a part of the video, 0 to 255."""
        self.until(f"document.querySelector('video').currentTime > {stop}")
        seen = np.array(self.js(f"seen.filter((s) => s[0] >= {start} && s[0] < {stop})"))
        assert len(seen) >= 4, f"{len(seen)} frames in {stop - start} s"
        return np.abs(np.diff(seen[:, 1:], axis=0)).mean()

    def complaints(self):
        """Warnings and errors in the browser's console."""
        return [entry for entry in self.browser.get_log("browser") if entry["level"] == "SEVERE"]


def write_wav(path, samples, rate):
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(rate)
        file.writeframes((samples * 32767).astype("<i2").tobytes())
    return path
