"""The sink: what it answered 250 stands in its journal, and each fault does what it says."""

import asyncio
import contextlib
import hashlib
import json
import os
import re
import smtplib
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

import pytest

from tests.support import sink as sink_module
from tests.support.sink import (
    EXTENSIONS,
    HOST,
    Accepted,
    Action,
    Certificate,
    Delay,
    Drop,
    Journal,
    Raw,
    Rule,
    Settings,
    Silence,
    Sink,
    Stage,
    Tarpit,
    accepted,
)
from tests.support.world import eventually

TIMEOUT_SECONDS = 5.0
SILENT_SECONDS = 0.15
CONTENT = b"Message-ID: <1@shop.example>\r\nX-Order-Id: order-1\r\n\r\nHello\r\n"
MAIL = b"MAIL FROM:<orders@shop.example>\r\n"
RCPT = b"RCPT TO:<minji@example.com>\r\n"
ENVELOPE = MAIL + RCPT + b"DATA\r\n"
PLAIN = b"AUTH PLAIN AHNob3AAc2VjcmV0\r\n"
REPOSITORY = Path(__file__).parents[2]
TLS = Settings(tls="starttls")
LOGIN = Settings(user="shop", password="secret")
# What a client says to come to each stage, and what is said there.
DIALOGUE: tuple[tuple[Stage, bytes], ...] = (
    ("banner", b""),
    ("ehlo", b"EHLO client\r\n"),
    ("auth", PLAIN),
    ("mail", MAIL),
    ("rcpt", RCPT),
    ("data", b"DATA\r\n"),
    ("dot", CONTENT + b".\r\n"),
    ("rset", b"RSET\r\n"),
    ("quit", b"QUIT\r\n"),
)
STAGES = [stage for stage, _ in DIALOGUE]


class Client:
    """A client that says what it is told to say, byte by byte."""

    def __init__(self, sink: Sink) -> None:
        self.socket = socket.create_connection((HOST, sink.port), TIMEOUT_SECONDS)
        self._rest = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def reply(self) -> str:
        """Read a reply; nothing when the connection ends."""
        while not (whole := re.match(rb"(?:\d{3}-.*\r\n)*\d{3} .*\r\n", self._rest)):
            piece = self.socket.recv(64 * 1024)
            if not piece:
                return ""
            self._rest += piece
        self._rest = self._rest[whole.end() :]
        return whole[0].decode().removesuffix("\r\n")

    def ask(self, command: bytes) -> str:
        """Say something and read a reply."""
        self.socket.sendall(command)
        return self.reply()

    def greet(self) -> Self:
        """Come to where mails begin."""
        assert self.reply().startswith("220")
        assert self.ask(b"EHLO client\r\n").startswith("250")
        return self

    def deliver(self, content: bytes = CONTENT, *, recipient: str = "minji@example.com") -> str:
        """Send a mail and return the first refusal, or what was answered to the dot."""
        rcpt = b"RCPT TO:<%s>\r\n" % recipient.encode()
        for command in (MAIL, rcpt, b"DATA\r\n"):
            if (reply := self.ask(command))[:1] not in ("2", "3"):
                self.ask(b"RSET\r\n")
                return reply
        return self.ask(content + b".\r\n")

    def encrypt(self, sink: Sink) -> Self:
        """Shake hands, trusting the sink's authority alone."""
        context = ssl.create_default_context(cafile=sink.authority)
        self.socket = context.wrap_socket(self.socket, server_hostname=HOST)
        return self

    def is_silent(self) -> bool:
        """Say whether nothing comes, not even an end."""
        self.socket.settimeout(SILENT_SECONDS)
        try:
            return not self.socket.recv(1, socket.MSG_PEEK)
        except TimeoutError:
            return True
        finally:
            self.socket.settimeout(TIMEOUT_SECONDS)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sink]:
    with Sink(tmp_path_factory.mktemp("sink")) as sink:
        yield sink


@pytest.fixture
def sink(running: Sink) -> Iterator[Sink]:
    """Give the sink as new; a client that did wrong must be expected to."""
    running.forget()
    eventually(lambda: running.counters().open == 0, within_seconds=TIMEOUT_SECONDS)
    running.forget()
    yield running
    if not running.is_running:
        running.start()


@pytest.fixture
def client(sink: Sink) -> Iterator[Client]:
    with Client(sink) as client:
        yield client.greet()


def walk(client: Client, stage: Stage) -> str:
    """Go as far as a stage, all being well before it, and return what was said there."""
    for each, command in DIALOGUE:
        reply = client.ask(command) if command else client.reply()
        if each == stage:
            return reply
        assert reply[:1] in ("2", "3"), f"{each}: {reply}"
    raise AssertionError(stage)


