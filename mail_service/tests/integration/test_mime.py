"""The filled skeleton beside what the standard library writes: they must be read alike."""

import random
from collections.abc import Iterator
from dataclasses import replace
from email import policy
from email.headerregistry import Address
from email.message import EmailMessage
from email.parser import BytesParser

import pytest

from mail_service.mime import CannotWrite, Skeleton, Values, plain_address

ORDERS = 2000
SENDER, REPLY_TO = "orders@shop.example", "help@shop.example"
IN_A_LINE = [
    "Tea", "녹차", "茶", "é", "\U0001f375", "\u202eback", "\u200b", ".", "=",
    " ", "  x", "a" * 300, "차" * 90, "?=", "=?", "\U0001f469\u200d\U0001f373",
]  # fmt: skip
IN_A_BODY = [
    *IN_A_LINE, "\r\nBcc: b@x.example", "\n.\n", "\r.\r", "\r\n.\r\n", "\t", "\x00", "\x85",
    "\u2028", "\r\n--=_order-confirmation_=\r\n",
]  # fmt: skip
ADDRESSES = [
    "minji@example.com", "a@b.kr", "x.y+z@sub.example.co.kr", "민지@example.com", "ü@exämple.de",
    f"{'l' * 64}@{'d' * 60}.example", "!#$%&'*+/=?^_`{|}~-@example.com",
]  # fmt: skip
PLAIN = Values(
    recipient="minji@example.com",
    subject="Order",
    date="Sat, 21 Nov 2026 09:00:00 +0000",
    message_id="<order-confirmation.1@shop.example>",
    order_id="1",
    text="text\n",
    html="<p>html</p>\n",
)


def skeleton(name: str = "차 한 잔, Tea") -> Skeleton:
    """Return the frame of a shop's mails."""
    return Skeleton(sender_name=name, sender=SENDER, reply_to=REPLY_TO, language="ko")


def written_by_the_library(values: Values, name: str = "차 한 잔, Tea") -> bytes:
    """Write the same mail with the standard library alone."""
    is_international = not values.recipient.isascii()
    message = EmailMessage(policy=policy.SMTPUTF8 if is_international else policy.SMTP)
    message["From"] = Address(name, addr_spec=SENDER)
    # Address takes no such local part, a header under this policy does.
    message["To"] = values.recipient if is_international else Address(addr_spec=values.recipient)
    message["Subject"] = values.subject
    message["Date"] = values.date
    message["Message-ID"] = values.message_id
    message["Reply-To"] = Address(addr_spec=REPLY_TO)
    message["Auto-Submitted"] = "auto-generated"
    message["X-Auto-Response-Suppress"] = "All"
    message["X-Order-Id"] = message["X-Entity-Ref-ID"] = values.order_id
    message.set_content(values.text, cte="base64")
    message.add_alternative(values.html, subtype="html", cte="base64")
    message["Content-Language"] = "ko"
    return message.as_bytes()


def read(content: bytes) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Read a mail as a mail program does: its headers, and type and text of its parts."""
    message = BytesParser(policy=policy.SMTPUTF8.clone(raise_on_defect=True)).parsebytes(content)
    assert isinstance(message, EmailMessage)
    # Of a long id the library makes a line of its own, and then reads a space before it.
    headers = [
        (name, str(value).strip()) for name, value in message.items() if name != "Content-Type"
    ]
    parts = [(part.get_content_type(), part.get_content()) for part in message.iter_parts()]
    return sorted(headers), parts


def generated() -> Iterator[Values]:
    """Give so many orders' values, always the same ones."""
    chosen = random.Random(20261121)

    def text(pieces: list[str], most: int) -> str:
        return "".join(chosen.choices(pieces, k=chosen.randint(1, most)))

    for number in range(ORDERS):
        order_id = "".join(chosen.choices("abcXYZ019_-", k=chosen.randint(1, 64)))
        yield replace(
            PLAIN,
            recipient=plain_address(chosen.choice(ADDRESSES)),
            subject=f"[{text(IN_A_LINE, 3)}] {number}",
            message_id=f"<order-confirmation.{order_id}@shop.example>",
            order_id=order_id,
            text=text(IN_A_BODY, 12),
            html=f"<p>{text(IN_A_BODY, 12)}</p>",
        )


def test_every_mail_is_read_as_the_librarys_is() -> None:
    """The same headers and bodies, whatever is in them."""
    frame = skeleton()
    for values in generated():
        assert read(frame.fill(values)) == read(written_by_the_library(values))


def test_what_looks_like_an_encoded_word_is_shown_as_it_is() -> None:
    """The library would decode it, and with it whatever somebody hid in it."""
    subject = "[=?utf-8?q?a=0ABcc:_b@example.com?=] 1"
    headers, _ = read(skeleton().fill(replace(PLAIN, subject=subject)))
    assert ("Subject", subject) in headers


@pytest.mark.parametrize("letter", ["\r", "\n", "\0", "\x0b", "\x1c", "\x7f", "\x85", "\u2028"])
def test_a_subject_is_one_line(letter: str) -> None:
    """What any reader could take for a line's end makes no mail."""
    with pytest.raises(CannotWrite):
        skeleton().fill(replace(PLAIN, subject=f"Order{letter}Bcc: b@example.com"))


def test_half_a_letter_makes_no_mail() -> None:
    """A lone surrogate is no text in any encoding."""
    with pytest.raises(CannotWrite):
        skeleton().fill(replace(PLAIN, text="\ud83c"))


@pytest.mark.parametrize(
    "address",
    [
        "", "@", "a@", "@b", "a", "a b@c.example", "a@b c", "a@b@c", '"a@b"@c.example',
        "a@[127.0.0.1]", ".a@b.example", "a.@b.example", "a..b@c.example", "a@b.", "a@-b.example",
        "a@b_.example", "a@b.example\r\nRCPT TO:<c@d.example>", "a,b@c.example",
        "a@b.example,c@d.example", "<a@b.example>", "a@b.example>",
        f"{'l' * 65}@b.example", f"a@{'d' * 64}.example", "\ud800@b.example",
        "a@straße.de", "a\u3164@b.example", "a@b\u200b.example", "a@b\u034f.example",
        "a@" + ".".join(["d" * 60] * 5),
    ],
)  # fmt: skip
def test_what_is_not_one_plain_address_is_refused(address: str) -> None:
    """Nothing that a header or a command could take for more, or for something else."""
    with pytest.raises(CannotWrite):
        plain_address(address)
