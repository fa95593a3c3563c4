"""Headers of a request whose body is good: its key, what its body claims to be, its size."""

import gzip

from tests.api.hostile.case import GOOD_BODY, ITEM, Case, with_

_KEYS: dict[str, str | bytes | None] = {
    "missing": None,
    "empty": "",
    "a space": " ",
    "spaces": " " * 200,
    "empty quotes": '""',
    "a space in quotes": '" "',
    "256 characters": "k" * 256,
    "256 characters in quotes": f'"{"k" * 256}"',
    "8,000 characters": "k" * 8_000,
    "a tab in it": "k\tk",
    "a tab in quotes": '"k\tk"',
    "Latin-1": "clé".encode("latin-1"),
    "UTF-8": "열쇠".encode(),
    "an emoji": "🔑".encode(),
    "a C1 control": b"k\x85k",
    "a no-break space": b"k\xa0k",
    "bytes that are no text": b"\xff\xfe\xfd",
}

_TYPES: dict[str, str | None] = {
    "missing": None,
    "empty": "",
    "nonsense": "json",
    "text": "text/plain",
    "HTML": "text/html",
    "JSON as text": "text/json",
    "JSON as x": "application/x-json",
    "JSON5": "application/json5",
    "JSON lines": "application/jsonlines",
    "JSON sequence": "application/json-seq",
    "merge patch": "application/merge-patch+json",
    "patch": "application/json-patch+json",
    "problem": "application/problem+json",
    "JSON:API": "application/vnd.api+json",
    "an event": "application/cloudevents+json",
    "XML": "application/xml",
    "YAML": "application/yaml",
    "a form": "application/x-www-form-urlencoded",
    "a form with files": "multipart/form-data; boundary=x",
    "bytes": "application/octet-stream",
    "a wildcard": "*/*",
    "half a wildcard": "application/*",
    "a list": "application/json, text/plain",
    "a list that ends well": "text/plain, application/json",
    "a pickle": "application/x-python-serialize",
    "UTF-16": "application/json; charset=utf-16",
    "Latin-1": "application/json; charset=iso-8859-1",
    "EUC-KR": "application/json; charset=euc-kr",
    "UTF-7": "application/json; charset=utf-7",
    "an unknown character set": "application/json; charset=x",
    "longer than a header may be": "application/json" + "n" * 4_000,
}

_CODINGS = ("gzip", "deflate", "br", "zstd", "x-gzip", "gzip, gzip", "nonsense")

_SIZES = [
    Case(name="size: a byte too many", status=413, body=GOOD_BODY.ljust(64 * 1024 + 1)),
    Case(name="size: 1 MiB", status=413, body=GOOD_BODY.ljust(1024 * 1024)),
    Case(name="size: 100,000 items", status=413, body=with_(items=[ITEM] * 100_000)),
    Case(name="size: an address of 100,000", status=413, body=with_(email="m" * 100_000)),
    Case(
        name="size: announced 1 TB", status=413, headers={"Content-Length": str(10**12)}, body=b""
    ),
    Case(
        name="size: announced more than a word holds",
        status=(400, 413),
        headers={"Content-Length": str(10**30)},
        body=b"",
    ),
    Case(
        name="size: a byte too many in chunks",
        status=413,
        body=GOOD_BODY.ljust(64 * 1024 + 1),
        is_chunked=True,
    ),
    Case(name="size: 8 MiB in chunks", status=413, body=b" " * (8 * 1024 * 1024), is_chunked=True),
    Case(name="size: nothing in chunks", status=400, body=b"", is_chunked=True),
    Case(name="size: deep in chunks", status=400, body=b"[" * 60_000, is_chunked=True),
    Case(
        name="size: too many items in chunks",
        status=422,
        body=with_(items=[ITEM] * 51),
        is_chunked=True,
    ),
]

CASES = [
    *(
        Case(name=f"key: {name}", status=400, headers={"Idempotency-Key": value})
        for name, value in _KEYS.items()
    ),
    *(
        Case(name=f"type: {name}", status=415, headers={"Content-Type": value})
        for name, value in _TYPES.items()
    ),
    *(
        Case(name=f"coding: {coding}", status=415, headers={"Content-Encoding": coding})
        for coding in _CODINGS
    ),
    Case(
        name="coding: a bomb",
        status=415,
        headers={"Content-Encoding": "gzip"},
        body=gzip.compress(b" " * 20_000_000),
    ),
    *_SIZES,
]