# What is accepted


def test_what_is_accepted_is_written_down(sink: Sink, client: Client) -> None:
    """Whose mail it is, over which connection, what it was, and when."""
    began_at = time.time()
    assert client.deliver() == "250 2.0.0 accepted"
    (mail,) = sink.accepted()
    assert mail == Accepted(
        mail.at,
        mail.connection,
        "minji@example.com",
        "orders@shop.example",
        "<1@shop.example>",
        "order-1",
        hashlib.sha256(CONTENT).hexdigest(),
        size=len(CONTENT),
        start=0,
    )
    assert began_at <= mail.at <= time.time()
    assert sink.content(mail) == CONTENT
    assert client.deliver(b"X: y\r\n\r\n") == "250 2.0.0 accepted"
    assert [each.connection for each in sink.accepted()] == [mail.connection] * 2
    assert sink.content(sink.accepted()[1]) == b"X: y\r\n\r\n"


@pytest.mark.parametrize(
    ("head", "found"),
    [
        (b"X-Order-Id: o-1\r\n", "o-1"),
        (b"x-ORDER-id:\r\n o-1\r\n\t two\r\nTo: a\r\n", "o-1 two"),
        (b"To: X-Order-Id: o-1\r\n", None),
        (b"X-Order-Id: o-1\r\nX-Order-Id: o-2\r\n", "o-1"),
        (b"To: a\r\n\r\nX-Order-Id: o-1\r\n", None),
        (b"", None),
    ],
)
def test_names_come_from_the_headers(
    sink: Sink, client: Client, head: bytes, found: str | None
) -> None:
    """In any case of letters, unfolded, the first, never from the text."""
    client.deliver(head + b"\r\nX-Order-Id: text\r\n")
    assert [mail.order_id for mail in sink.accepted()] == [found]


@pytest.mark.parametrize(
    ("stuffed", "content"),
    [
        (b"", b""),
        (b"..\r\n", b".\r\n"),
        (b"\r\n..\r\n...\r\n..a\r\n\r\n", b"\r\n.\r\n..\r\n.a\r\n\r\n"),
        (b".a\r\n", b"a\r\n"),
        (b"a.\r\n.b\r\n" * 20_000, b"a.\r\nb\r\n" * 20_000),
    ],
    ids=["empty", "one", "many", "not stuffed", "180 kB"],
)
def test_dots_are_unstuffed(sink: Sink, client: Client, stuffed: bytes, content: bytes) -> None:
    """The content is what was meant, however it was cut into segments."""
    assert client.deliver(stuffed).startswith("250")
    client.socket.sendall(ENVELOPE)
    assert [client.reply()[:3] for _ in range(3)] == ["250", "250", "354"]
    whole = stuffed + b".\r\n"
    client.socket.sendall(whole[:-20])
    for byte in whole[-20:]:
        client.socket.sendall(bytes([byte]))
        time.sleep(0.001)
    assert client.reply().startswith("250")
    assert [sink.content(mail) for mail in sink.accepted()] == [content] * 2


