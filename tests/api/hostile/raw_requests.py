"""Bytes that are hardly HTTP: refused by the server before the application, or by it.

`{head}` stands for the request line and headers of a good order but for the length of its body;
`{body}` for that body.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class RawCase:
    """Bytes, and whether our side of the connection closes after them."""

    name: str
    request: bytes
    half: bool = False
    # RFC 9112 §6.1: the one 5xx that is the client's doing. The server itself answers it.
    is_501: bool = False


_POST = b"POST /v1/orders HTTP/1.1\r\n"
_GOOD = b"{head}Content-Length: {length}\r\n\r\n{body}"


def _length(text: bytes) -> bytes:
    return b"{head}Content-Length: " + text + b"\r\n\r\n{body}"


def _coding(text: bytes, body: bytes) -> bytes:
    return b"{head}Transfer-Encoding: " + text + b"\r\n\r\n" + body


def _header(line: bytes) -> bytes:
    return _GOOD.replace(b"{head}", b"{head}" + line + b"\r\n")


def _line(line: bytes) -> bytes:
    return line + b"\r\nHost: a\r\n\r\n"


_CHUNKS = b"{hex}\r\n{body}\r\n0\r\n\r\n"

CASES = [
    # The two lengths of a body, and neither: request smuggling.
    RawCase(
        "both lengths", b"{head}Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n" + _CHUNKS
    ),
    RawCase(
        "both lengths, the other way",
        b"{head}Transfer-Encoding: chunked\r\nContent-Length: 4\r\n\r\n" + _CHUNKS,
    ),
    RawCase("two lengths", b"{head}Content-Length: {length}\r\nContent-Length: 4\r\n\r\n{body}"),
    RawCase("a list of lengths", _length(b"{length}, 4")),
    RawCase("a negative length", _length(b"-1")),
    RawCase("a signed length", _length(b"+{length}")),
    RawCase("a length in hexadecimal", _length(b"0x{length}")),
    RawCase("a length with a fraction", _length(b"{length}.0")),
    RawCase("a length with an underscore", _length(b"1_0")),
    RawCase("a length of Arabic digits", _length("\u0661\u0660".encode())),
    RawCase("an empty length", _length(b"")),
    RawCase("a length of words", _length(b"all")),
    RawCase("a length of 5,000 digits", _length(b"9" * 5_000)),
    RawCase("a length too long, and no more", _length(b"9999"), half=True),
    RawCase("a length and no body", b"{head}Content-Length: {length}\r\n\r\n", half=True),
    RawCase("half a body", b'{head}Content-Length: {length}\r\n\r\n{"email": "', half=True),
    RawCase("an unknown coding", _coding(b"xchunked", _CHUNKS), is_501=True),
    RawCase("a coding after chunked", _coding(b"chunked, gzip", _CHUNKS)),
    RawCase("chunked twice", _coding(b"chunked, chunked", _CHUNKS)),
    RawCase("identity after chunked", _coding(b"chunked, identity", _CHUNKS)),
    RawCase("a coding with a vertical tab", _coding(b"\x0bchunked", _CHUNKS)),
    RawCase("a coding in quotes", _coding(b'"chunked"', _CHUNKS), is_501=True),
    RawCase("a chunk whose size is no number", _coding(b"chunked", b"zz\r\n{body}\r\n0\r\n\r\n")),
    RawCase("a chunk of negative size", _coding(b"chunked", b"-1\r\n{body}\r\n0\r\n\r\n")),
    RawCase("a chunk with 0x", _coding(b"chunked", b"0x{hex}\r\n{body}\r\n0\r\n\r\n")),
    RawCase("a chunk with an underscore", _coding(b"chunked", b"1_0\r\n{body}\r\n0\r\n\r\n")),
    RawCase("a chunk without a size", _coding(b"chunked", b"\r\n{body}\r\n0\r\n\r\n")),
    RawCase("a chunk longer than it says", _coding(b"chunked", b"3\r\n{body}\r\n0\r\n\r\n")),
    RawCase("a chunk shorter than it says", _coding(b"chunked", b"ffff\r\n{body}\r\n"), half=True),
    RawCase("a chunk of a huge size", _coding(b"chunked", b"f" * 40 + b"\r\n{body}"), half=True),
    RawCase("chunks without end", _coding(b"chunked", b"{hex}\r\n{body}\r\n"), half=True),
    RawCase("a size without end", _coding(b"chunked", b"1" * 70_000), half=True),
    RawCase("an extension without end", _coding(b"chunked", b"1;" + b"a" * 70_000), half=True),
    # Header fields.
    RawCase("a space before the colon", _header(b"X-Evil : 1")),
    RawCase("a name with a space", _header(b"X Evil: 1")),
    RawCase("an empty name", _header(b": 1")),
    RawCase("no colon", _header(b"X-Evil")),
    RawCase("a folded line", _header(b"X-Evil: 1\r\n 2")),
    RawCase("a folded first line", _POST + b" X-Evil: 1\r\n\r\n"),
    RawCase("a bare carriage return", _header(b"X-Evil: 1\r2")),
    RawCase(
        "a bare line feed", _header(b"X-Evil: 1\nX-More: 2").replace(b"\nX-More: 2", b"\n\nX: 2")
    ),
    RawCase("a NUL in a value", _header(b"X-Evil: \x00")),
    RawCase("a NUL in a name", _header(b"X-\x00Evil: 1")),
    RawCase("a NUL in the key", _header(b"Idempotency-Key: k\x00k")),
    RawCase("a DEL in the key", _header(b"Idempotency-Key: k\x7fk")),
    RawCase("a name in Korean", _header("열쇠: 1".encode())),
    RawCase("200 headers", _header(b"\r\n".join(b"X-%d: 1" % number for number in range(200)))),
    RawCase("a header of 9,000 bytes", _header(b"X-Evil: " + b"a" * 9_000)),
    RawCase("a header of 1 MB", _header(b"X-Evil: " + b"a" * 1_000_000)),
    RawCase("a name of 9,000 bytes", _header(b"a" * 9_000 + b": 1")),
    RawCase("an expectation nobody knows", _header(b"Expect: 200-maybe")),
    # The request line.
    RawCase("nothing", b"", half=True),
    RawCase("blank lines", b"\r\n" * 10, half=True),
    RawCase("half a request line", b"POST /v1/or", half=True),
    RawCase("half a head", _POST + b"Host: a\r\nContent-", half=True),
    RawCase("one word", b"POST\r\n\r\n"),
    RawCase("HTTP/0.9", b"GET /v1/orders\r\n\r\n"),
    RawCase("HTTP/9.9", _line(b"GET /v1/orders HTTP/9.9")),
    RawCase("HTTP/2 by prior knowledge", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    RawCase("HTTP of another name", _line(b"GET /v1/orders HTCPCP/1.0")),
    RawCase("no version", _line(b"GET /v1/orders HTTP/")),
    RawCase("a version with a sign", _line(b"GET /v1/orders HTTP/+1.1")),
    RawCase("a small verb", _line(b"get /v1/orders HTTP/1.1")),
    RawCase("a verb of NULs", _line(b"\x00\x00\x00 /v1/orders HTTP/1.1")),
    RawCase("a verb of 3,000", _line(b"A" * 3_000 + b" /v1/orders HTTP/1.1")),
    RawCase("a space in the path", _line(b"GET /v1/orders /x HTTP/1.1")),
    RawCase("a NUL in the path", _line(b"GET /v1/orders\x00 HTTP/1.1")),
    RawCase("a path of raw bytes", _line(b"GET /v1/\xff\xfe HTTP/1.1")),
    RawCase("an empty path", _line(b"GET  HTTP/1.1")),
    RawCase("a path of 5,000", _line(b"GET /" + b"a" * 5_000 + b" HTTP/1.1")),
    RawCase("a path of 1 MB", _line(b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1")),
    RawCase("a tunnel", _line(b"CONNECT 127.0.0.1:5432 HTTP/1.1")),
    RawCase("somebody else's address", _line(b"GET http://127.0.0.1:1/v1/orders HTTP/1.1")),
    RawCase("an address of a file", _line(b"GET file:///etc/passwd HTTP/1.1")),
    RawCase("a path without a slash", _line(b"GET v1/orders HTTP/1.1")),
    RawCase("a star", _line(b"GET * HTTP/1.1")),
    RawCase("a fragment", _line(b"GET /v1/orders#x HTTP/1.1")),
    # Other protocols.
    RawCase("TLS", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 200 + b"\r\n\r\n"),
    RawCase("SMTP", b"EHLO a\r\nMAIL FROM:<a@b.c>\r\n\r\n"),
    RawCase("PostgreSQL", b"\x00\x00\x00\x08\x04\xd2\x16\x2f", half=True),
    RawCase("Redis", b"*1\r\n$4\r\nPING\r\n\r\n"),
    RawCase("random bytes", bytes(range(256)) * 4 + b"\r\n\r\n"),
]


def render(case: RawCase, *, token: str, key: str, body: bytes) -> bytes:
    """Fill in the placeholders."""
    head = _POST + b"Host: a\r\nConnection: close\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {token}\r\n".encode()
    if b"Idempotency-Key" not in case.request:
        head += f"Idempotency-Key: {key}\r\n".encode()
    values = {b"{head}": head, b"{length}": b"%d" % len(body), b"{hex}": b"%x" % len(body)}
    request = case.request
    for placeholder, value in values.items():
        request = request.replace(placeholder, value)
    return request.replace(b"{body}", body)
