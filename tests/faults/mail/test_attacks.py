"""Attacks through an order on its mail: each is text in it, or there is no mail.

The oracle is the mail of a harmless order: with its values replaced it must be the attack's mail,
header by header, tag by tag.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from email import policy
from email.message import EmailMessage
from email.parser import BytesParser
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tests.support.mail_side import MailSide
from tests.support.records import Row, order

# Where a value can stand, in which language, and how long it may be there.
PLACES = (("name", "ko", 200), ("name", "en", 200), ("sku", "en", 64))
LOCALES = ("ko", "en")
HARMLESS = {"name": "HARMLESS-NAME", "sku": "HARMLESS-SKU"}
EXIT_UNUSABLE = 2

LINE_ENDS = {
    "CRLF": "\r\n", "LF": "\n", "CR": "\r", "VT": "\v", "FF": "\f", "FS": "\x1c", "NEL": "\x85",
    "LS": "\u2028", "PS": "\u2029",
}  # fmt: skip
ENCODED_WORDS = (
    "=?utf-8?q?a=0ABcc:_b@example.com?=",
    "=?utf-8?b?DQpCY2M6IGJAZXhhbXBsZS5jb20=?=",
    "=?utf-8?q?a=40example.com=2C?=",
)
HTML = (
    "<img src=x>",
    "<script>alert(1)</script>",
    "</script><script>alert(1)</script>",
    "</title></table><form action=//example.com>",
    "javascript:alert(1)",
    '" onmouseover="alert(1)',
    "<!--",
    "]]>",
    "&lt;img&gt;",
)
TEMPLATES = ("{{7*7}}", "{% include 'words.ko.txt' %}", "{#")
SMUGGLED = (
    ".",
    "\n.\n",
    "\r\n.\r\n",
    "\r.\r",
    "\n.\r\n",
    "\r\n.\n",
    "\r\n.\r\nMAIL FROM:<a@b.example>\r\nRCPT TO:<c@d.example>\r\n",
    "\r\n--=_order-confirmation_=--\r\n",
)
UNSEEN = ("\u202eaeT", "\u200b", "\ufeff", "\x1b[2J", "\x7f")
HOSTILE = (
    *(f"Tea{end}Bcc: b@example.com" for end in LINE_ENDS.values()),
    *ENCODED_WORDS,
    "a@example.com, b@example.com",
    *HTML,
    *TEMPLATES,
    *SMUGGLED,
    *UNSEEN,
)
# Words that the template's and the mail's making put in place of values.
OUR_MARKS = ("jinja-1-", "<!--jinja-1-->", "mark-of-the-order", "mark of the html\r\n")

UNREADABLE = "not an OrderCreatedEvent: "
NOT_PLAIN = "cannot be rendered: the recipient is not one plain address"
NOT_A_DOMAIN = "cannot be rendered: the recipient's domain or letters"
HALF_A_LETTER = "cannot be rendered: half a letter in the text"

Outcome = tuple[str, str | None]
A_LETTER: Outcome = ("dead letter", f"{UNREADABLE}email")


def mailed(to: str) -> Outcome:
    return "mailed", to


def dead(reason: str) -> Outcome:
    return "DEAD", reason


ADDRESSES: dict[str, Outcome] = {
    **{f"a@example.com{end}Bcc: b@example.com": A_LETTER for end in LINE_ENDS.values()},
    **{f"a{end}b@example.com": A_LETTER for end in LINE_ENDS.values()},
    **{f"a@example.com{end}": A_LETTER for end in LINE_ENDS.values()},
    "a@example.com>\r\nRCPT TO:<b@example.com": A_LETTER,
    "a@example.com> SIZE=1": A_LETTER,
    "a@example.com\0": A_LETTER,
    # Another two, or another one
    "a@example.com, b@example.com": A_LETTER,
    "a@example.com,b@example.com": A_LETTER,
    "a@example.com;b@example.com": A_LETTER,
    "a@example.com\uff0cb.example": dead(NOT_PLAIN),
    "a@example.com\uff0cb@example.com": A_LETTER,
    "a\uff0cb@example.com": dead(NOT_PLAIN),
    "everyone:a@example.com;": A_LETTER,
    "Minji <a@example.com>": A_LETTER,
    "a@example.com (b@example.com)": A_LETTER,
    "@b.example:a@example.com": A_LETTER,
    "=?utf-8?q?a=0ABcc:_b?=@example.com": A_LETTER,
    "=?utf-8?q?b=40example.com=2C?=@example.com": dead(NOT_PLAIN),
    # Domains in other letters
    "a@exämple.de": mailed("a@xn--exmple-cua.de"),
    "a@차한잔.한국": mailed("a@xn--ev5bt7f7vj.xn--3e0b707e"),
    "a@EXÄMPLE.de": mailed("a@xn--exmple-cua.de"),
    "a@straße.de": dead(NOT_PLAIN),
    "a@p\u0430ypal.example": mailed("a@xn--pypal-4ve.example"),
    "a@exa\u200bmple.com": dead(NOT_PLAIN),
    "a@exa\u202emple.com": dead(NOT_A_DOMAIN),
    f"a@{'é' * 64}.example": dead(NOT_A_DOMAIN),
    # Local parts in other letters
    "민지@example.com": mailed("민지@example.com"),
    "\u0430dmin@example.com": mailed("\u0430dmin@example.com"),
    "a\u202eb@example.com": dead(NOT_PLAIN),
    "a\u2066b@example.com": dead(NOT_PLAIN),
    "a\u200bb@example.com": dead(NOT_PLAIN),
    "a\u200db@example.com": dead(NOT_PLAIN),
    "\ufeffa@example.com": dead(NOT_PLAIN),
    "\ud800@example.com": dead(NOT_A_DOMAIN),
    # Odd, and in part valid
    '"a@b"@example.com': A_LETTER,
    '"a b"@example.com': A_LETTER,
    "a@[127.0.0.1]": A_LETTER,
    "a@[IPv6:::1]": A_LETTER,
    "a": A_LETTER,
    "a@b@example.com": A_LETTER,
    "a\\b@example.com": A_LETTER,
    ".a@example.com": dead(NOT_PLAIN),
    "a.@example.com": dead(NOT_PLAIN),
    "a..b@example.com": dead(NOT_PLAIN),
    "a@-example.com": dead(NOT_PLAIN),
    "a@example.com.": dead(NOT_PLAIN),
    f"{'a' * 65}@example.com": dead(NOT_PLAIN),
    f"{'a' * 64}@example.com": mailed(f"{'a' * 64}@example.com"),
    f"a@{'a' * 300}": A_LETTER,
    "-oQ/tmp@b.example": mailed("-oQ/tmp@b.example"),
    "|id@example.com": mailed("|id@example.com"),
    "{{7*7}}@example.com": mailed("{{7*7}}@example.com"),
    "'or'1'='1@example.com": mailed("'or'1'='1@example.com"),
    "&lt;@example.com": A_LETTER,
}


@dataclass(frozen=True)
class Mail:
    """A mail as its recipient's program reads it; `markup` is the script's JSON."""

    headers: list[tuple[str, str]]
    text: str
    html: list[str]
    markup: str

    def replaced(self, values: Mapping[str, str]) -> "Mail":
        """Return it with other values where these stand."""

        def put(text: str) -> str:
            for old, new in values.items():
                text = text.replace(old, new)
            return text

        markup = self.markup
        for old, new in values.items():
            markup = markup.replace(old, json.dumps(new)[1:-1])
        headers = [(name, put(value)) for name, value in self.headers]
        pieces = [lines(put(piece)) for piece in self.html]
        return Mail(headers, lines(put(self.text)), pieces, markup)


@dataclass
class Pieces(HTMLParser):
    """What an HTML parser finds: tags with their attributes, texts, comments, and the script."""

    found: list[str] = field(default_factory=list)
    markup: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note an element."""
        self.found.append(f"<{tag} {sorted(attrs)}>")

    def handle_endtag(self, tag: str) -> None:
        """Note its end."""
        self.found.append(f"</{tag}>")

    def handle_data(self, data: str) -> None:
        """Note a text; a script's apart."""
        (self.markup if self.lasttag == "script" and self.cdata_elem else self.found).append(data)

    def handle_comment(self, data: str) -> None:
        """Note a comment."""
        self.found.append(f"<!--{data}")

    def handle_pi(self, data: str) -> None:
        """Note an instruction to programs."""
        self.found.append(f"<?{data}")