def test_a_journal_is_on_the_disk_before_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`append` returns after the fsync, connections share one, and without it there is none."""
    events: list[str] = []
    monkeypatch.setattr(sink_module.os, "fsync", lambda _: events.append("fsync"))
    mail = Accepted(1.0, 1, "a@b", "c@d", None, None, "")

    async def append(journal: Journal) -> None:
        await journal.append([mail], b"content")
        events.append("answer")

    async def ten(journal: Journal) -> None:
        await asyncio.gather(*(append(journal) for _ in range(10)))

    asyncio.run(ten(Journal(tmp_path / "durable")))
    assert events == ["fsync"] + ["answer"] * 10
    asyncio.run(ten(Journal(tmp_path / "not", is_durable=False)))
    assert events[11:] == ["answer"] * 10
    assert accepted(tmp_path / "durable") == accepted(tmp_path / "not") == [mail] * 10


def test_a_kill_loses_nothing_answered(sink: Sink, client: Client) -> None:
    """Rules and settings are kept too, and a torn line goes."""
    sink.script(Rule("mail", "451 4.0.0 still here", times=1))
    sink.configure(Settings(extensions=("SIZE",)))
    sink.script(Rule("mail", "451 4.0.0 still here", mail=2))
    assert client.deliver() == "250 2.0.0 accepted"
    sink.kill()
    with sink.journal.open("ab") as journal:
        journal.write(b'{"at": 1')
    assert len(sink.accepted()) == 1
    sink.start()
    with Client(sink) as another:
        assert another.reply()
        assert another.ask(b"EHLO x\r\n") == "250-sink\r\n250 SIZE 10485760"
        assert another.deliver().startswith("250")
        assert another.deliver().startswith("451")
    first, second = sink.accepted()
    assert sink.content(first) == sink.content(second) == CONTENT


# What is offered and demanded


def test_what_is_offered(sink: Sink) -> None:
    """All there is, over TLS no STARTTLS."""
    sink.configure(Settings(tls="starttls", user="shop"))
    with Client(sink) as client:
        client.reply()
        offered = client.ask(b"EHLO x\r\n")
        assert re.findall(r"250[- ](.*?)\r?$", offered, re.MULTILINE) == [
            *("sink", "PIPELINING", "SIZE 10485760", "8BITMIME", "ENHANCEDSTATUSCODES"),
            *("SMTPUTF8", "STARTTLS", "AUTH PLAIN LOGIN"),
        ]
        assert client.ask(b"STARTTLS\r\n") == "220 2.0.0 go ahead"
        client.encrypt(sink)
        assert client.ask(MAIL).startswith("503")
        assert "STARTTLS" not in client.ask(b"EHLO x\r\n")
        assert client.ask(b"STARTTLS\r\n").startswith("502")


@pytest.mark.parametrize(
    ("extension", "command", "refusal"),
    [
        ("SIZE", b"MAIL FROM:<a@b> SIZE=9\r\n", "555"),
        ("8BITMIME", b"MAIL FROM:<a@b> BODY=8BITMIME\r\n", "555"),
        ("SMTPUTF8", b"MAIL FROM:<a@b> SMTPUTF8\r\n", "555"),
    ],
)
def test_what_is_not_offered_is_refused(
    sink: Sink, client: Client, extension: str, command: bytes, refusal: str
) -> None:
    """Each extension can be switched off."""
    assert client.ask(command).startswith("250")
    sink.configure(Settings(extensions=tuple(set(EXTENSIONS) - {extension})))
    with Client(sink) as another:
        another.reply()
        assert extension not in another.ask(b"EHLO x\r\n")
        assert another.ask(command).startswith(refusal)


def test_a_mail_may_be_too_large(sink: Sink) -> None:
    """By its own word, or in fact, however large, and then others go on."""
    sink.configure(Settings(max_bytes=1000))
    with Client(sink) as client:
        client.greet()
        assert client.ask(b"MAIL FROM:<a@b> SIZE=1001\r\n") == "552 5.3.4 too large"
        for size, code in ((998, "250"), (999, "552"), (1_000_000, "552")):
            content = b"x" * (size % 100) + b"\r\n" + (b"y" * 98 + b"\r\n") * (size // 100)
            assert client.deliver(content).startswith(code), size
    assert len(sink.accepted()) == 1


def test_an_address_that_is_not_ascii(sink: Sink, client: Client) -> None:
    """It needs SMTPUTF8, said with the mail."""
    assert client.deliver(recipient="민지@example.com") == "553 5.6.7 ASCII"
    assert client.ask(b"MAIL FROM:<a@b> SMTPUTF8\r\n").startswith("250")
    assert client.ask("RCPT TO:<민지@example.com>\r\n".encode()).startswith("250")
    client.ask(b"DATA\r\n")
    client.ask(CONTENT + b".\r\n")
    assert [mail.recipient for mail in sink.accepted()] == ["민지@example.com"]


def test_pipelined_commands_are_answered_in_one_write(sink: Sink, client: Client) -> None:
    """Three replies to three commands; the 250 to a dot goes with those that follow it."""
    for sent, count in ((ENVELOPE, 3), (CONTENT + b".\r\n" + ENVELOPE, 4)):
        client.socket.sendall(sent)
        assert client.socket.recv(1000).count(b"\r\n") == count
    assert sink.counters().violations == []


@pytest.mark.parametrize("mechanism", ["PLAIN", "LOGIN"])
def test_who_says_the_password_is_written_down(sink: Sink, mechanism: str) -> None:
    """Either way, and either way of the way."""
    sink.configure(Settings(user="shop", password="secret", mechanisms=(mechanism,)))
    for is_initial in (True, False):
        with smtplib.SMTP(HOST, sink.port, timeout=TIMEOUT_SECONDS) as client:
            with pytest.raises(smtplib.SMTPSenderRefused, match="530"):
                client.sendmail("a@b", "c@d", CONTENT)
            client.login("shop", "secret", initial_response_ok=is_initial)
            client.sendmail("a@b", "c@d", CONTENT)
    assert [mail.user for mail in sink.accepted()] == ["shop", "shop"]
    assert sink.counters().stages["auth"] == 2


def test_auth_refused(sink: Sink) -> None:
    """A wrong password, an unknown mechanism, no sense, not offered at all."""
    sink.configure(LOGIN)
    with Client(sink) as client:
        client.greet()
        assert client.ask(b"AUTH PLAIN AHNob3AAd3Jvbmc=\r\n").startswith("535 5.7.8")
        assert client.ask(b"AUTH CRAM-MD5\r\n").startswith("504")
        assert client.ask(b"AUTH PLAIN *\r\n").startswith("501")
        assert client.ask(PLAIN).startswith("235")
    sink.configure(Settings())
    with Client(sink) as client:
        assert client.greet().ask(PLAIN).startswith("502")


def test_auth_and_mail_may_demand_tls(sink: Sink) -> None:
    """A password that was said in clear is noted, a mail was not taken."""
    sink.configure(Settings(tls="starttls", is_tls_required=True, user="shop"))
    with Client(sink) as client:
        client.greet()
        assert client.ask(MAIL) == "530 5.7.0 STARTTLS first"
        assert client.ask(PLAIN) == "530 5.7.0 STARTTLS first"
    assert sink.counters().violations == ["AUTH in plain text"]


# TLS


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
@pytest.mark.parametrize(
    ("certificate", "error"),
    [
        ("good", None),
        ("expired", "certificate has expired"),
        ("wrong-host", "IP address mismatch"),
        ("unknown", "self.signed certificate"),
    ],
)
def test_certificates(sink: Sink, tls: Any, certificate: Certificate, error: str | None) -> None:
    """A client that trusts the authority takes the good one and no other."""
    sink.configure(Settings(tls=tls, certificate=certificate))
    with Client(sink) as client:
        if tls == "starttls":
            client.greet()
            assert client.ask(b"STARTTLS\r\n") == "220 2.0.0 go ahead"
        if error is not None:
            with pytest.raises(ssl.SSLCertVerificationError, match=error):
                client.encrypt(sink)
        else:
            client.encrypt(sink)
            assert tls == "starttls" or client.reply() == "220 sink ESMTP"
            client.ask(b"EHLO x\r\n")
            assert client.deliver().startswith("250")
            # More than a record, and than a segment.
            assert client.deliver(b"line\r\n" * 50_000).startswith("250")
            client.ask(b"QUIT\r\n")
    assert [mail.is_tls for mail in sink.accepted()] == ([] if error else [True, True])
    assert sink.counters().stages["tls"] == (error is None)
    eventually(lambda: sink.counters().open == 0, within_seconds=TIMEOUT_SECONDS)


def test_a_default_client_trusts_the_authority_by_its_environment(sink: Sink) -> None:
    """As the service is told in tests, by SSL_CERT_FILE."""
    sink.configure(TLS)
    program = (
        f"import smtplib, ssl; client = smtplib.SMTP('localhost', {sink.port});"
        "client.starttls(context=ssl.create_default_context()); print(client.noop()[0])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "SSL_CERT_FILE": str(sink.authority)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    assert done.stdout == "250\n", done.stderr


@pytest.mark.parametrize("do", [Drop(), Drop(is_reset=True), Raw(b"no handshake at all\r\n")])
def test_starttls_offered_but_failing(sink: Sink, do: Action) -> None:
    """After the 220 comes no handshake."""
    sink.configure(TLS)
    # Sooner it would be read with the 220.
    sink.script(Rule("tls", Delay(0.1)), rule := Rule("tls", do))
    with Client(sink) as client:
        client.greet()
        assert client.ask(b"STARTTLS\r\n").startswith("220")
        with pytest.raises(OSError, match=r"(?i)ssl|reset"):
            client.encrypt(sink)
    assert sink.fired(rule) == 1
    eventually(lambda: sink.counters().open == 0, within_seconds=TIMEOUT_SECONDS)


def test_starttls_refused_for_now(sink: Sink) -> None:
    """The dialogue goes on in clear, if the client likes."""
    sink.configure(TLS)
    sink.script(Rule("starttls", "454 4.7.0 not now", times=1))
    with Client(sink) as client:
        assert client.greet().ask(b"STARTTLS\r\n") == "454 4.7.0 not now"
        assert client.ask(b"STARTTLS\r\n").startswith("220")
        client.encrypt(sink)
        assert client.ask(b"NOOP\r\n").startswith("250")


def test_starttls_with_something_slipped_in(sink: Sink) -> None:
    """Plain text comes in the segment of the 220, and the handshake after it is good."""
    sink.configure(TLS)
    sink.script(Rule("starttls", "220 go\r\n250-sink\r\n250 AUTH PLAIN"))
    with Client(sink) as client:
        client.greet()
        client.socket.sendall(b"STARTTLS\r\n")
        assert client.socket.recv(1000) == b"220 go\r\n250-sink\r\n250 AUTH PLAIN\r\n"
        assert client.encrypt(sink).ask(b"EHLO x\r\n").startswith("250-sink\r\n250-PIPELINING")


def test_what_a_client_says_between_starttls_and_handshake_does_not_count(sink: Sink) -> None:
    """It is noted; commands of before are no commands of after."""
    sink.configure(TLS)
    with Client(sink) as client:
        assert client.greet().ask(b"STARTTLS\r\nEHLO injected\r\n").startswith("220")
        assert client.encrypt(sink).ask(MAIL).startswith("503")
    assert sink.counters().violations == ["plain text after STARTTLS"]


def test_tls_too_old(sink: Sink) -> None:
    """Nobody takes it by default; who allows it gets 1.0, where OpenSSL has it at all."""
    sink.configure(Settings(tls="implicit", is_tls_old=True))
    with Client(sink) as client, pytest.raises(ssl.SSLError, match=r"(?i)version|alert|EOF"):
        client.encrypt(sink)
    context = ssl.create_default_context(cafile=sink.authority)
    with pytest.warns(DeprecationWarning, match="TLSv1"):
        context.minimum_version = ssl.TLSVersion.TLSv1
    context.set_ciphers("ALL:@SECLEVEL=0")
    with Client(sink) as client:
        client.socket = context.wrap_socket(client.socket, server_hostname=HOST)
        assert client.socket.version() == "TLSv1"


# What no client should do


@pytest.mark.parametrize(
    ("content", "reply", "violation"),
    [
        (b"a\nb\r\n", "554 5.6.0", "bare CR or LF in a content"),
        (b"a\rb\r\n", "554 5.6.0", "bare CR or LF in a content"),
        (b"a\n.\r\nMAIL FROM:<x@y>\r\n", "554 5.6.0", "bare CR or LF in a content"),
        (b"a\r\r\n", "554 5.6.0", "bare CR or LF in a content"),
        (b"a\n\rb\r\n", "554 5.6.0", "bare CR or LF in a content"),
        (b"x" * 999 + b"\r\n", "554 5.6.0", "a line too long in a content"),
    ],
)
def test_a_content_that_breaks_the_rules_of_lines(
    sink: Sink, client: Client, content: bytes, reply: str, violation: str
) -> None:
    """It is refused whole; the longest line that is allowed is not."""
    assert client.deliver(content).startswith(reply)
    assert client.deliver(b"x" * 998 + b"\r\n").startswith("250")
    assert sink.counters().violations == [violation]
    assert len(sink.accepted()) == 1


@pytest.mark.parametrize("line", [b"NOOP\n", b"NO\rOP\r\n", b"NOOP\r\r\n", b"NOOP" * 250])
def test_a_command_that_breaks_the_rules_of_lines(sink: Sink, client: Client, line: bytes) -> None:
    """It is refused and the connection closed."""
    assert client.ask(line).startswith("500 5.5.2")
    assert client.socket.recv(1) == b""
    assert len(sink.counters().violations) == 1


def test_a_client_that_does_not_wait(sink: Sink, client: Client) -> None:
    """Content before the 354, and pipelining where it was not offered."""
    client.socket.sendall(ENVELOPE + CONTENT + b".\r\n")
    assert [client.reply()[:3] for _ in range(4)] == ["250", "250", "354", "250"]
    assert sink.counters().violations == ["content before 354"]
    sink.configure(Settings(extensions=()))
    with Client(sink) as another:
        another.greet()
        another.socket.sendall(MAIL + RCPT)
        assert [another.reply()[:3] for _ in range(2)] == ["250", "250"]
    assert sink.counters().violations[1:] == ["pipelined after MAIL"]


def test_more_than_one_recipient(sink: Sink, client: Client) -> None:
    """Each has its line in the journal, and the mail is noted."""
    client.deliver()
    assert sink.counters().most_recipients == 1
    client.ask(MAIL)
    client.ask(RCPT)
    client.ask(b"RCPT TO:<other@example.com>\r\n")
    client.ask(b"DATA\r\n")
    client.ask(CONTENT + b".\r\n")
    counters = sink.counters()
    assert (counters.most_recipients, counters.violations) == (2, ["2 recipients"])
    assert (counters.mails, len(sink.accepted())) == (2, 3)
    assert {sink.content(mail) for mail in sink.accepted()} == {CONTENT}


# When a rule holds


def test_how_often(sink: Sink, client: Client) -> None:
    """Once, twice, always; each rule's uses are counted."""
    once, twice = Rule("mail", "450 once", times=1), Rule("mail", "450 twice", times=2)
    sink.script(once, twice, always := Rule("rcpt", "550 always"))
    replies = [client.deliver() for _ in range(5)]
    assert replies == ["450 once", "450 twice", "450 twice", "550 always", "550 always"]
    assert [sink.fired(rule) for rule in (once, twice, always)] == [1, 2, 2]
    sink.script(once)
    assert sink.fired(once) == 0
    assert [client.deliver()[:3] for _ in range(2)] == ["450", "250"]


