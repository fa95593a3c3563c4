"""Addresses of the API: paths, methods, queries and cursors that nobody was given."""

from base64 import urlsafe_b64encode
from urllib.parse import quote

from tests.api.hostile.case import Case, label

NIL = "00000000-0000-0000-0000-000000000000"

_NOWHERE = (
    "/",
    "//",
    "/v1",
    "/v1/",
    "/v1/orders/",
    "/v1//orders",
    "/V1/orders",
    "/v1/Orders",
    "/v1/orders;jsessionid=1",
    "/v1/orders.json",
    "/v1/orders%00",
    "/v1/orders%0d%0aX-Injected:%201",
    "/v1/orders%ff",
    "/v1/orders%2f",
    "/v1/./orders/../orders/x",
    "/v1/orders/../../metrics",
    "/v1/orders/%2e%2e/%2e%2e/metrics",
    "/v1/orders/7",
    "/v1/orders/null",
    "/v1/orders/undefined",
    "/v1/orders/*",
    "/v1/orders/me",
    "/v1/orders/%00",
    "/v1/orders/%EA%B0%80",
    "/v1/orders/%ED%A0%80",
    "/v1/orders/'%20OR%20'1'='1",
    "/v1/orders/{{7*7}}",
    "/v1/orders/..%5c..%5cetc%5cpasswd",
    f"/v1/orders/{NIL}",
    f"/v1/orders/{NIL}/",
    f"/v1/orders/{NIL}/event",
    f"/v1/orders/{NIL}%00",
    f"/v1/orders/{NIL}%20",
    f"/v1/orders/{{{NIL}}}",
    f"/v1/orders/urn:uuid:{NIL}",
    f"/v1/orders/{NIL.replace('-', '')}",
    f"/v1/orders/{NIL},{NIL}",
    f"/v1/orders/{'7' * 3_900}",
    "/v1/users",
    "/v1/outbox",
    "/v2/orders",
    "/admin",
    "/debug",
    "/console",
    "/metrics",
    "/livez",
    "/readyz",
    "/static/",
    "/static/../settings.py",
    "/static/%2e%2e/settings.py",
    "/.env",
    "/.git/config",
    "/.well-known/jwks.json",
    "/signing-key.pem",
    "/actuator/env",
    "/graphql",
    "/favicon.ico",
)

_METHODS = {
    "/v1/orders": ("PUT", "PATCH", "DELETE", "TRACE", "PURGE", "PROPFIND", "DEBUG", "FOO"),
    "/v1/products": ("POST", "PUT", "PATCH", "DELETE", "TRACE"),
    "/openapi.json": ("POST", "PUT", "DELETE"),
    f"/v1/orders/{NIL}": ("POST", "PUT", "PATCH", "DELETE", "TRACE", "FOO"),
}

_LIMITS = (
    "",
    "0",
    "-1",
    "101",
    "1000000000",
    "9" * 3_000,
    "1.5",
    "1e1",
    "0x10",
    "1_0x",
    "abc",
    "NaN",
    "Infinity",
    "null",
    "true",
    "1,2",
    "%00",
    "1%00",
    "%FF",
    "1;SELECT",
    "'%20OR%20'1'='1",
    "[]",
)


def _ours(text: str) -> str:
    return urlsafe_b64encode(text.encode()).decode()


_CURSORS = {
    "empty": "",
    "no base64": "%21%21%21",
    "half base64": "abc",
    "not ASCII": quote("가나다"),
    "bytes that are no text": "_____w==",
    "NUL": "%00",
    "NULs in base64": _ours("\0\0\0"),
    "JSON": _ours('{"id": 1}'),
    "a number": "1",
    "a negative number": "-1",
    "no id": _ours("2026-11-21T10:00:00.000000Z"),
    "no moment": _ours(f" {NIL}"),
    "a bad id": _ours("2026-11-21T10:00:00.000000Z 7"),
    "a bad moment": _ours(f"yesterday {NIL}"),
    "a moment before all moments": _ours(f"0001-01-01T00:00:00+14:00 {NIL}"),
    "a moment after all moments": _ours(f"9999-12-31T23:59:59-14:00 {NIL}"),
    "the year zero": _ours(f"0000-01-01T00:00:00Z {NIL}"),
    "the year 10,000": _ours(f"10000-01-01T00:00:00Z {NIL}"),
    "the 32nd": _ours(f"2026-11-32T00:00:00Z {NIL}"),
    "infinity": _ours(f"infinity {NIL}"),
    "SQL": _ours(f"2026-11-21T10:00:00Z' OR '1'='1 {NIL}"),
    "SQL in the id": _ours("2026-11-21T10:00:00Z '; DROP TABLE orders; --"),
    "a pickle": _ours("cos\nsystem\n(S'id'\ntR."),
    "long": "A" * 3_000,
}


def _get(name: str, path: str, status: int) -> Case:
    nothing = {"Content-Type": None, "Idempotency-Key": None}
    return Case(name=name, status=status, method="GET", path=path, body=b"", headers=nothing)


CASES = [
    *(_get(f"path: {label(path)}", path, 404) for path in _NOWHERE),
    *(
        Case(name=f"method: {method} {path}", status=405, method=method, path=path)
        for path, methods in _METHODS.items()
        for method in methods
    ),
    *(_get(f"limit: {label(text)}", f"/v1/orders?limit={text}", 422) for text in _LIMITS),
    *(_get(f"cursor: {name}", f"/v1/orders?cursor={text}", 422) for name, text in _CURSORS.items()),
]