def test_a_value_is_text_wherever_it_stands(side: MailSide) -> None:
    """One mail each, to its one recipient: the harmless order's, with other words in it."""
    sent = {
        f"{place}-{locale}-{number}": (place, locale, value)
        for place, locale, most in PLACES
        for number, value in enumerate([*HOSTILE, *OUR_MARKS])
        if len(value) <= most
    }
    records = [
        hostile(name, locale, {place: value}) for name, (place, locale, value) in sent.items()
    ]
    records += [hostile(f"harmless-{locale}", locale) for locale in LOCALES]
    with side.running():
        settle(side, records)
        mails = found(side)
    assert len(mails) == len(records)
    for name, (place, locale, value) in sent.items():
        harmless = mails[f"order-harmless-{locale}"]
        values = {HARMLESS[place]: value, f"harmless-{locale}": name}
        assert mails[f"order-{name}"] == harmless.replaced(values), name


def test_what_no_mail_can_hold(side: MailSide) -> None:
    """An order id that is none, NUL, half a letter: never mailed, and nothing said to the relay."""
    letter = ("dead letter", f"{UNREADABLE}orderId")
    records = [
        {**order(number, orderId=value), "key": f"order-{number}"}
        for number, value in enumerate([*HOSTILE, "a" * 65, "", "주문", "../..", "a@b", "1 2"])
    ]
    expected = {record["key"]: letter for record in records}
    nul, half = hostile("nul", "ko", {"name": "\0"}), hostile("half", "ko", {"name": "\ud800"})
    with side.running():
        settle(side, [*records, nul, half])
    assert outcomes(side) == {
        **expected,
        "order-nul": ("dead letter", f"{UNREADABLE}items"),
        "order-half": dead(HALF_A_LETTER),
    }
    assert side.sink.counters().stages["mail"] == 0