def test_to_whom(sink: Sink, client: Client) -> None:
    """By a part of the recipient, at every stage that knows one."""
    sink.script(Rule("rcpt", "550 no", to="a@"), Rule("data", "451 no", to="b@"))
    replies = [client.deliver(recipient=f"{name}@example.com")[:3] for name in "abc"]
    assert replies == ["550", "451", "250"]


def test_which_connection_and_mail(sink: Sink) -> None:
    """The n-th since the rules were given."""
    with Client(sink) as earlier:
        earlier.greet().deliver()
        sink.script(Rule("banner", "421 second", connection=2), Rule("dot", "451 third", mail=3))
        assert earlier.deliver().startswith("250")
    for expected in ("220 sink ESMTP", "421 second", "220 sink ESMTP"):
        with Client(sink) as client:
            assert client.reply() == expected
    with Client(sink) as client:
        client.greet()
        assert [client.deliver()[:3] for _ in range(3)] == ["250", "451", "250"]


def test_for_a_time(sink: Sink, client: Client) -> None:
    """Seconds from when the rules were given."""
    sink.script(Rule("mail", "451 later", for_seconds=1.5))
    until = time.monotonic() + 1.5
    assert client.deliver() == "451 later"
    time.sleep(max(0, until + 0.05 - time.monotonic()))
    assert client.deliver().startswith("250")


