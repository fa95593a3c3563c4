"""Debian's Chromium, headless and with nothing in it, driven by its own driver."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from selenium.webdriver import Chrome, ChromeOptions, ChromeService

# What a page itself holds; everything else leaves the browser.
LOCAL_SCHEMES = ("data", "blob", "about", "chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,2600",
    "--lang=en",
)


def browser_fault() -> str | None:
    """Say why there is no browser to drive, if there is none."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not found" if missing else None


@contextmanager
def chromium(profile: Path) -> Iterator[Chrome]:
    """Start a browser on a new profile, and stop it."""
    options = ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    service = ChromeService(shutil.which("chromedriver") or "")
    browser = Chrome(options=options, service=service)
    try:
        yield browser
    finally:
        browser.quit()


def requests_made(browser: Chrome) -> list[str]:
    """Return the address of every request since the last call, redirects included."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [
        message["params"]["request"]["url"]
        for message in messages
        if message["method"] == "Network.requestWillBeSent"
    ]


def origins(addresses: list[str]) -> set[str]:
    """Return where these requests went, but for what the page itself holds."""
    parts = [urlsplit(address) for address in addresses]
    return {f"{part.scheme}://{part.netloc}" for part in parts if part.scheme not in LOCAL_SCHEMES}