def test_an_address_is_one_address(side: MailSide) -> None:
    """Each becomes what the table says; a mail has one recipient, in its header as in RCPT."""
    records = [hostile(str(number), "en", email=each) for number, each in enumerate(ADDRESSES)]
    with side.running():
        settle(side, [*records, hostile("harmless-en", "en")])
        mails = found(side)
    became = outcomes(side)
    to = {mail.order_id: mail.recipient for mail in side.sink.accepted()}
    assert {
        each: became.get(f"order-{number}", ("mailed", to.get(f"order-{number}")))
        for number, each in enumerate(ADDRESSES)
    } == ADDRESSES
    harmless = mails["order-harmless-en"]
    for number, each in enumerate(ADDRESSES):
        name = f"order-{number}"
        if name not in became:
            values = {"customer-harmless-en@example.com": each, "harmless-en": str(number)}
            expected = harmless.replaced(values)
            head = {**dict(expected.headers), "To": to[name]}
            assert mails[name] == replace(expected, headers=[*head.items()])


@pytest.mark.parametrize(
    "name", ["Tea\r\nBcc: b@example.com", "Tea\x85Bcc: b@example.com"], ids=["CRLF", "NEL"]
)
def test_a_shops_name_that_no_header_can_hold(name: str, side: MailSide) -> None:
    """The process says so and ends, before the first mail."""
    with side.running(is_waited_for=False, SHOP_NAME=name) as replica:
        assert replica.wait_for_end() == EXIT_UNUSABLE


