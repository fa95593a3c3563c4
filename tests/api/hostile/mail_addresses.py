"""What is no single address of one recipient: all 422, before a mail server could see it."""

from tests.api.hostile.case import Case, label, with_

_NO_ADDRESS = (
    "",
    " ",
    "minji",
    "minji@",
    "@example.com",
    "@",
    "minji@@example.com",
    "minji@example@example.com",
    "minji.example.com",
    "minji@.com",
    "minji@example.com.",
    "minji@example..com",
    ".minji@example.com",
    "minji.@example.com",
    "min..ji@example.com",
    "minji@-example.com",
    "minji@example-.com",
    "minji@exam_ple.com",
    "minji@exam ple.com",
    "min ji@example.com",
    " minji@example.com",
    "minji@example.com ",
    "minji@example.com\t",
    f"{'m' * 65}@example.com",
    f"m@{'d' * 64}.com",
    f"m@{'.'.join(['d' * 60] * 5)}.com",
    f"{'m' * 60_000}@example.com",
    f"m@{'d.' * 30_000}com",
    "@" * 60_000,
    "." * 60_000,
    "m" * 60_000,
    "m@" + "xn--" * 15_000,
)
_MORE_THAN_ONE = (
    "a@example.com,b@example.com",
    "a@example.com, b@example.com",
    "a@example.com;b@example.com",
    "a@example.com b@example.com",
    "a@example.com\nb@example.com",
    "undisclosed:a@example.com,b@example.com;",
    "Minji <minji@example.com>",
    "<minji@example.com>",
    "minji@example.com (Minji)",
    "minji(comment)@example.com",
    '"a@b"@example.com',
    '"minji"@example.com',
    r"min\ji@example.com",
    "a%example.com@example.org,",
    "@relay.example:minji@example.com",
)
_HEADER_INJECTIONS = (
    "minji@example.com\r\nBcc: all@example.com",
    "minji@example.com\nBcc: all@example.com",
    "minji@example.com\rBcc: all@example.com",
    "minji@example.com%0d%0aBcc: all@example.com",
    "minji@example.com\x0bBcc: all@example.com",
    "minji@example.com\x0cBcc: all@example.com",
    "minji@example.com\x1cBcc: all@example.com",
    "minji@example.com\x85Bcc: all@example.com",
    "minji@example.com\u2028Bcc: all@example.com",
    "minji@example.com\u2029Bcc: all@example.com",
    "minji\r\n@example.com",
    "minji@example.com\r\n.\r\nMAIL FROM:<a@b.c>",
    "minji@example.com>\r\nRCPT TO:<all@example.com",
    "minji@example.com> NOTIFY=SUCCESS",
    "=?utf-8?q?minji=0D=0ABcc=3A_all?=@example.com\n",
    "minji@example.com\n",
    "\nminji@example.com",
)
_NUL_AND_SURROGATES = (
    "minji@example.com\x00",
    "min\x00ji@example.com",
    "minji@example.com\x00.org",
    "\ud800@example.com",
    "minji@\udfff.com",
    "\udc00\ud800@example.com",
)
_NOWHERE = (
    "minji@localhost",
    "minji@example",
    "minji@[127.0.0.1]",
    "minji@[IPv6:::1]",
    "minji@127.0.0.1",
    "minji@mail.local",
    "minji@host.localhost",
    "minji@shop.invalid",
    "minji@4.3.2.1.in-addr.arpa",
    "root@metadata.google.internal\n",
)
_DECEPTIVE = (
    "minji\u202e@example.com",
    "min\u200bji@example.com",
    "min\u00adji@example.com",
    "\ufeffminji@example.com",
    "minji@exam\u200bple.com",
    "minji@exam\u202eple.com",
    "minji@example\uff0ecom\u0000",
    "minji\uff20example.com",
    "minji@ex\u2044ample.com",
    "\u0301minji@example.com",
    "minji@xn--a.com",
    "minji@xn--\u00e9.com",
    "\ue000@example.com",
    "minji@\U0001f4a9.\U0001f4a9\n",
)

_GROUPS = {
    "no address": _NO_ADDRESS,
    "more than one": _MORE_THAN_ONE,
    "header injection": _HEADER_INJECTIONS,
    "NUL or surrogate": _NUL_AND_SURROGATES,
    "nowhere": _NOWHERE,
    "deceptive": _DECEPTIVE,
}

CASES = [
    Case(name=f"{group}: {label(text)}", status=422, body=with_(email=text))
    for group, texts in _GROUPS.items()
    for text in texts
]