def test_greylisting(sink: Sink, client: Client) -> None:
    """Each recipient has a time of its own, from the first try."""
    sink.script(rule := Rule("rcpt", "451 4.7.1 greylisted", grey_seconds=1.5))
    assert client.deliver(recipient="a@example.com").startswith("451")
    assert client.deliver(recipient="a@example.com").startswith("451")
    time.sleep(1.55)
    assert client.deliver(recipient="a@example.com").startswith("250")
    assert client.deliver(recipient="b@example.com").startswith("451")
    assert sink.fired(rule) == 3


def test_a_share_at_random(sink: Sink, client: Client) -> None:
    """Half of them, and with the same seed the same ones."""
    seen = []
    for seed in (7, 7, 8):
        sink.script(Rule("mail", "451 tails", share=0.5, seed=seed))
        seen.append([client.deliver()[:3] for _ in range(40)])
    assert seen[0] == seen[1] != seen[2]
    assert 10 < seen[0].count("451") < 30


# What a rule does


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("code", [451, 554])
def test_a_reply_at_each_stage(sink: Sink, stage: Stage, code: int) -> None:
    """It is said there and not before, and nothing is accepted of what was refused."""
    sink.configure(LOGIN)
    sink.script(rule := Rule(stage, f"{code} no"))
    with Client(sink) as client:
        assert walk(client, stage) == f"{code} no"
    counters = sink.counters()
    assert sink.fired(rule) == 1
    assert [stage for stage, _ in DIALOGUE if counters.stages[stage]] == STAGES[
        : STAGES.index(stage) + 1
    ]
    assert counters.mails == len(sink.accepted()) == (stage in ("rset", "quit"))


