"""The confirmation as a mail program shows it: two languages, two widths, by day and by night.

Each look is kept as a picture: with PICTURES=docs/pictures there, where the README shows them,
else in a folder of the test's own.
"""

import base64
import json
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from selenium.webdriver import Chrome

from deploy.embedded.services import MAIL_SERVICE
from tests.support.browser import requests_made

REPOSITORY = Path(__file__).parents[2]
LOCALES, WIDTHS, SCHEMES = ("ko", "en"), (320, 640), ("light", "dark")
# WCAG 2.2, 1.4.3 (AA).
LEAST_CONTRAST = 4.5
DARK, LIGHT = 0.05, 0.8
# No font has a glyph for these.
WITHOUT_GLYPH = "\U000f1234\U000f1235"
MOST_PICTURE_BYTES = 80_000
COMMAND_SECONDS = 30.0
ENVIRONMENT = {
    "PATH": os.environ.get("PATH", ""),
    "APP_ENV": "test",
    "DATABASE_URL": "postgresql://nowhere.invalid/mail",
    "KAFKA_BOOTSTRAP_SERVERS": "nowhere.invalid:9092",
    "SMTP_HOST": "nowhere.invalid",
    "SMTP_TLS": "off",
    "MAIL_FROM": "orders@teahouse.example",
    "MAIL_ONLY_TO": "*",
    "SHOP_NAME": "차 한 잔 Teahouse",
    "SHOP_URL": "https://teahouse.example",
}
LONGEST = {
    "orderId": "W" * 64,
    "userId": "user-7",
    "amount": "999999999.99",
    "currency": "CHF",
    "email": f"{'w' * 64}@{'w' * 60}.{'w' * 60}.{'w' * 55}.example",
    "items": [
        {"sku": "A", "name": "W" * 200, "quantity": 9999, "unitPrice": "99999.99"},
        {"sku": "B", "name": "녹차" * 100, "quantity": 1, "unitPrice": "999999999.99"},
    ],
}
# Relative luminance and contrast of WCAG 2.2, of every text that is shown.
MEASURE = r"""
const numbers = (colour) => colour.match(/[\d.]+/g).map(Number);
const luminance = (colour) => {
  const [r, g, b] = numbers(colour).slice(0, 3).map((part) => part / 255).map(
    (part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
};
const behind = (element) => {
  for (let each = element; each; each = each.parentElement) {
    const colour = getComputedStyle(each).backgroundColor;
    const alpha = numbers(colour)[3];
    if (alpha === undefined || alpha === 1) return colour;
    if (alpha > 0) throw new Error("half transparent: " + colour);
  }
  throw new Error("nothing behind " + element.outerHTML);
};
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const node = walker.currentNode, range = document.createRange();
  range.selectNodeContents(node);
  if (!node.data.trim() || !range.getClientRects().length) continue;
  const of = luminance(getComputedStyle(node.parentElement).color);
  const on = luminance(behind(node.parentElement));
  const contrast = (Math.max(of, on) + 0.05) / (Math.min(of, on) + 0.05);
  found.push({text: node.data.trim(), contrast, behind: on,
    isLink: node.parentElement.tagName === "A"});
}
return found;
"""
DRAW = """
const [letters, font] = arguments;
return [...letters].map((letter) => {
  const canvas = document.createElement("canvas");
  canvas.width = canvas.height = 64;
  const paper = canvas.getContext("2d");
  paper.font = font;
  paper.fillText(letter, 8, 48);
  return canvas.toDataURL();
});
"""
TABLES = """
return [...document.querySelectorAll("table")].map((table) => ({
  role: table.getAttribute("role"),
  scopes: [...table.querySelectorAll(":scope > tbody > tr > th")].map((cell) => cell.scope),
}));
"""


@dataclass(frozen=True)
class Look:
    """One of the ways in which a mail is seen."""

    locale: str
    width: int
    scheme: str

    def __str__(self) -> str:
        return f"{self.locale}.{self.width}.{self.scheme}"


@dataclass(frozen=True)
class Shown:
    """A mail in the browser, as somebody sees it."""

    browser: Chrome
    file: Path
    look: Look

    def ask(self, script: str, *arguments: object) -> Any:
        """Run a script in the page; return what it returns."""
        return self.browser.execute_script(script, *arguments)

    def picture(self) -> bytes:
        """Return the whole page as a PNG file."""
        size = self.browser.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
        taken = self.browser.execute_cdp_cmd(
            "Page.captureScreenshot",
            {
                "captureBeyondViewport": True,
                "clip": {**size, "scale": 1},
                "optimizeForSpeed": False,
            },
        )
        return base64.b64decode(taken["data"])


LOOKS = [Look(*each) for each in product(LOCALES, WIDTHS, SCHEMES)]


