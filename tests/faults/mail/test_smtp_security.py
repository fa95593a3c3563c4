"""Faults of TLS and AUTH on the way to the SMTP relay (faults.toml, F-S15 and F-S16)."""

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest

from tests.support.mail_side import MailSide, once
from tests.support.proxy import Pass
from tests.support.records import orders
from tests.support.service import Service
from tests.support.sink import Rule, Settings

USER, PASSWORD = "shop", "correct-horse"
# What nobody on the way may read: whom we write to, and how we log in.
SECRETS = (b"MAIL FROM", b"customer-", b"AUTH", base64.b64encode(PASSWORD.encode()).rstrip(b"="))
ORDERS = 40

PLAIN = Settings(user=USER, password=PASSWORD)
STARTTLS = replace(PLAIN, tls="starttls", is_tls_required=True)
IMPLICIT = replace(PLAIN, tls="implicit")


@dataclass(frozen=True)
class Bad:
    """What a relay offers, what it does, and a pattern of what the ledger says of it."""

    settings: Settings
    words: str
    rule: Rule | None = None


def bad_certificates(good: Settings) -> list[Bad]:
    """Return relays that are not who they say they are, or speak TLS 1.0 alone."""
    return [
        Bad(replace(good, certificate="expired"), "certificate has expired"),
        Bad(replace(good, certificate="wrong-host"), "IP address mismatch"),
        Bad(replace(good, certificate="unknown"), "signed certificate"),
        Bad(replace(good, is_tls_old=True), "UNEXPECTED_EOF|PROTOCOL"),
    ]


BAD_STARTTLS = [
    Bad(PLAIN, "STARTTLS extension not supported"),
    Bad(STARTTLS, "454 4.7.0 not now", Rule("starttls", "454 4.7.0 not now")),
    Bad(STARTTLS, "more than a reply", Rule("starttls", "220 go\r\n250 sneaked in")),
    *bad_certificates(STARTTLS),
]
BAD_IMPLICIT = [Bad(PLAIN, "WRONG_VERSION_NUMBER"), *bad_certificates(IMPLICIT)]
BAD_AUTH = [
    Bad(replace(STARTTLS, password="battery-staple"), "535 5.7.8 wrong user or password"),
    Bad(replace(STARTTLS, user=None), "AUTH extension not supported"),
    Bad(replace(STARTTLS, mechanisms=("XOAUTH2",)), "No suitable authentication method"),
    Bad(STARTTLS, "454 4.7.0 not now", Rule("auth", "454 4.7.0 not now")),
]


@pytest.mark.fault("F-S15")
@pytest.mark.parametrize(
    ("tls", "faults", "good"),
    [("starttls", BAD_STARTTLS, STARTTLS), ("implicit", BAD_IMPLICIT, IMPLICIT)],
    ids=["starttls", "implicit"],
)
def test_a_relay_that_cannot_be_trusted(
    side: MailSide, tls: str, faults: Sequence[Bad], good: Settings
) -> None:
    """Nothing is said in clear, nothing dies, and when TLS is as it should be all are sent."""
    in_clear = [side.smtp.when_sent(secret, Pass()) for secret in SECRETS]
    suffer(side, tls, faults, good)
    assert [trigger.fired for trigger in in_clear] == [0] * len(SECRETS)
    assert {mail.is_tls for mail in side.sink.accepted()} == {True}


@pytest.mark.fault("F-S16")
def test_a_relay_that_does_not_let_us_log_in(side: MailSide) -> None:
    """AUTH refused, or not offered: nothing dies, nothing is sent as nobody, nor said in a log."""
    log = suffer(side, "starttls", BAD_AUTH, STARTTLS)
    for secret in (PASSWORD, base64.b64encode(f"\0{USER}\0{PASSWORD}".encode()).decode()):
        assert secret not in log


def suffer(side: MailSide, tls: str, faults: Sequence[Bad], good: Settings) -> str:
    """Let probes meet each fault, then a good relay; return the replica's log."""
    environment = {
        "SMTP_TLS": tls,
        "SMTP_USER": USER,
        "SMTP_PASSWORD": PASSWORD,
        "SSL_CERT_FILE": str(side.sink.authority),
    }
    records = orders(ORDERS)
    begin(side, faults[0])
    side.send(records)
    with side.running(**environment) as replica:
        for fault in faults:
            begin(side, fault)
            before = len(replica.logged("mail.judged"))
            side.wait_for(lambda seen=before, words=fault.words: is_told(replica, seen, words))
            assert fault.rule is None or side.sink.fired(fault.rule) >= 1
        (opened,) = replica.logged("breaker.changed")
        assert opened["is_open"]
        assert re.search(faults[0].words, opened["answer"])
        assert replica.metric("mail_breaker_is_open") == 1
        assert side.sink.counters().stages["mail"] == 0
        assert set(side.states()) <= {"RETRY", "SENDING"}
        waiting = [each for each in side.mails().values() if each["state"] == "RETRY"]
        assert {each["attempts"] for each in waiting} == {0}
        side.sink.script()
        side.sink.configure(good)
        side.wait_until_sent(ORDERS)
        assert [line["is_open"] for line in replica.logged("breaker.changed")] == [True, False]
        assert replica.metric("mail_verdicts_total", verdict="DEAD") == 0
    assert {each["attempts"] for each in side.mails().values()} == {1}
    assert [each for each in side.sink.counters().violations if "plain text" in each] == []
    assert {mail.user for mail in side.sink.accepted()} == {USER}
    assert side.copies() == once(records)
    return replica.part.command.log_path.read_text()


def begin(side: MailSide, fault: Bad) -> None:
    """Make the relay a bad one."""
    side.sink.script(*[fault.rule] if fault.rule else [])
    side.sink.configure(fault.settings)


def is_told(replica: Service, seen: int, words: str) -> bool:
    """Say whether an attempt after those seen ended so, before anything was said of a mail."""
    reasons = [line["reason"] or "" for line in replica.logged("mail.judged")[seen:]]
    return any(reason.startswith("connect: ") and re.search(words, reason) for reason in reasons)