@pytest.mark.parametrize("stage", STAGES)
def test_421_closes_at_each_stage(sink: Sink, stage: Stage) -> None:
    """Who says this hangs up."""
    sink.configure(LOGIN)
    sink.script(Rule(stage, "421 4.3.2 shutting down"))
    with Client(sink) as client:
        assert walk(client, stage) == "421 4.3.2 shutting down"
        assert client.socket.recv(1) == b""
    assert len(sink.accepted()) == (stage in ("rset", "quit"))


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("is_reset", [False, True])
def test_a_drop_at_each_stage(sink: Sink, stage: Stage, *, is_reset: bool) -> None:
    """No answer but the end; what came with the dot was accepted."""
    sink.configure(LOGIN)
    sink.script(rule := Rule(stage, Drop(is_reset=is_reset)))
    end = pytest.raises(ConnectionResetError) if is_reset else contextlib.nullcontext()
    # The reset may be there before the connection is known to be.
    with end, Client(sink) as client:
        assert walk(client, stage) == ""
    assert sink.fired(rule) == 1
    assert len(sink.accepted()) == (stage in ("dot", "rset", "quit"))


@pytest.mark.parametrize("is_reset", [False, True])
@pytest.mark.parametrize("is_whole", [False, True])
def test_a_drop_in_the_content(
    sink: Sink, client: Client, *, is_reset: bool, is_whole: bool
) -> None:
    """After so many bytes, not before, though the dot came in the same segment: no mail."""
    sink.script(rule := Rule("content", Drop(is_reset=is_reset), after_bytes=20))
    assert client.ask(MAIL + RCPT).startswith("250")
    assert client.reply().startswith("250")
    assert client.ask(b"DATA\r\n").startswith("354")
    client.socket.sendall(CONTENT[:19])
    assert client.is_silent()
    assert sink.fired(rule) == 0
    client.socket.sendall(CONTENT[19:] + b".\r\n" if is_whole else CONTENT[19:20])
    with pytest.raises(ConnectionResetError) if is_reset else contextlib.nullcontext():
        assert client.reply() == ""
    assert (sink.fired(rule), sink.accepted()) == (1, [])


