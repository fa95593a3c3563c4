"""Bodies that are JSON and no order: all 422, nothing written, whatever the text hides."""

from typing import Any

from tests.api.hostile.case import (
    GOOD_BODY,
    ITEM,
    Case,
    label,
    raw,
    raw_quantity,
    with_,
    with_item,
    without,
)

# Members an attacker sets in the hope that they reach a column (OWASP API3).
_NOT_THE_CLIENTS = (
    "id",
    "orderId",
    "order_id",
    "userId",
    "user_id",
    "sub",
    "owner",
    "amount",
    "total",
    "price",
    "unitPrice",
    "currency",
    "discount",
    "orderedAt",
    "ordered_at",
    "createdAt",
    "event",
    "state",
    "status",
    "outbox",
    "outbox_state",
    "topic",
    "key",
    "fingerprint",
    "idempotencyKey",
    "expected_amount",
    "isAdmin",
    "scope",
    "role",
    "bcc",
    "cc",
    "from",
    "subject",
    "template",
    "callbackUrl",
    "Email",
    "email ",
    "__proto__",
    "constructor",
    "__class__",
    "_schema",
    "$ref",
    "",
    "a/b~c",
    "\x00",
    "\ud800",
    "민지",
    "x" * 60_000,
)
_NOT_THE_ITEMS = (
    "id",
    "price",
    "unitPrice",
    "unit_price",
    "amount",
    "currency",
    "discount",
    "name",
    "line",
    "order_id",
    "__proto__",
    "\ud800",
)

_UNKNOWN = [
    Case(name=f"unknown member: {label(name)}", status=422, body=with_(**{name: "1"}))
    for name in _NOT_THE_CLIENTS
] + [
    Case(name=f"unknown member of an item: {name!r}", status=422, body=with_item(**{name: "1"}))
    for name in _NOT_THE_ITEMS
]

_OTHER_TYPES: tuple[Any, ...] = (None, True, 7, 1.5, [], {}, [ITEM["sku"]], {"$gt": ""})
_TYPES = [
    *(
        Case(name=f"body: {body[:20]!r}", status=422, body=body)
        for body in (b"null", b"true", b"7", b"1.5", b'""', b'"order"', b"[]", b"{}", b"[{}]")
    ),
    Case(name="body: a list of orders", status=422, body=b"[" + GOOD_BODY + b"]"),
    *(
        Case(name=f"{name}: left out", status=422, body=without(name))
        for name in ("email", "items")
    ),
    *(
        Case(name=f"{name}: {value!r}", status=422, body=with_(**{name: value}))
        for name in ("email", "items", "locale")
        for value in _OTHER_TYPES
    ),
    *(
        Case(name=f"expectedAmount: {value!r}", status=422, body=with_(expectedAmount=value))
        for value in _OTHER_TYPES
        if value is not None
    ),
    *(
        Case(name=f"sku: {value!r}", status=422, body=with_item(sku=value))
        for value in _OTHER_TYPES
    ),
    *(
        Case(name=f"item: {value!r}", status=422, body=with_(items=[value]))
        for value in (*_OTHER_TYPES, "TEA-GREEN-50")
    ),
    Case(name="items: a text", status=422, body=with_(items="TEA-GREEN-50")),
    Case(name="items: an object by index", status=422, body=with_(items={"0": ITEM})),
    Case(name="items: 51", status=422, body=with_(items=[ITEM] * 51)),
    Case(name="items: 1,200", status=422, body=with_(items=[ITEM] * 1_200)),
    Case(name="items: 20,000 numbers", status=422, body=with_(items=[0] * 20_000)),
    Case(name="items: a good and a bad one", status=422, body=with_(items=[ITEM, {}])),
    *(
        Case(name=f"locale: {label(value)}", status=422, body=with_(locale=value))
        for value in (
            "",
            "KO",
            "fr",
            "ko\n",
            "ko-KR",
            "../en",
            "en\0",
            "{{7*7}}",
            "\ud800",
            "x" * 60_000,
        )
    ),
]

_QUANTITIES = [
    Case(name=f"quantity: {label(number)}", status=422, body=raw_quantity(number))
    for number in (
        "0",
        "-0",
        "-1",
        "1000",
        "2147483648",
        "9223372036854775808",
        "1.0",
        "1.5",
        "1e0",
        "1e2",
        "1e999",
        "-1e999",
        "1e-999",
        "1e400000",
        "9" * 4_299,
        "1." + "0" * 60_000,
        "0." + "0" * 60_000 + "1",
        '"1"',
        '"NaN"',
        "null",
        "true",
        "[1]",
        '{"$gt": 0}',
    )
]

# RFC 8259 §6: a reader may set limits, so beyond what a Decimal holds it may be no number at all.
_QUANTITIES += [
    Case(name=f"quantity: {number}", status=(400, 422), body=raw_quantity(number))
    for number in ("1e99999999999999999999", "1e-99999999999999999999", "0e99999999999999999999")
]

_AMOUNTS = [
    Case(name=f"expectedAmount: {label(text)}", status=422, body=with_(expectedAmount=text))
    for text in (
        "",
        " 12000",
        "12000 ",
        "12000\n",
        "+12000",
        "-12000",
        "12,000",
        "12_000",
        "12 000",
        "1.2e4",
        "1E+400",
        "0x2ee0",
        "NaN",
        "sNaN",
        "Infinity",
        "-Infinity",
        "١٢٠٠٠",
        "\uff11\uff12\uff10\uff10\uff10",
        "12000.",
        ".5",
        "12000.00000",
        "₩12000",
        "12000 KRW",
        "12000\x00",
        "\ud800",
        "1" * 16,
        "9" * 60_000,
        "0." + "0" * 60_000,
        "12000' OR '1'='1",
    )
]

_SKUS = [
    Case(name=f"sku: {label(text)}", status=422, body=with_item(sku=text))
    for text in (
        "",
        " ",
        "TEA-GREEN-50 ",
        "TEA-GREEN-50\n",
        "TEA-GREEN-50\x00",
        "TEA\x00-GREEN-50",
        "TEA-GREEN-51",
        "tea-green-50",
        "\uff34\uff25\uff21-GREEN-50",
        "\ud800",
        "\udc00\ud800",
        "차",
        "TEA/GREEN",
        "../../etc/passwd",
        "x" * 64,
        "x" * 65,
        "x" * 60_000,
        "'; DROP TABLE orders; --",
        "' OR '1'='1",
        "$(id)",
        "`id`",
        "{{7*7}}",
        "${jndi:ldap://127.0.0.1/a}",
        "%s%s%s%n",
        "<img src=x onerror=alert(1)>",
        "TEA-GREEN-50\u202e",
        "TEA\u200b-GREEN-50",
        "{TEA-GREEN-50,CUP-WHITE}",
        "NULL",
        ":sku",
        "-",
        "..",
    )
]

_SURROGATES = [
    Case(name="a lone surrogate, escaped, in a name", status=422, body=raw(r'"\udfff": 1')),
    Case(name="surrogates the wrong way round", status=422, body=raw(r'"email2": "\udc00\ud800"')),
    Case(
        name="a lone surrogate, escaped, in a deep value",
        status=422,
        body=raw(r'"a": [{"b": ["\ud800"]}]'),
    ),
]

CASES = [*_UNKNOWN, *_TYPES, *_QUANTITIES, *_AMOUNTS, *_SKUS, *_SURROGATES]