def preview(out: Path, locale: str, *more: str) -> Path:
    """Have the mail service write the mail of an order, the sample's unless said otherwise."""
    command = [str(MAIL_SERVICE), "preview", "--locale", locale, "--out", str(out), *more]
    subprocess.run(command, env=ENVIRONMENT, timeout=COMMAND_SECONDS, check=True)
    return out


def show(browser: Chrome, file: Path, look: Look) -> Shown:
    """Open a mail as it looks to somebody."""
    metrics = {"width": look.width, "height": 400, "deviceScaleFactor": 1, "mobile": True}
    scheme = [{"name": "prefers-color-scheme", "value": look.scheme}]
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": scheme})
    browser.get(file.as_uri())
    return Shown(browser, file, look)


@pytest.fixture(scope="module")
def emulating(browser: Chrome) -> Iterator[Chrome]:
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


@pytest.fixture(scope="module")
def mails(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("mails")
    return {locale: preview(folder / f"{locale}.html", locale) for locale in LOCALES}


@pytest.fixture(scope="module", params=LOOKS, ids=str)
def shown(emulating: Chrome, mails: dict[str, Path], request: pytest.FixtureRequest) -> Shown:
    requests_made(emulating)
    return show(emulating, mails[request.param.locale], request.param)


def test_nothing_leaves_the_page(shown: Shown) -> None:
    """Who opens the mail is not told to anybody."""
    assert requests_made(shown.browser) == [shown.file.as_uri()]
    assert shown.ask("return performance.getEntriesByType('resource').length") == 0


def test_it_is_as_wide_as_the_screen(shown: Shown) -> None:
    """Nobody scrolls to the side."""
    assert width_of(shown) == shown.look.width


def test_every_text_can_be_read(shown: Shown) -> None:
    """Dark is dark, light is light, and no text comes too close to what is behind it."""
    texts = shown.ask(MEASURE)
    assert len(texts) > 10
    assert [text for text in texts if text["contrast"] < LEAST_CONTRAST] == []
    papers = [text["behind"] for text in texts if not text["isLink"]]
    assert all(paper < DARK if shown.look.scheme == "dark" else paper > LIGHT for paper in papers)


def test_a_screen_reader_finds_its_way(shown: Shown) -> None:
    """The language, one heading, and tables that are either layout or have headers."""
    assert shown.ask("return document.documentElement.lang") == shown.look.locale
    assert shown.ask("return document.querySelectorAll('h1').length") == 1
    tables = shown.ask(TABLES)
    assert [table["role"] for table in tables] == ["presentation", "presentation", None, None]
    assert all(bool(table["scopes"]) is (table["role"] is None) for table in tables)
    assert {scope for table in tables for scope in table["scopes"]} == {"row", "col"}


def test_the_preview_text_is_for_the_inbox(shown: Shown) -> None:
    """It is the first text of the mail, and is not seen in it."""
    first, seen = shown.ask(
        "return [document.body.firstElementChild.textContent, document.body.innerText]"
    )
    assert "₩57,000" in first
    assert first not in seen
    assert "₩57,000" in seen


def test_korean_has_its_letters(shown: Shown) -> None:
    """Each is drawn as itself; without a font for it all would be the same box."""
    font = shown.ask("return getComputedStyle(document.querySelector('.card')).fontFamily")
    letters = "주문번호하동녹차"
    assert len(set(shown.ask(DRAW, letters, f"32px {font}"))) == len(letters)
    assert len(set(shown.ask(DRAW, WITHOUT_GLYPH, f"32px {font}"))) == 1


def test_its_picture_is_kept(shown: Shown, tmp_path: Path) -> None:
    """A person can look at it, in the README too."""
    folder = REPOSITORY / os.environ["PICTURES"] if "PICTURES" in os.environ else tmp_path
    folder.mkdir(parents=True, exist_ok=True)
    picture = folder / f"confirmation.{shown.look}.png"
    picture.write_bytes(shown.picture())
    assert picture.stat().st_size < MOST_PICTURE_BYTES


@pytest.mark.parametrize("locale", LOCALES)
def test_the_longest_values_fit(locale: str, emulating: Chrome, tmp_path: Path) -> None:
    """Names, numbers and addresses as long as they can be make it longer, not wider."""
    event = tmp_path / "event.json"
    event.write_text(json.dumps(LONGEST), encoding="utf-8")
    file = preview(tmp_path / "mail.html", locale, "--event", str(event))
    shown = show(emulating, file, Look(locale, WIDTHS[0], SCHEMES[0]))
    (tmp_path / "longest.png").write_bytes(shown.picture())
    assert width_of(shown) == shown.look.width


def width_of(shown: Shown) -> int:
    """Return how wide the page would like to be."""
    return int(shown.ask("return document.documentElement.scrollWidth"))