def test_a_shorter_content_is_not_dropped(sink: Sink, client: Client) -> None:
    """The dot was there before so many bytes."""
    sink.script(Rule("content", Drop(), after_bytes=len(CONTENT) + 1))
    assert client.deliver().startswith("250")


@pytest.mark.parametrize("is_accepted", [False, True])
@pytest.mark.parametrize("kind", [Drop, Silence])
def test_no_answer_to_the_dot(
    sink: Sink, client: Client, kind: Callable[..., Action], *, is_accepted: bool
) -> None:
    """The mail was journaled, or was not: the client cannot tell."""
    sink.script(Rule("dot", kind(is_accepted=is_accepted)))
    client.ask(MAIL)
    client.ask(RCPT)
    client.ask(b"DATA\r\n")
    client.socket.sendall(CONTENT + b".\r\n")
    if kind is Drop:
        assert client.reply() == ""
    else:
        assert client.is_silent()
        assert sink.counters().open == 1
    assert len(sink.accepted()) == is_accepted


def test_silence_ends_with_the_client(sink: Sink, client: Client) -> None:
    """A client that gives up is not counted as connected."""
    sink.script(Rule("mail", Silence()))
    client.socket.sendall(MAIL)
    assert client.is_silent()
    client.socket.close()
    eventually(lambda: sink.counters().open == 0, within_seconds=TIMEOUT_SECONDS)


@pytest.mark.parametrize("do", ["delay:1.5", Delay(1.5)])
def test_a_delay(sink: Sink, client: Client, do: str | Action) -> None:
    """The mail is journaled before it, and what the next rule says comes after it."""
    sink.script(Rule("dot", do), Rule("dot", "250 at last"))
    client.socket.sendall(ENVELOPE)
    for _ in range(3):
        client.reply()
    began_at = time.monotonic()
    client.socket.sendall(CONTENT + b".\r\n")
    assert client.is_silent()
    assert len(sink.accepted()) == 1
    assert client.reply() == "250 at last"
    assert time.monotonic() - began_at >= 1.5


def test_a_tarpit(sink: Sink) -> None:
    """Every reply comes byte by byte."""
    sink.script(Rule("every", Tarpit(0.01)), Rule("mail", "451 4.7.1 slowly"))
    with Client(sink) as client:
        began_at = time.monotonic()
        assert client.reply() == "220 sink ESMTP"
        assert client.ask(b"NOOP\r\n") == "250 2.0.0 ok"
        client.ask(b"HELO x\r\n")
        assert client.ask(MAIL) == "451 4.7.1 slowly"
        letters = len("220 sink ESMTP" + "250 2.0.0 ok" + "250 sink" + "451 4.7.1 slowly") + 2 * 4
        assert time.monotonic() - began_at >= 0.01 * (letters - 4)


@pytest.mark.parametrize("stage", ["banner", "mail", "dot"])
@pytest.mark.parametrize(
    "data", [b"250 no end of the line", bytes(range(256)), b"250 " + b"x" * 1_000_000 + b"\r\n"]
)
def test_bytes_as_they_are(sink: Sink, stage: Stage, data: bytes) -> None:
    """What is no reply comes as it was given, and the dialogue may go on."""
    sink.script(Rule(stage, Raw(data)))
    with Client(sink) as client:
        for each, command in DIALOGUE:
            if each == "auth":
                continue
            client.socket.sendall(command)
            if each == stage:
                break
            client.reply()
        received = b""
        while len(received) < len(data):
            received += client.socket.recv(64 * 1024)
        assert received == data
        assert client.is_silent()
        assert client.ask(b"NOOP\r\n").startswith("250")
    assert len(sink.accepted()) == (stage == "dot")