@pytest.mark.parametrize(
    "name",
    ["Tea, b@example.com </script><img src=x> {{7*7}}", ENCODED_WORDS[0]],
    ids=["HTML", "encoded word"],
)
def test_a_shops_name_is_text(name: str, side: MailSide, tmp_path: Path) -> None:
    """Neither a header nor a second sender comes of it, and in the HTML no tag."""
    record = hostile("1", "en")
    event, preview = tmp_path / "event.json", tmp_path / "mail.eml"
    event.write_text(record["value"], encoding="utf-8")
    other = replace(side, environment={**side.environment, "SHOP_NAME": "HARMLESS-SHOP"})
    other.command("preview", "--event", str(event), "--out", str(preview))
    with side.running(SHOP_NAME=name):
        settle(side, [record])
        mail = found(side)["order-1"]
    expected = read(preview.read_bytes()).replaced({"HARMLESS-SHOP": name})
    sender = ("From", f'"{name}" <orders@teahouse.example>')
    assert mail == replace(expected, headers=[sender, *expected.headers[1:]])


def hostile(
    name: str, locale: str, values: Mapping[str, str] | None = None, **changes: object
) -> Row:
    """Return a record of an order with these values in these places."""
    said = {**HARMLESS, **(values or {})}
    item = {"sku": said["sku"], "name": said["name"], "quantity": 1, "unitPrice": "57000"}
    at = {"orderedAt": "2026-11-21T09:00:00Z", "locale": locale}
    return order(name, items=[item], **at, **changes)


def settle(side: MailSide, records: Iterable[Row]) -> None:
    """Send records and wait until nothing is left to do about them."""
    side.send(records)
    ends = side.ends()
    side.wait_for(lambda: side.positions() == ends and set(side.states()) <= {"SENT", "DEAD"})


def outcomes(side: MailSide) -> dict[str, Outcome]:
    """Tell of each record that was not mailed what became of it, by its key."""
    letters: dict[str, Outcome] = {
        bytes(row["key"]).decode(): ("dead letter", row["reason"]) for row in side.dead_letters()
    }
    rows = {key: row for key, row in side.mails().items() if row["state"] != "SENT"}
    return {**letters, **{key: (row["state"], row["reason"]) for key, row in rows.items()}}


def found(side: MailSide) -> dict[str | None, Mail]:
    """Return the mails by order; each has one recipient, and the relay saw nothing odd."""
    accepted = side.sink.accepted()
    counters = side.sink.counters()
    assert counters.violations == []
    assert counters.most_recipients == 1
    assert counters.mails == len(accepted) == len({mail.order_id for mail in accepted})
    return {mail.order_id: read(side.sink.content(mail)) for mail in accepted}


def read(content: bytes) -> Mail:
    """Read a mail, with which nothing may be wrong."""
    parser = BytesParser(policy=policy.SMTPUTF8.clone(raise_on_defect=True))
    message: Any = parser.parsebytes(content)
    assert isinstance(message, EmailMessage)
    head = content.partition(b"\r\n\r\n")[0]
    assert len(re.findall(rb"(?m)^[^ \t]", head)) == len(message) == len(set(message.keys()))
    text, rich = message.iter_parts()
    pieces = Pieces()
    pieces.feed(lines(rich.get_content()))
    pieces.close()
    (markup,) = pieces.markup
    headers = [(name, value) for name, value in message.items() if name != "Date"]
    return Mail(headers, lines(text.get_content()), pieces.found, json.dumps(json.loads(markup)))


def lines(text: str) -> str:
    """Return a text with one kind of line end."""
    return re.sub("\r\n|\r", "\n", text)
