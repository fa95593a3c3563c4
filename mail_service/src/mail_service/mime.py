"""A mail's bytes: what `email` wrote once for each language, filled in for each mail.

The standard library's generator is careful and slow. Here it writes one mail with marks in it, and
a mail is that text with the marks replaced: by values that cannot be more than they should be.
Headers and encoded words are those of RFC 5322 and RFC 2047, an address in other letters is
RFC 6532's, bodies are base64 (RFC 2045).
"""

import binascii
import re
import struct
import unicodedata
from dataclasses import dataclass
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from functools import lru_cache

# No base64 holds it, so no body can.
BOUNDARY = "=_order-confirmation_="
BASE64_LINE = 76
SENDER_MARK = "mark-of-the-sender"
# An encoded word is 75 characters at most, of which 12 are its frame; 45 bytes make 60.
WORD_BYTES = 45
MARKS = {
    "recipient": "recipient@mark.invalid",
    "subject": "mark-of-the-subject",
    "date": "Thu, 01 Jan 1970 00:00:00 +0000",
    "message_id": "<mark-of-the-message@mark.invalid>",
    "order_id": "mark-of-the-order",
    "text": "mark of the text\r\n",
    "html": "mark of the html\r\n",
}
# RFC 5321 §4.1.2 and RFC 6531 §3.3: a dot-string; other letters are looked at one by one.
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~\x80-\U0010FFFF-]+"
LOCAL = re.compile(rf"{_ATOM}(?:\.{_ATOM})*")
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
DOMAIN = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
CHANGED_BY_IDNA_2003 = frozenset("\u00df\u1e9e\u03c2")
# Letters and marks by their category, and yet nothing: Hangul fillers, joiners, variations.
INVISIBLE = frozenset("\u115f\u1160\u3164\uffa0\u034f") | {chr(n) for n in range(0xFE00, 0xFE10)}
MOST_LOCAL_BYTES = 64
MOST_ADDRESS_BYTES = 254
LAST_ASCII = re.compile(r"(?<=[^ ]) [!-~]{1,70}\Z")
ENCODED_WORD = re.compile(r"=\?.*\?=")
UNFIT_FOR_A_HEADER = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class CannotWrite(Exception):
    """A value cannot stand where it should; the message says which, and holds no value."""


@dataclass(frozen=True, slots=True)
class Values:
    """What differs between the mails of one language; `date` is RFC 5322's."""

    recipient: str
    subject: str
    date: str
    message_id: str
    order_id: str
    text: str
    html: str


class Skeleton:
    """One language's mail, written by `email`, with a mark for each of the Values."""

    def __init__(
        self, *, sender_name: str, sender: str, reply_to: str | None, language: str
    ) -> None:
        message = EmailMessage(policy=SMTP)
        message["From"] = Address(SENDER_MARK, addr_spec=sender)
        message["To"] = Address(addr_spec=MARKS["recipient"])
        message["Subject"] = MARKS["subject"]
        message["Date"] = MARKS["date"]
        message["Message-ID"] = MARKS["message_id"]
        if reply_to:
            message["Reply-To"] = Address(addr_spec=reply_to)
        message["Auto-Submitted"] = "auto-generated"
        message["X-Auto-Response-Suppress"] = "All"
        message["X-Order-Id"] = MARKS["order_id"]
        # Two orders are two conversations, however alike their subjects are.
        message["X-Entity-Ref-ID"] = MARKS["order_id"]
        # base64: no relay needs 8BITMIME for it, whatever a name is written in.
        message.set_content(MARKS["text"], cte="base64")
        message.add_alternative(MARKS["html"], subtype="html", cte="base64")
        message.set_boundary(BOUNDARY)
        # Only now: becoming multipart, a message gives its Content- headers to its first part.
        message["Content-Language"] = language
        written = message.as_bytes()
        self._pieces = _split(written.replace(SENDER_MARK.encode(), _phrase(sender_name), 1))

    def fill(self, values: Values) -> bytes:
        """Return the mail; raise CannotWrite."""
        filled = {
            "recipient": values.recipient.encode(),
            "subject": _subject(values.subject),
            "date": values.date.encode(),
            "message_id": values.message_id.encode(),
            "order_id": values.order_id.encode(),
            "text": _base64(values.text),
            "html": _base64(values.html),
        }
        return b"".join(filled.get(name, fixed) for fixed, name in self._pieces)