def test_a_reply_without_end(sink: Sink, client: Client) -> None:
    """Line after line, not faster than they are read, as long as the client stays; others go on."""
    sink.script(Rule("mail", Raw(b"250-and more\r\n", times=None), connection=0))
    client.socket.sendall(MAIL)
    received = 0
    while received < 2_000_000:
        received += len(client.socket.recv(64 * 1024))
    with Client(sink) as other:
        assert other.greet().deliver().startswith("250")
    client.socket.close()
    eventually(lambda: sink.counters().open == 0, within_seconds=TIMEOUT_SECONDS)


def test_a_limit_of_connections(sink: Sink) -> None:
    """The one too many hears 421; when another has gone there is room."""
    sink.configure(Settings(max_connections=2))
    with Client(sink) as first:
        first.greet()
        with Client(sink) as second:
            second.greet()
            with Client(sink) as third:
                assert third.reply() == "421 4.7.0 too many connections"
                assert third.socket.recv(1) == b""
        eventually(lambda: sink.counters().open == 1, within_seconds=TIMEOUT_SECONDS)
        with Client(sink) as fourth:
            fourth.greet()
    counters = sink.counters()
    assert (counters.connections, counters.most_open, counters.too_many) == (4, 3, 1)


@pytest.mark.parametrize("words", ["", "421 4.4.2 idle too long"])
def test_an_idle_connection_is_closed(sink: Sink, words: str) -> None:
    """After so long without a command, with a word or without."""
    sink.configure(Settings(idle_seconds=1.0))
    sink.script(*[Rule("idle", words)] if words else [])
    with Client(sink) as client:
        client.greet()
        assert client.is_silent()
        assert client.deliver().startswith("250")
        began_at = time.monotonic()
        assert client.reply() == words
        assert client.socket.recv(1) == b""
        assert 0.5 < time.monotonic() - began_at < TIMEOUT_SECONDS
    assert sink.counters().stages["idle"] == 1


# The process


def test_what_is_forgotten(sink: Sink, client: Client) -> None:
    """Journal, contents, rules, settings and counts; open connections stay, and stay counted."""
    sink.configure(Settings(extensions=()))
    sink.script(Rule("mail", "451 later", times=9))
    client.deliver()
    sink.script()
    client.deliver()
    sink.forget()
    assert sink.accepted() == []
    counters = sink.counters()
    assert (counters.open, counters.most_open, counters.mails, counters.fired) == (1, 1, 0, [])
    assert client.deliver().startswith("250")
    (mail,) = sink.accepted()
    assert sink.content(mail) == CONTENT
    assert "SIZE" in client.ask(b"EHLO x\r\n")


def test_a_sink_whose_parent_is_gone_ends(tmp_path: Path) -> None:
    """Nothing is left behind, not even by a SIGKILL."""
    program = (
        "import os, sys, pathlib; from tests.support.sink import Sink\n"
        "sink = Sink(pathlib.Path(sys.argv[1])); sink.start()\n"
        "print(sink.port, flush=True); os._exit(9)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, tmp_path],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        timeout=TIMEOUT_SECONDS,
        check=False,
    )
    port = int(done.stdout.split()[-1])

    def is_gone() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((HOST, port)) != 0

    eventually(is_gone, within_seconds=TIMEOUT_SECONDS)


def test_the_command_for_benchmarks(tmp_path: Path) -> None:
    """It says its port, takes its time before each 250, and ends well."""
    journal = tmp_path / "sink.jsonl"
    command = [sys.executable, "-m", "tests.support.sink", "--port", "0", "--journal", journal]
    with subprocess.Popen(
        [*command, "--not-durable", "--delay-ms", "200"],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        said = re.fullmatch(r"listening on 127\.0\.0\.1:(\d+)\n", process.stdout.readline())
        assert said
        began_at = time.monotonic()
        with smtplib.SMTP(HOST, int(said[1]), "client", TIMEOUT_SECONDS) as client:
            client.sendmail("a@b", "c@d", CONTENT)
        assert time.monotonic() - began_at >= 0.2
        process.terminate()
        assert process.wait(TIMEOUT_SECONDS) == 0
    assert [mail.order_id for mail in accepted(journal)] == ["order-1"]
    assert json.loads(journal.read_text())["start"] is None
