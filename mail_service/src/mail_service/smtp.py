"""One kept connection to the relay; the only file that opens it (RFC 5321)."""

import re
import smtplib
import socket
import ssl
from collections.abc import Callable
from dataclasses import dataclass

from mail_service.replies import Answer, Stage

CONNECT_TIMEOUT_SECONDS = 30.0
REPLY_TIMEOUT_SECONDS = 60.0
MAX_REPLY_CHARACTERS = 300
CLOSING = 421
# As smtplib has it.
NO_CODE = -1
LEADING_DOT = re.compile(rb"(?m)^\.")


@dataclass(frozen=True, slots=True)
class Relay:
    """The SMTP relay, and how it is spoken to; `tls` is starttls, implicit or off."""

    host: str
    port: int
    tls: str
    user: str | None
    password: str | None
    final_dot_timeout_seconds: float


class SmtpConnection:
    """Delivers mails one after the other over one connection, opened when it is needed.

    Never used as a context manager: smtplib's would turn an accepted mail into an exception when
    QUIT is answered badly.
    """

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._smtp: smtplib.SMTP | None = None

    def deliver(
        self, content: bytes, *, sender: str, recipient: str, may_finish: Callable[[], bool]
    ) -> Answer:
        """Hold one dialogue and return its end; never raises for what the relay or network does.

        `content` has CRLF line ends. `may_finish` is asked before the write that holds the final
        dot; when it says no the connection is closed instead, and the relay has no mail.
        """
        was_kept = self._smtp is not None
        answer = self._dialogue(content, sender, recipient, may_finish)
        if was_kept and answer.code is None and answer.stage is Stage.MAIL:
            # The relay had closed the idle connection: nothing was said yet.
            answer = self._dialogue(content, sender, recipient, may_finish)
        return answer

    def close(self) -> None:
        """Say goodbye, whatever the relay answers."""
        smtp, self._smtp = self._smtp, None
        if smtp is None:
            return
        try:
            smtp.quit()
        except (OSError, smtplib.SMTPException):
            smtp.close()

    def _dialogue(
        self, content: bytes, sender: str, recipient: str, may_finish: Callable[[], bool]
    ) -> Answer:
        stage = Stage.CONNECT
        try:
            smtp = self._connected()
            stage = Stage.MAIL
            reply = smtp.mail(sender)
            if _is_positive(reply):
                stage = Stage.RCPT
                reply = smtp.rcpt(recipient)
            if _is_positive(reply):
                stage = Stage.DATA
                reply = smtp.docmd("DATA")
            if reply[0] != 354:
                self._reset(smtp, reply[0])
                return _answer(stage, reply)
            smtp.send(_dot_stuffed(content))
            if not may_finish():
                self._drop()
                return Answer(stage, None, "the lease had ended")
            stage = Stage.FINAL_DOT
            return _answer(stage, self._finish(smtp))
        except smtplib.SMTPResponseException as error:
            self._drop()
            # After the dot this is smtplib's own word for a reply it cannot read: nobody knows.
            code = error.smtp_code if stage is not Stage.FINAL_DOT else NO_CODE
            return _answer(stage, (code, _bytes(error.smtp_error)))
        except (OSError, ValueError, smtplib.SMTPException) as error:
            self._drop()
            return _answer(stage, (NO_CODE, f"{type(error).__name__} {error}".encode()))

    def _connected(self) -> smtplib.SMTP:
        if self._smtp is not None:
            return self._smtp
        relay = self._relay
        # With no name given smtplib asks the DNS for ours, without a time-out.
        name, timeout = socket.gethostname(), CONNECT_TIMEOUT_SECONDS
        smtp = (
            smtplib.SMTP_SSL(
                relay.host, relay.port, name, timeout=timeout, context=ssl.create_default_context()
            )
            if relay.tls == "implicit"
            else smtplib.SMTP(relay.host, relay.port, name, timeout)
        )
        self._smtp = smtp
        if relay.tls == "starttls":
            smtp.starttls(context=ssl.create_default_context())
        smtp.ehlo_or_helo_if_needed()
        if relay.user and relay.password:
            smtp.login(relay.user, relay.password)
        connection = self._socket(smtp)
        # The dot is a write of its own and must not wait for the acknowledgement of the last one.
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.settimeout(REPLY_TIMEOUT_SECONDS)
        return smtp

    def _reset(self, smtp: smtplib.SMTP, code: int) -> None:
        """Make the connection fit for the next mail; the reply that ended this one stands."""
        try:
            if code == CLOSING:
                self._drop()
            else:
                smtp.rset()
        except (OSError, smtplib.SMTPException):
            self._drop()

    def _finish(self, smtp: smtplib.SMTP) -> tuple[int, bytes]:
        connection = self._socket(smtp)
        connection.settimeout(self._relay.final_dot_timeout_seconds)
        smtp.send(b".\r\n")
        reply = smtp.getreply()
        connection.settimeout(REPLY_TIMEOUT_SECONDS)
        if reply[0] == NO_CODE:
            # Whatever comes next on it would be taken for the next mail's reply.
            self._drop()
        return reply

    def _socket(self, smtp: smtplib.SMTP) -> socket.socket:
        if smtp.sock is None:
            raise smtplib.SMTPServerDisconnected("not connected")
        return smtp.sock

    def _drop(self) -> None:
        smtp, self._smtp = self._smtp, None
        if smtp is not None:
            smtp.close()


def _is_positive(reply: tuple[int, bytes]) -> bool:
    return 200 <= reply[0] < 300


def _dot_stuffed(content: bytes) -> bytes:
    stuffed = LEADING_DOT.sub(b"..", content)
    return stuffed if stuffed.endswith(b"\r\n") else stuffed + b"\r\n"


def _answer(stage: Stage, reply: tuple[int, bytes]) -> Answer:
    code, raw = reply
    words = " ".join(raw.decode("utf-8", errors="replace").split())
    # It goes into the ledger, which takes no NUL, and onto terminals.
    text = "".join(letter if letter.isprintable() else "?" for letter in words)
    return Answer(stage, code if code > 0 else None, text[:MAX_REPLY_CHARACTERS])


def _bytes(error: bytes | str) -> bytes:
    return error if isinstance(error, bytes) else error.encode()