def plain_address(address: str) -> str:
    """Return an address as the envelope and the header carry it, its domain in ASCII.

    One address and nothing else; raises CannotWrite.
    """
    local, _, domain = address.rpartition("@")
    try:
        plain = f"{local}@{domain.encode('idna').decode()}"
        is_short = len(local.encode()) <= MOST_LOCAL_BYTES
        is_short = is_short and len(plain.encode()) <= MOST_ADDRESS_BYTES
    except UnicodeError as error:
        raise CannotWrite("the recipient's domain or letters") from error
    if not (
        is_short
        and all(map(_is_seen, address))
        # Python's IDNA is that of 2003: these would become another domain, perhaps another's.
        and CHANGED_BY_IDNA_2003.isdisjoint(domain)
        and not ENCODED_WORD.search(local)
        and LOCAL.fullmatch(local)
        and DOMAIN.fullmatch(plain.rpartition("@")[2])
    ):
        raise CannotWrite("the recipient is not one plain address")
    return plain


def _is_seen(letter: str) -> bool:
    """Say whether a reader of an address sees this letter."""
    if letter.isascii():
        return True
    return unicodedata.category(letter)[0] in "LMN" and letter not in INVISIBLE


def _split(written: bytes) -> list[tuple[bytes, str]]:
    """Cut what was written at its marks: fixed text with no name, and names with no text."""
    names = {}
    for name, mark in MARKS.items():
        is_body = name in ("text", "html")
        names[binascii.b2a_base64(mark.encode()).rstrip() if is_body else mark.encode()] = name
    pattern = b"(" + b"|".join(map(re.escape, names)) + b")"
    pieces = [bytes(piece) for piece in re.split(pattern, written)]
    if set(pieces[1::2]) != set(names):
        raise CannotWrite("the mail's frame")
    return [(b"", names[piece]) if piece in names else (piece, "") for piece in pieces]


def _subject(text: str) -> bytes:
    """Write a subject as it is, or in encoded words on lines of their own (RFC 2047 §2)."""
    if UNFIT_FOR_A_HEADER.search(text):
        raise CannotWrite("the subject holds what no header can")
    if text.isascii() and "=?" not in text and len(text) <= BASE64_LINE - len("Subject: "):
        return text.encode()
    # What is ASCII at the end, as the order's id is, stays for those who search and sort mail.
    encoded = LAST_ASCII.sub("", text)
    rest = text[len(encoded) :]
    if encoded and rest and "=?" not in rest:
        return _encoded_words(encoded) + b"\r\n" + rest.encode()
    return _encoded_words(text)


def _phrase(name: str) -> bytes:
    """Write a name before an address: quoted, or in encoded words (RFC 5322 §3.2.5).

    The library would decode what looks like an encoded word, and puts spaces into long names.
    """
    if UNFIT_FOR_A_HEADER.search(name):
        raise CannotWrite("the shop's name holds what no header can")
    if name.isascii() and "=?" not in name and len(name) < BASE64_LINE:
        quoted = name.replace("\\", r"\\").replace('"', r"\"")
        return f'"{quoted}"'.encode()
    return _encoded_words(name)


# A subject's words before its number are those of the last mail, most often.
@lru_cache(maxsize=256)
def _encoded_words(text: str) -> bytes:
    """Write a text on lines of its own, no letter cut (RFC 2047 §5)."""
    words, word = [], b""
    for letter in text:
        encoded = letter.encode()
        if len(word) + len(encoded) > WORD_BYTES:
            words.append(word)
            word = b""
        word += encoded
    words.append(word)
    return b"\r\n ".join(
        b"=?utf-8?b?" + binascii.b2a_base64(word, newline=False) + b"?=" for word in words
    )


def _base64(text: str) -> bytes:
    try:
        plain = text.encode()
    except UnicodeEncodeError as error:
        raise CannotWrite("half a letter in the text") from error
    if b"\r" in plain or not plain.endswith(b"\n"):
        plain = b"\n".join([*plain.splitlines(), b""])
    encoded = binascii.b2a_base64(plain.replace(b"\n", b"\r\n"), newline=False)
    full, rest = divmod(len(encoded), BASE64_LINE)
    # Cut in one call: slice by slice it would be a tenth of what a mail costs.
    form = f"{BASE64_LINE}s" * full + (f"{rest}s" if rest else "")
    return b"\r\n".join(struct.unpack(form, encoded))
