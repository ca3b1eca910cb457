"""One page in a headless Chromium of the system, by playwright."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

NAMES = ("chromium", "google-chrome", "google-chrome-stable", "chromium-browser")
TIMEOUT = 60.0


def find_browser() -> str | None:
    """The path of a Chromium that starts, or None."""
    for path in filter(None, map(shutil.which, NAMES)):
        # Some systems put a script there that only tells how to get one.
        try:
            asked = subprocess.run([path, "--version"], capture_output=True, timeout=TIMEOUT)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if asked.returncode == 0:
            return path
    return None


class Browser:
    """One page in a browser of its own.

    Args:
        program: a Chromium.
        width: of the window, in pixels.
        height: likewise.
    """

    def __init__(self, program: str, width: int = 1400, height: int = 900) -> None:
        self._playwright = sync_playwright().start()
        self._browser = self._playwright.chromium.launch(
            executable_path=program,
            args=["--no-sandbox", "--disable-gpu", "--force-color-profile=srgb"],
        )
        self.page = self._browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(1000 * TIMEOUT)
        self.complaints: list[str] = []
        """Errors and warnings of the console, exceptions, and dialogs that opened."""
        self.requests: list[str] = []
        """Addresses that the page asked for."""
        self.page.on("console", self._spoke)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("requestfailed", lambda request: self.complaints.append(request.url))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("dialog", self._opened)

    def _spoke(self, message: Any) -> None:
        if message.type in ("error", "warning"):
            self.complaints.append(message.text)

    def _opened(self, dialog: Any) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def run(self, expression: str) -> Any:
        """The value of a JavaScript expression; promises are awaited."""
        return self.page.evaluate(f"() => ({expression})")

    def wait(self, expression: str) -> Any:
        """The value of an expression as soon as it is true."""
        return self.page.wait_for_function(f"() => ({expression})").json_value()

    def open(self, path: Path, fragment: str = "") -> None:
        """Load a report from disk and wait until it is ready."""
        self.page.goto("about:blank")
        self.page.goto(path.resolve().as_uri() + fragment)
        self.wait("document.documentElement?.dataset.ready === 'true'")

    def middle(self, selector: str) -> tuple[float, float]:
        """Where the middle of an element is in the window."""
        query = json.dumps(selector)
        x, y = self.wait(
            f"(() => {{ const box = document.querySelector({query})?.getClientRects()[0]; "
            "return box && [box.x + box.width / 2, box.y + box.height / 2]; })()"
        )
        return x, y

    def hover(self, selector: str) -> None:
        """Move the mouse onto an element."""
        self.page.mouse.move(*self.middle(selector))

    def click(self, selector: str) -> None:
        """Click an element."""
        self.page.mouse.click(*self.middle(selector))

    def press(self, key: str) -> None:
        """Press and release a key."""
        self.page.keyboard.press(key)

    def text(self, selector: str) -> str:
        """The text that an element shows."""
        return str(self.run(f"document.querySelector({json.dumps(selector)}).innerText"))

    def screenshot(self, path: Path) -> None:
        """What the window shows, as PNG."""
        self.page.screenshot(path=path)

    def close(self) -> None:
        """End the browser."""
        self._browser.close()
        self._playwright.stop()
