"""Headless Chromium for tests: found or installed, started with a clean profile, and read afterwards: what it asked
the network for, what it logged. The browser is the real one; what it looks at may be a stand-in's figures."""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.patience import patient

_INSTALL_S = 240.0


def why_not() -> str:
    """Why there is no Chromium here; empty: there is one. Installs it where that is possible."""
    programs = ("chromium", "chromedriver")
    if all(map(shutil.which, programs)):
        return ""
    missing = ", ".join(name for name in programs if not shutil.which(name))
    if os.geteuid() or not shutil.which("apt-get"):
        return f"there is no {missing}: install the packages chromium and chromium-driver"
    for command in (["update"], ["install", "-y", "--no-install-recommends", "chromium", "chromium-driver"]):
        try:
            subprocess.run(["apt-get", "-qq", *command], check=True, capture_output=True, timeout=_INSTALL_S)
        except (subprocess.SubprocessError, OSError) as error:
            return f"there is no {missing}, and apt-get {command[0]} failed: {error}"
    return "" if all(map(shutil.which, programs)) else f"apt-get installed no {missing}"


class Browser:
    """One window. `driver` is selenium's."""

    def __init__(self, folder: Path, dark: bool = False):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        for argument in (
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--hide-scrollbars"),
            f"--user-data-dir={folder}/profile",
        ):
            options.add_argument(argument)
        options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
        self.driver.set_page_load_timeout(30)
        self.driver.set_script_timeout(30)
        self.errors: list[str] = []
        self.scheme(dark)

    def scheme(self, dark: bool) -> None:
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def size(self, width: int, height: int = 900) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def js(self, code: str, *args: Any) -> Any:
        return self.driver.execute_script(code, *args)

    def text(self, selector: str) -> str:
        """What is to be read there, whether it is scrolled into view or not."""
        found = self.js(
            "const n = document.querySelector(arguments[0]); return n && !n.hidden ? n.textContent : ''", selector
        )
        return str(found)

    def until(self, code: str, timeout_s: float = 20.0) -> Any:
        """Wait until this expression is true in the page; returns it."""
        deadline = time.monotonic() + patient(timeout_s)
        while not (found := self.js(f"return {code}")):
            assert time.monotonic() < deadline, (
                f"not within {timeout_s} s: {code}\n{self.js('return document.body.innerText')[:3000]}"
            )
            time.sleep(0.1)
        return found

    def requests(self) -> list[str]:
        """URLs that the browser was made to ask for since the last call."""
        urls = []
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                urls.append(message["params"]["request"]["url"])
        return urls

    def complaints(self) -> list[str]:
        """Errors on the console since the last call: scripts that failed, what the policy refused."""
        return [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]

    def picture(self, path: Path) -> None:
        """The whole page, as it lies under the window's width."""
        size = self.driver.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        clip = {"x": 0, "y": 0, "width": size["width"], "height": min(size["height"], 8000), "scale": 1}
        shot = self.driver.execute_cdp_cmd(
            "Page.captureScreenshot", {"format": "png", "clip": clip, "captureBeyondViewport": True}
        )
        import base64

        path.write_bytes(base64.b64decode(shot["data"]))


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """A browser, for as long as the block lasts; skips the test where there is none."""
    if reason := why_not():
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="chromium"))
    browser = None
    try:
        browser = Browser(folder)
        yield browser
    finally:
        if browser is not None:
            browser.driver.quit()
        shutil.rmtree(folder, ignore_errors=True)
