"""One kept connection to the relay; the only file that opens it (RFC 5321, RFC 2920)."""

import re
import smtplib
import socket
import ssl
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from mail_service.dialogues import LATE, READ, WRITE, Aside, Steps, Wait, finish
from mail_service.replies import CLOSING, Answer, Stage
from mail_service.settings import Timing

MAX_LINE_BYTES = 4_096
MAX_REPLY_LINES = 100
MAX_REPLY_CHARACTERS = 300
RECEIVED_BYTES = 65_536
# What goes out with the final dot: of a longer mail the rest is sent before the lease is looked at.
LAST_WRITE_BYTES = 32_768
# A relay spreads load, and notices new rules, when connections end now and then.
MOST_MAILS = 500
MOST_SECONDS = 300.0
GO_AHEAD = 354
REPLY_CODE = re.compile(rb"[2-5][0-9]{2}")
UNSAYABLE = frozenset(" <>")
ADDRESS = re.compile(r"[^\s<>()\[\]:;,\"@]+@[^\s<>()\[\]:;,\"@]+")

Reply = tuple[int, bytes]


class CannotAddress(Exception):
    """The relay cannot be told of this recipient."""


@dataclass(frozen=True, slots=True)
class Relay:
    """The SMTP relay, and how it is spoken to; `tls` is starttls, implicit or off."""

    host: str
    port: int
    tls: str
    user: str | None
    password: str | None
    timing: Timing


class SmtpConnection:
    """Delivers mails one after the other over one connection, opened when it is needed.

    Connecting blocks, so it is done aside; from then on no step does.

    Never used as a context manager: smtplib's would turn an accepted mail into an exception when
    QUIT is answered badly.
    """

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._session: _Session | None = None

    def deliver(
        self, content: bytes, *, sender: str, recipient: str, may_finish: Callable[[], bool]
    ) -> Steps[Answer]:
        """Hold one dialogue and return its end, whatever relay or network do.

        `content` has CRLF line ends. `may_finish` is asked before the write that holds the final
        dot; when it says no the connection is closed instead, and the relay has no mail. Raises
        CannotAddress.
        """
        if self._session is not None and self._session.is_worn_out():
            yield from self.close()
        was_kept = self._session is not None
        answer = yield from self._dialogue(content, sender, recipient, may_finish)
        if was_kept and answer.stage is Stage.MAIL and answer.code in (None, CLOSING):
            # The relay had closed the idle connection, and may have said so.
            answer = yield from self._dialogue(content, sender, recipient, may_finish)
        return answer

    @property
    def is_open(self) -> bool:
        """Whether the connection was kept, as far as anybody knows."""
        return self._session is not None

    def close(self) -> Steps[None]:
        """Say goodbye, whatever the relay answers."""
        session, self._session = self._session, None
        if session is None:
            return
        try:
            session.allow(self._relay.timing.goodbye_seconds)
            yield from session.say(b"QUIT\r\n")
            yield from session.hear()
        except (OSError, smtplib.SMTPException):
            pass
        session.close()

    def _dialogue(
        self, content: bytes, sender: str, recipient: str, may_finish: Callable[[], bool]
    ) -> Steps[Answer]:
        timing = self._relay.timing
        stage = Stage.CONNECT
        try:
            session = yield from self._connected()
            stage = Stage.MAIL
            session.mails += 1
            session.allow(timing.envelope_seconds)
            commands = session.envelope(sender, recipient, len(content))
            yield from session.announce(commands.values())
            for stage, command in commands.items():
                reply = yield from session.answer_to(command)
                if not _is_positive(stage, reply):
                    return (yield from self._refused(session, stage, reply))
            body = _dot_stuffed(content)
            session.allow(timing.content_seconds)
            yield from session.say(body[:-LAST_WRITE_BYTES])
            if not may_finish():
                self._drop()
                return Answer(Stage.STOPPED, None, "before the final dot")
            stage = Stage.FINAL_DOT
            yield from session.say(body[-LAST_WRITE_BYTES:] + b".\r\n")
            session.allow(timing.final_dot_seconds)
            reply = yield from session.hear()
        except smtplib.SMTPResponseException as error:
            self._drop()
            return _answer(stage, error.smtp_code, error.smtp_error)
        except (OSError, smtplib.SMTPException) as error:
            self._drop()
            return _answer(stage, None, f"{type(error).__name__} {error}")
        if reply[0] == CLOSING:
            self._drop()
        return _answer(stage, *reply)

    def _connected(self) -> Steps["_Session"]:
        if self._session is None:
            self._session = yield Aside(lambda: _open(self._relay))
        return self._session

    def _refused(self, session: "_Session", stage: Stage, reply: Reply) -> Steps[Answer]:
        """Make the connection fit for the next mail; the reply that ended this one stands."""
        try:
            if reply[0] == CLOSING:
                self._drop()
            else:
                yield from session.abandon()
        except (OSError, smtplib.SMTPException):
            self._drop()
        return _answer(stage, *reply)

    def _drop(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


class _Session(smtplib.SMTP):
    """smtplib's connect, EHLO, STARTTLS and AUTH; replies bounded in time and size; pipelining."""

    def __init__(self, relay: Relay, **tls: Any) -> None:
        self.mails = 0
        self._opened_at = time.monotonic()
        self._received = bytearray()
        self._announced = 0
        self.allow(relay.timing.connect_seconds)
        super().__init__(
            relay.host,
            relay.port,
            # With no name given smtplib asks the DNS for ours, without a time-out.
            socket.gethostname(),
            timeout=relay.timing.connect_seconds,
            **tls,
        )
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ehlo(self, name: str = "") -> Reply:
        """Hear a relay that closes down: smtplib would say HELO to nobody."""
        reply = super().ehlo(name)
        if reply[0] == CLOSING:
            raise smtplib.SMTPResponseException(*reply)
        return reply

    def allow(self, seconds: float) -> None:
        """Give what comes next this long, all together."""
        self._deadline = time.monotonic() + seconds

    def is_worn_out(self) -> bool:
        """Say whether this connection has served long enough."""
        return self.mails >= MOST_MAILS or time.monotonic() - self._opened_at > MOST_SECONDS

    def refuse_what_came_unprotected(self) -> None:
        """Raise when somebody put words into the relay's mouth before TLS began."""
        if self._received:
            raise smtplib.SMTPServerDisconnected("more than a reply came before TLS")

    def envelope(self, sender: str, recipient: str, size_bytes: int) -> dict[Stage, bytes]:
        """Return MAIL, RCPT and DATA as this relay takes them; raise CannotAddress."""
        mail = f"MAIL FROM:{_path(sender)}"
        if self.has_extn("size"):
            mail += f" SIZE={size_bytes}"
        if not recipient.isascii():
            if not self.has_extn("smtputf8"):
                raise CannotAddress("the relay has no SMTPUTF8 (RFC 6531) for this address")
            # RFC 6531 §3.1: who knows one knows the other, and a header has eight bits then.
            mail += " BODY=8BITMIME SMTPUTF8"
        said = {Stage.MAIL: mail, Stage.RCPT: f"RCPT TO:{_path(recipient)}", Stage.DATA: "DATA"}
        return {stage: f"{line}\r\n".encode() for stage, line in said.items()}

    def announce(self, commands: Collection[bytes]) -> Steps[None]:
        """Send all commands in one write where the relay can take that (RFC 2920)."""
        if self.has_extn("pipelining"):
            yield from self.say(b"".join(commands))
            self._announced = len(commands)

    def answer_to(self, command: bytes) -> Steps[Reply]:
        """Return the reply to the next command, which is sent now unless it was announced."""
        if self._announced:
            self._announced -= 1
        else:
            yield from self.say(command)
        return (yield from self.hear())

    def abandon(self) -> Steps[None]:
        """End a transaction that was refused: hear the replies still to come, and reset."""
        while self._announced:
            self._announced -= 1
            code, _ = yield from self.hear()
            if code == GO_AHEAD:
                # Nobody is to get it, and nothing is in it (RFC 2920 §3.1).
                yield from self.say(b".\r\n")
                yield from self.hear()
        yield from self.say(b"RSET\r\n")
        yield from self.hear()

    def begin(self) -> None:
        """Never block from now on."""
        self._socket.setblocking(False)

    def send(self, s: Any) -> None:
        """Send what smtplib says before the first mail."""
        finish(self.say(s.encode() if isinstance(s, str) else s))

    def getreply(self) -> Reply:
        """Read the reply to what smtplib said; close when there is none."""
        try:
            return finish(self.hear())
        except OSError:
            self.close()
            raise

    def say(self, data: bytes) -> Steps[None]:
        """Send within what is left of the time."""
        unsent = memoryview(data)
        while unsent:
            try:
                unsent = unsent[self._socket.send(unsent) :]
            except (BlockingIOError, ssl.SSLWantWriteError):
                yield Wait(self._socket, WRITE, self._deadline)
            except ssl.SSLWantReadError:
                yield Wait(self._socket, READ, self._deadline)

    def hear(self) -> Steps[Reply]:
        """Read one reply (RFC 5321 §4.2) within what is left of the time."""
        lines: list[bytes] = []
        while len(lines) < MAX_REPLY_LINES:
            line = yield from self._read_line()
            code, separator = line[:3], line[3:4]
            if not REPLY_CODE.fullmatch(code) or separator not in (b" ", b"-", b""):
                raise smtplib.SMTPServerDisconnected("what came is no reply")
            lines.append(line[4:])
            if separator != b"-":
                return int(code), b"\n".join(lines)
        raise smtplib.SMTPServerDisconnected("a reply without end")

    @property
    def _socket(self) -> socket.socket:
        if self.sock is None:
            raise smtplib.SMTPServerDisconnected("not connected")
        return self.sock

    def _read_line(self) -> Steps[bytes]:
        while (end := self._received.find(b"\n")) < 0:
            if len(self._received) > MAX_LINE_BYTES:
                raise smtplib.SMTPServerDisconnected("a line without end")
            data = yield from self._receive()
            if not data:
                raise smtplib.SMTPServerDisconnected("the relay hung up")
            self._received += data
        line = bytes(self._received[:end]).rstrip(b"\r")
        del self._received[: end + 1]
        return line

    def _receive(self) -> Steps[bytes]:
        events = READ
        # Whoever sends a byte now and then never lets a wait end late.
        while time.monotonic() < self._deadline:
            yield Wait(self._socket, events, self._deadline)
            try:
                return self._socket.recv(RECEIVED_BYTES)
            except (BlockingIOError, ssl.SSLWantReadError):
                events = READ
            except ssl.SSLWantWriteError:
                events = WRITE
        raise TimeoutError(LATE)


class _ImplicitTlsSession(_Session, smtplib.SMTP_SSL):
    """The same, with TLS from the first byte."""

    def __init__(self, relay: Relay) -> None:
        super().__init__(relay, context=ssl.create_default_context())


def _open(relay: Relay) -> _Session:
    """Connect, protect the connection and log in; blocks."""
    session = (_ImplicitTlsSession if relay.tls == "implicit" else _Session)(relay)
    try:
        if relay.tls == "starttls":
            session.starttls(context=ssl.create_default_context())
            session.refuse_what_came_unprotected()
        session.ehlo_or_helo_if_needed()
        if relay.user and relay.password:
            session.login(relay.user, relay.password)
        session.begin()
    except BaseException:
        session.close()
        raise
    return session


def _path(address: str) -> str:
    """Write an address as a command has it (RFC 5321 §4.1.2)."""
    if not address.isprintable() or not UNSAYABLE.isdisjoint(address):
        raise CannotAddress("the address holds a character that no command can")
    return f"<{address}>"


def _is_positive(stage: Stage, reply: Reply) -> bool:
    return reply[0] == GO_AHEAD if stage is Stage.DATA else 200 <= reply[0] < 300


def _dot_stuffed(content: bytes) -> bytes:
    stuffed = content.replace(b"\r\n.", b"\r\n..")
    if stuffed.startswith(b"."):
        stuffed = b"." + stuffed
    return stuffed if stuffed.endswith(b"\r\n") else stuffed + b"\r\n"


def _answer(stage: Stage, code: int | None, text: bytes | str) -> Answer:
    if isinstance(text, bytes):
        text = text.decode("utf-8", errors="replace")
    # It goes into the ledger and the log, which are to name nobody, and onto terminals.
    text = ADDRESS.sub("(address)", " ".join(text[: 2 * MAX_REPLY_CHARACTERS].split()))
    words = "".join(letter if letter.isprintable() else "?" for letter in text)
    return Answer(stage, code if code and code > 0 else None, words[:MAX_REPLY_CHARACTERS])
