"""An SMTP sink that can be believed: what it answered 250 stands in its journal, fsynced before.

    with Sink(directory) as sink:
        sink.script(Rule("rcpt", "451 4.7.1 later", times=2), Rule("dot", Drop(), mail=3))

    python -m tests.support.sink --port 0 --journal sink.jsonl [--not-durable] [--delay-ms 20]

A process of its own on 127.0.0.1, of the standard library alone: it runs in any of our
environments. What it offers is told by settings, what it does with a mail by rules.
"""

import argparse
import asyncio
import base64
import binascii
import hashlib
import json
import os
import random
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, cast

# `tls` is between a 220 to STARTTLS and the handshake, `content` between 354 and the dot,
# `other` whatever is answered elsewhere. `every` is all of them.
Stage = Literal[
    "banner", "ehlo", "starttls", "tls", "auth", "mail", "rcpt", "data", "content", "dot",
    "rset", "quit", "idle", "other", "every",
]  # fmt: skip
Certificate = Literal["good", "expired", "wrong-host", "unknown"]

HOST = "127.0.0.1"
MAX_LINE_BYTES = 1000
MAX_CONTENT_BYTES = 10 * 1024 * 1024
MAX_VIOLATIONS = 100
STOP_SECONDS = 10.0
# Below the range the kernel takes ports from: while the sink is down nobody else gets its port.
PORTS = range(20_000, 32_000)
EXTENSIONS = ("PIPELINING", "SIZE", "8BITMIME", "ENHANCEDSTATUSCODES", "SMTPUTF8")
DROP = "drop"
DELAY = "delay:"
END = b"\r\n.\r\n"
NO_LINGERING = struct.pack("ii", 1, 0)
CERTIFICATE_DAYS = 30
CERTIFICATES = """
[req]
distinguished_name = name
[name]
[authority]
basicConstraints = critical, CA:TRUE
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
[here]
basicConstraints = critical, CA:FALSE
extendedKeyUsage = serverAuth
subjectAltName = DNS:localhost, IP:127.0.0.1
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
[elsewhere]
basicConstraints = critical, CA:FALSE
extendedKeyUsage = serverAuth
subjectAltName = DNS:elsewhere.example
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
"""


@dataclass(frozen=True, slots=True)
class Accepted:
    """One recipient of one mail that was answered 250, or would have been but for a fault.

    `start` is where its content begins in the file of contents, when there is one.
    """

    at: float
    connection: int
    recipient: str
    sender: str
    message_id: str | None
    order_id: str | None
    sha256: str
    size: int = 0
    is_tls: bool = False
    user: str | None = None
    start: int | None = None


@dataclass(frozen=True, slots=True)
class Delay:
    """Wait before the answer; the next rule says which."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Tarpit:
    """Wait after each byte of the answer; the next rule says which."""

    seconds: float = 1.0


@dataclass(frozen=True, slots=True)
class Drop:
    """Close, or reset, instead of an answer. At the dot `is_accepted` says: journaled first."""

    is_reset: bool = False
    is_accepted: bool = True


@dataclass(frozen=True, slots=True)
class Silence:
    """Never answer, and keep the connection. At the dot `is_accepted` says: journaled first."""

    is_accepted: bool = True


@dataclass(frozen=True, slots=True)
class Raw:
    """Send bytes as they are instead of a reply, so many times or (None) without end.

    `is_accepted` is what the sink makes of the command; at the dot it says: journaled first.
    """

    data: bytes
    times: int | None = 1
    is_accepted: bool = True


Action = Delay | Tarpit | Drop | Silence | Raw
ACTIONS: dict[str, type[Action]] = {
    kind.__name__: kind for kind in (Delay, Tarpit, Drop, Silence, Raw)
}


@dataclass(frozen=True, slots=True)
class Rule:
    r"""What happens at a stage: a reply ("451 4.7.1 later") or an action, and when.

    Rules are tried in order. `Delay` and `Tarpit` go on with the next rule, all else ends the
    search. "drop" is short for `Drop()`, "delay:SECONDS" for `Delay(SECONDS)`. A reply may have
    lines of its own ("220 go\r\n250 sneaked in"). After a 421 the connection is closed.

    `to` limits a rule to recipients that contain it, from the stage rcpt on; `times` to its first
    uses; `connection` and `mail` to the n-th of either since the rules were given; `for_seconds`
    to the time since then; `grey_seconds` to the time since each recipient was first seen; `share`
    to a random part; `after_bytes`, at the stage content, to mails of which so much has come.
    """

    stage: Stage
    do: str | Action
    to: str = ""
    times: int | None = None
    connection: int | None = None
    mail: int | None = None
    for_seconds: float | None = None
    grey_seconds: float | None = None
    share: float = 1.0
    seed: int = 0
    after_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Settings:
    """What the sink offers and demands of connections opened from now on.

    With a `user` it offers AUTH and demands it unless `is_auth_optional`. STARTTLS, where it is
    offered, is demanded only when `is_tls_required`. `is_tls_old` allows TLS 1.0 alone.
    """

    extensions: tuple[str, ...] = EXTENSIONS
    max_bytes: int = MAX_CONTENT_BYTES
    tls: Literal["off", "starttls", "implicit"] = "off"
    certificate: Certificate = "good"
    is_tls_old: bool = False
    is_tls_required: bool = False
    user: str | None = None
    password: str = ""
    mechanisms: tuple[str, ...] = ("PLAIN", "LOGIN")
    is_auth_optional: bool = False
    max_connections: int | None = None
    idle_seconds: float | None = None


@dataclass(slots=True)
class Counters:
    """What the process saw since it started or forgot; `fired` since the rules were given.

    `stages` counts replies, and at tls handshakes. `violations` are what no client should do, the
    first hundred.
    """

    connections: int = 0
    open: int = 0
    most_open: int = 0
    too_many: int = 0
    mails: int = 0
    most_recipients: int = 0
    stages: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    fired: list[int] = field(default_factory=list)

    def note(self, violation: str) -> None:
        """Add a violation."""
        if len(self.violations) < MAX_VIOLATIONS:
            self.violations.append(violation)


JOURNALED = tuple(each.name for each in fields(Accepted))
COUNTED = fields(Counters)


def accepted(journal: Path) -> list[Accepted]:
    """Return what stands in a journal; a last line that was torn was never answered 250."""
    if not journal.exists():
        return []
    whole = journal.read_bytes().rpartition(b"\n")[0]
    return [Accepted(**json.loads(line)) for line in whole.splitlines()]


def make_certificates(directory: Path) -> Path:
    """Make, unless it was done, a certificate of each kind; return the authority to trust."""
    authority, key = directory / "authority.pem", directory / "key.pem"
    if authority.exists():
        return authority
    directory.mkdir(parents=True, exist_ok=True)
    configuration, request = directory / "openssl.cnf", directory / "request.pem"
    configuration.write_text(CERTIFICATES, encoding="ascii")
    new = directory / "new.pem"

    def openssl(*arguments: str | Path) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)

    def signed_by_itself(to: Path, section: str) -> None:
        by = ("-config", configuration, "-extensions", section, "-subj", f"/CN=sink {section}")
        openssl("req", "-x509", "-key", key, "-days", str(CERTIFICATE_DAYS), *by, "-out", to)

    openssl("ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key)
    signed_by_itself(new, "authority")
    openssl(
        "req", "-new", "-key", key, "-config", configuration, "-subj", "/CN=sink", "-out", request
    )
    for kind, section, days in (
        ("good", "here", CERTIFICATE_DAYS),
        ("expired", "here", -1),
        ("wrong-host", "elsewhere", CERTIFICATE_DAYS),
    ):
        by = ("-CA", new, "-CAkey", key, "-set_serial", str(time.time_ns()))
        how = ("-extfile", configuration, "-extensions", section, "-days", str(days))
        openssl("x509", "-req", "-in", request, *by, *how, "-out", directory / f"{kind}.pem")
    signed_by_itself(directory / "unknown.pem", "here")
    return new.rename(authority)


class Sink:
    """A sink process for tests; it keeps port, journal, settings and rules over a restart."""

    def __init__(
        self,
        directory: Path,
        *,
        port: int | None = None,
        settings: Settings | None = None,
        is_durable: bool = True,
    ) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.port = port or _free_port()
        self.journal = directory / "sink.jsonl"
        self._contents = directory / "sink.contents"
        self._certificates = directory / "certificates"
        self._script = directory / "sink-script.json"
        self._is_durable = is_durable
        self._first_settings = self._settings = settings or Settings()
        self._rules: tuple[Rule, ...] = ()
        self._process: subprocess.Popen[str] | None = None
        self._asking = threading.Lock()

    def __enter__(self) -> Self:
        """Start it."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it, unless that was done."""
        self.stop()

    @property
    def authority(self) -> Path:
        """The PEM file a client trusts (SSL_CERT_FILE) when it is to trust the sink."""
        return make_certificates(self._certificates)

    def start(self) -> None:
        """Start the process and return when it answers."""
        self._write_script()
        command = [sys.executable, __file__, "--port", str(self.port), "--control"]
        command += ["--journal", str(self.journal), "--contents", str(self._contents)]
        command += ["--script", str(self._script), "--certificates", str(self._certificates)]
        command += [] if self._is_durable else ["--not-durable"]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        if not self._process.stdout or not self._process.stdout.readline():
            self.kill()
            raise RuntimeError(f"the sink did not start on port {self.port}")

    def stop(self) -> None:
        """End it in an orderly way: open connections are cut, the journal is whole."""
        process, self._process = self._process, None
        if process is None:
            return
        with process:
            process.terminate()
            code = process.wait(STOP_SECONDS)
        if code:
            raise RuntimeError(f"the sink ended with {code}")

    def kill(self) -> None:
        """SIGKILL it."""
        process, self._process = self._process, None
        if process is not None:
            with process:
                process.kill()

    @property
    def pid(self) -> int:
        """The process id while it runs."""
        if self._process is None:
            raise RuntimeError("the sink is not running")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether there is a process, as far as this object started and stopped it."""
        return self._process is not None

    def forget(self) -> None:
        """Empty journal, rules and counters and take back the settings, for another test."""
        self._settings = self._first_settings
        self.script()
        for file in (self.journal, self._contents):
            if file.exists():
                os.truncate(file, 0)
        if self.is_running:
            self._ask("forget")

    def script(self, *rules: Rule) -> None:
        """Replace the rules, from the next reply on; their counts begin anew."""
        self._rules = rules
        self._tell()

    def configure(self, settings: Settings) -> None:
        """Replace the settings, from the next connection on; counts of rules begin anew."""
        self._settings = settings
        self._tell()

    def accepted(self) -> list[Accepted]:
        """Return what the journal holds now."""
        return accepted(self.journal)

    def content(self, mail: Accepted) -> bytes:
        """Return the content of a mail, its dots no longer stuffed."""
        if mail.start is None:
            raise ValueError("the content was not kept")
        with self._contents.open("rb") as contents:
            contents.seek(mail.start)
            return contents.read(mail.size)

    def counters(self) -> Counters:
        """Return what the running process has counted."""
        seen = self._ask("count")
        return Counters(**{**seen, "stages": Counter(seen["stages"])})

    def fired(self, rule: Rule) -> int:
        """Return how often one of the present rules was used."""
        return self.counters().fired[self._rules.index(rule)]

    def _tell(self) -> None:
        self._write_script()
        if self.is_running:
            self._ask("load")

    def _write_script(self) -> None:
        if self._settings.tls != "off":
            make_certificates(self._certificates)
        script = {
            "settings": asdict(self._settings),
            "rules": [_encoded(rule) for rule in self._rules],
        }
        draft = self._script.with_suffix(".new")
        draft.write_text(json.dumps(script), encoding="utf-8")
        draft.replace(self._script)

    def _ask(self, what: str) -> dict[str, Any]:
        process = self._process
        if not process or not process.stdin or not process.stdout:
            raise RuntimeError("the sink is not running")
        with self._asking, suppress(BrokenPipeError):
            process.stdin.write(f"{what}\n")
            process.stdin.flush()
            if answer := process.stdout.readline():
                return cast("dict[str, Any]", json.loads(answer))
        raise RuntimeError("the sink has died")


class Journal:
    """Lines that are on the disk when `append` returns; many connections share a wait."""

    def __init__(
        self, path: Path, *, contents: Path | None = None, is_durable: bool = True
    ) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND
        self._file = os.open(path, flags, 0o644)
        # What a kill tore was never answered.
        os.ftruncate(self._file, path.read_bytes().rfind(b"\n") + 1)
        self._contents = None if contents is None else os.open(contents, flags, 0o644)
        self._is_durable = is_durable
        self._batch: list[tuple[Sequence[Accepted], bytes]] = []
        self._written: asyncio.Future[None] | None = None

    async def append(self, mails: Sequence[Accepted], content: bytes) -> None:
        """Write a line for each and wait for the disk."""
        self._batch.append((mails, content))
        if self._written is None:
            loop = asyncio.get_running_loop()
            self._written = loop.create_future()
            # What other connections have by then goes with it.
            loop.call_soon(self._write)
        await self._written

    def _write(self) -> None:
        written, self._written = self._written, None
        batch, self._batch = self._batch, []
        if written is None or written.done():
            return
        try:
            start = None
            if self._contents is not None:
                # Sought each time: another process may have emptied it.
                start = os.lseek(self._contents, 0, os.SEEK_END)
                _write_all(self._contents, b"".join([content for _, content in batch]))
            _write_all(self._file, "".join(_lines(batch, start)).encode())
            if self._is_durable:
                os.fsync(self._file)
        except OSError as error:
            written.set_exception(error)
        else:
            written.set_result(None)


@dataclass(frozen=True, slots=True)
class Situation:
    """What rules are chosen by; numbers count from the start of the process."""

    connection: int
    mail: int | None
    recipients: Sequence[str]
    received_bytes: int


class ArmedRule:
    """A rule and what became of it."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.fired = 0
        self._random = random.Random(rule.seed)
        self._first_seen: dict[str, float] = {}

    def holds(self, situation: Situation, now: float, since: "Beginning") -> bool:
        """Say whether it is to be used now."""
        rule, recipients = self.rule, situation.recipients
        mail = situation.mail and situation.mail - since.mails
        return (
            (rule.times is None or self.fired < rule.times)
            and (rule.for_seconds is None or now - since.at < rule.for_seconds)
            and rule.connection in (None, situation.connection - since.connections)
            and rule.mail in (None, mail)
            and rule.after_bytes <= situation.received_bytes
            and (not rule.to or any(rule.to in recipient for recipient in recipients))
            and (rule.grey_seconds is None or self._is_grey(recipients, now, rule.grey_seconds))
            and (rule.share >= 1 or self._random.random() < rule.share)
        )

    def _is_grey(self, recipients: Sequence[str], now: float, seconds: float) -> bool:
        first = [self._first_seen.setdefault(recipient, now) for recipient in recipients]
        return any(now - at < seconds for at in first)


@dataclass(frozen=True, slots=True)
class Beginning:
    """When the present rules were given, and what had been counted by then."""

    at: float
    connections: int
    mails: int


class Script:
    """The settings and rules of a file, as they were when it was last told to load it."""

    def __init__(self, path: Path | None, *rules: Rule) -> None:
        self.settings = Settings()
        self._path = path
        self._always = rules
        self.load(connections=0, mails=0)

    def load(self, *, connections: int, mails: int) -> None:
        """Read the file anew; so many connections and mails came before."""
        rules: list[Rule] = []
        if self._path is not None and self._path.exists():
            script = json.loads(self._path.read_text(encoding="utf-8"))
            rules = [_decoded(rule) for rule in script["rules"]]
            self.settings = Settings(**script["settings"])
        self._since = Beginning(time.monotonic(), connections, mails)
        self._armed = [ArmedRule(rule) for rule in (*rules, *self._always)]
        self._stages = {armed.rule.stage for armed in self._armed}

    def is_about(self, stage: Stage) -> bool:
        """Say whether there are rules for a stage at all."""
        return stage in self._stages or "every" in self._stages

    def actions(self, stage: Stage, situation: Situation) -> Iterator[str | Action]:
        """Yield what is to be done at this point, each rule counted as used."""
        now = time.monotonic()
        for armed in self._armed:
            if armed.rule.stage in (stage, "every") and armed.holds(situation, now, self._since):
                armed.fired += 1
                yield _expanded(armed.rule.do)

    @property
    def fired(self) -> list[int]:
        """How often each rule of the file was used."""
        return [armed.fired for armed in self._armed]


class Dropped(Exception):
    """The connection is over, without another word."""


class Wire(asyncio.Protocol):
    """Bytes of one connection: those that came stand in `buffer`, replies leave together."""

    def __init__(self, begin: Callable[["Wire"], None], end: Callable[[], None]) -> None:
        self.buffer = bytearray()
        self.is_tls = False
        self._begin = begin
        self._end = end
        self._replies: list[bytes] = []
        self._loop = asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        self._arrival: asyncio.Future[None] | None = None
        self._room = asyncio.Event()
        self._room.set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)
        self._begin(self)

    def data_received(self, data: bytes) -> None:
        """Wake who waits for more."""
        self.buffer += data
        self._wake()

    def eof_received(self) -> bool:
        """Leave our direction open, where there can be one, for replies to what came before."""
        self._finish()
        return not self.is_tls

    def connection_lost(self, _: Exception | None) -> None:
        """End."""
        self._finish()
        self._room.set()
        end, self._end = self._end, lambda: None
        end()

    def pause_writing(self) -> None:
        """Let who sends much wait."""
        self._room.clear()

    def resume_writing(self) -> None:
        """Let them go on."""
        self._room.set()

    def put(self, reply: str) -> None:
        """Send a reply together with those that follow it at once."""
        self._replies.append(reply.encode())

    def flush(self) -> None:
        """Send what was put."""
        if self._replies:
            self._transport.write(b"\r\n".join([*self._replies, b""]))
            self._replies.clear()

    async def send(self, data: bytes) -> None:
        """Send bytes, not faster than the client reads them."""
        self.flush()
        self._transport.write(data)
        await self._room.wait()
        # Where there is always room, waiting never lets the others have their turn.
        await asyncio.sleep(0)
        if self._over.done():
            raise Dropped

    async def more(self, *, within_seconds: float | None = None) -> None:
        """Return when more has come; raise TimeoutError when it has not in time."""
        self.flush()
        if self._over.done():
            raise Dropped
        self._arrival = self._loop.create_future()
        if within_seconds is None:
            await self._arrival
        else:
            await asyncio.wait_for(self._arrival, within_seconds)

    async def pause(self, seconds: float | None) -> None:
        """Wait so long (None: for ever); a client that goes away meanwhile has nothing to come."""
        self.flush()
        await asyncio.wait([self._over], timeout=seconds)
        if self._over.done():
            raise Dropped

    def hold(self) -> None:
        """Read nothing until the handshake."""
        self._transport.pause_reading()

    async def start_tls(self, context: ssl.SSLContext) -> None:
        """Go on encrypted; what the client said before counts no more."""
        self.hold()
        self.flush()
        self.buffer.clear()
        try:
            encrypted = await self._loop.start_tls(self._transport, self, context, server_side=True)
        except OSError as error:
            # asyncio need not have told us.
            self._transport.abort()
            self.connection_lost(error)
            raise Dropped from error
        if encrypted is None:
            raise Dropped
        self._transport, self.is_tls = encrypted, True

    def close(self, *, is_reset: bool = False) -> None:
        """End the connection; twice is no error."""
        if is_reset:
            end = self._transport.get_extra_info("socket")
            end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGERING)
            self._transport.abort()
        elif not self._transport.is_closing():
            self.flush()
            self._transport.close()

    def _finish(self) -> None:
        if not self._over.done():
            self._over.set_result(None)
        self._wake()

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)


class Session:
    """One connection's dialogue."""

    def __init__(self, number: int, wire: Wire, server: "Server") -> None:
        self._number = number
        self._wire = wire
        self._server = server
        self._settings = server.script.settings
        self._is_greeted = False
        self._user: str | None = None
        self._mail: int | None = None
        self._sender: str | None = None
        self._is_utf8 = False
        self._recipients: list[str] = []

    async def run(self) -> None:
        """Talk until the client, or a rule, ends it."""
        if self._settings.tls == "implicit":
            await self._start_tls()
        most, greeting = self._settings.max_connections, "220 sink ESMTP"
        if most is not None and self._server.counters.open > most:
            self._server.counters.too_many += 1
            greeting = "421 4.7.0 too many connections"
        if not await self._say("banner", greeting):
            return
        while True:
            line = await self._line(self._settings.idle_seconds)
            verb, _, argument = line.decode("utf-8", "surrogateescape").partition(" ")
            command = getattr(self, f"_do_{verb.lower()}", None) if verb.isalpha() else None
            if command is None:
                await self._say("other", "502 5.5.1 command not known")
                continue
            if self._wire.buffer and "PIPELINING" not in self._settings.extensions:
                self._server.counters.note(f"pipelined after {verb}")
            await command(argument.strip())

    async def _do_ehlo(self, _: str) -> None:
        settings = self._settings
        lines = ["sink"]
        lines += [
            f"SIZE {settings.max_bytes}" if extension == "SIZE" else extension
            for extension in settings.extensions
        ]
        if self._may_start_tls:
            lines.append("STARTTLS")
        if settings.user is not None:
            lines.append(f"AUTH {' '.join(settings.mechanisms)}")
        greeting = "".join(f"250-{line}\r\n" for line in lines[:-1]) + f"250 {lines[-1]}"
        self._reset()
        self._is_greeted = await self._say("ehlo", greeting)

    async def _do_helo(self, _: str) -> None:
        self._reset()
        self._is_greeted = await self._say("ehlo", "250 sink")

    async def _do_starttls(self, argument: str) -> None:
        if not self._may_start_tls:
            await self._say("other", "502 5.5.1 command not known")
        elif argument:
            await self._say("other", "501 5.5.4 STARTTLS")
        else:
            if self._wire.buffer:
                self._server.counters.note("plain text after STARTTLS")
            if await self._say("starttls", "220 2.0.0 go ahead"):
                await self._start_tls()

    async def _do_auth(self, argument: str) -> None:
        mechanism, _, initial = argument.partition(" ")
        if self._settings.user is None:
            await self._say("other", "502 5.5.1 command not known")
        elif not self._is_greeted or self._user is not None or self._sender is not None:
            await self._say("other", "503 5.5.1 not now")
        elif self._needs_tls:
            self._server.counters.note("AUTH in plain text")
            await self._say("other", "530 5.7.0 STARTTLS first")
        elif mechanism.upper() not in self._settings.mechanisms:
            await self._say("other", "504 5.5.4 mechanism not known")
        else:
            await self._authenticate(mechanism.upper(), initial)

    async def _authenticate(self, mechanism: str, initial: str) -> None:
        try:
            if mechanism == "PLAIN":
                said = initial or await self._answer_to("")
                _, user, password = _unwrapped(said).split("\0")
            else:
                user = _unwrapped(initial or await self._answer_to("VXNlcm5hbWU6"))
                password = _unwrapped(await self._answer_to("UGFzc3dvcmQ6"))
        except ValueError:
            await self._say("other", "501 5.5.2 not readable")
            return
        is_right = (user, password) == (self._settings.user, self._settings.password)
        reply = "235 2.7.0 welcome" if is_right else "535 5.7.8 wrong user or password"
        if await self._say("auth", reply):
            self._user = user

    async def _answer_to(self, challenge: str) -> str:
        await self._say("other", f"334 {challenge}")
        return (await self._line()).decode("ascii", "replace")

    async def _do_mail(self, argument: str) -> None:
        self._mail = self._server.next_mail()
        address, parameters = _path(argument, "FROM:")
        if address is None:
            await self._say("other", "501 5.5.4 MAIL FROM:<address>")
        elif not self._is_greeted or self._sender is not None:
            await self._say("other", "503 5.5.1 not now")
        elif refusal := self._refusal(address, parameters):
            await self._say("other", refusal)
        elif await self._say("mail", "250 2.1.0 ok"):
            self._sender, self._is_utf8 = address, "SMTPUTF8" in parameters

    def _refusal(self, address: str, parameters: Sequence[str]) -> str | None:
        settings = self._settings
        if self._needs_tls:
            return "530 5.7.0 STARTTLS first"
        if settings.user is not None and self._user is None and not settings.is_auth_optional:
            return "530 5.7.0 AUTH first"
        for parameter in parameters:
            name, _, value = parameter.partition("=")
            extension = "8BITMIME" if name == "BODY" else name
            if extension not in settings.extensions:
                return f"555 5.5.4 {name} was not offered"
            if name == "SIZE" and (not value.isdecimal() or int(value) > settings.max_bytes):
                return "552 5.3.4 too large"
        return None if address.isascii() or "SMTPUTF8" in parameters else "553 5.6.7 ASCII"

    async def _do_rcpt(self, argument: str) -> None:
        address, _ = _path(argument, "TO:")
        if not address:
            await self._say("other", "501 5.5.4 RCPT TO:<address>")
        elif self._sender is None:
            await self._say("other", "503 5.5.1 MAIL first")
        elif not address.isascii() and not self._is_utf8:
            await self._say("other", "553 5.6.7 ASCII")
        elif await self._say("rcpt", "250 2.1.5 ok", [address]):
            self._recipients.append(address)

    async def _do_data(self, _: str) -> None:
        if not self._recipients:
            await self._say("other", "503 5.5.1 RCPT first")
            return
        if self._wire.buffer:
            self._server.counters.note("content before 354")
        if await self._say("data", "354 go on", self._recipients):
            await self._take_content()

    async def _do_rset(self, _: str) -> None:
        self._reset()
        await self._say("rset", "250 2.0.0 ok")

    async def _do_noop(self, _: str) -> None:
        await self._say("other", "250 2.0.0 ok")

    async def _do_quit(self, _: str) -> None:
        await self._say("quit", "221 2.0.0 bye")
        raise Dropped

    async def _take_content(self) -> None:
        buffer, limit = self._wire.buffer, self._settings.max_bytes + len(END)
        # With the line end before it, each of its lines, the last dot too, follows one.
        buffer[:0] = b"\r\n"
        forgotten = searched = 0
        while True:
            end = buffer.find(END, searched)
            if self._server.script.is_about("content"):
                received = forgotten + (len(buffer) if end < 0 else end) - 2
                await self._act("content", "", self._recipients, received_bytes=received)
            if end >= 0:
                break
            if len(buffer) > limit:
                forgotten += len(buffer) - len(END)
                del buffer[: -len(END)]
            searched = max(0, len(buffer) - len(END) + 1)
            await self._wire.more()
        stuffed = bytes(buffer[: end + 2])
        del buffer[: end + len(END)]
        await self._judge(stuffed, is_too_large=forgotten > 0)

    async def _judge(self, stuffed: bytes, *, is_too_large: bool) -> None:
        """Answer a content, dots still stuffed, with a line end before it."""
        recipients, sender = self._recipients, self._sender or ""
        self._reset()
        content = stuffed.replace(b"\r\n.", b"\r\n")[2:]
        lines = stuffed.split(b"\r\n")
        if is_too_large or len(content) > self._settings.max_bytes:
            await self._say("dot", "552 5.3.4 too large", recipients)
        elif not stuffed.count(b"\r") == stuffed.count(b"\n") == len(lines) - 1:
            self._server.counters.note("bare CR or LF in a content")
            await self._say("dot", "554 5.6.0 a line is CRLF-ended", recipients)
        elif len(max(lines, key=len)) + 2 > MAX_LINE_BYTES:
            self._server.counters.note("a line too long in a content")
            await self._say("dot", "554 5.6.0 a line is short", recipients)
        else:
            if len(recipients) > 1:
                self._server.counters.note(f"{len(recipients)} recipients")
            counters = self._server.counters
            counters.most_recipients = max(counters.most_recipients, len(recipients))
            await self._say("dot", "250 2.0.0 accepted", recipients, mail=(sender, content))

    async def _say(
        self,
        stage: Stage,
        reply: str,
        recipients: Sequence[str] = (),
        *,
        mail: tuple[str, bytes] | None = None,
    ) -> bool:
        """Answer as the rules say, else with `reply`; say whether the answer was positive.

        What is to be journaled is, before the answer, its delay or its loss; not when refused.
        """
        self._server.counters.stages[stage] += 1
        if self._server.script.is_about(stage):
            return await self._act(stage, reply, recipients, mail=mail)
        if mail is not None:
            await self._accept(recipients, mail)
        return self._reply(reply)

    async def _act(
        self,
        stage: Stage,
        reply: str,
        recipients: Sequence[str] = (),
        *,
        mail: tuple[str, bytes] | None = None,
        received_bytes: int = 0,
    ) -> bool:
        """Do what the rules say, else answer with `reply`, nothing when that is empty."""
        do: str | Action = reply
        delay_seconds = byte_seconds = 0.0
        situation = Situation(self._number, self._mail, recipients, received_bytes)
        for do_next in self._server.script.actions(stage, situation):
            match do_next:
                case Delay(seconds):
                    delay_seconds += seconds
                case Tarpit(seconds):
                    byte_seconds = seconds
                case _:
                    do = do_next
                    break
        is_positive = _is_positive(do)
        if mail is not None and is_positive:
            await self._accept(recipients, mail)
        if delay_seconds:
            await self._wire.pause(delay_seconds)
        if byte_seconds and isinstance(do, str):
            await self._drip(do, byte_seconds)
        else:
            await self._perform(do)
        return is_positive

    async def _perform(self, do: str | Action) -> None:
        match do:
            case Drop(is_reset):
                self._wire.flush()
                self._wire.close(is_reset=is_reset)
                raise Dropped
            case Silence():
                await self._wire.pause(None)
            case Raw(data, times):
                while times is None or times > 0:
                    await self._wire.send(data)
                    times = None if times is None else times - 1
            case str():
                self._reply(do)

    async def _drip(self, reply: str, seconds: float) -> None:
        for byte in f"{reply}\r\n".encode() if reply else b"":
            await self._wire.send(bytes([byte]))
            await self._wire.pause(seconds)
        if reply.startswith("421"):
            raise Dropped

    def _reply(self, text: str) -> bool:
        if text:
            self._wire.put(text)
        if text.startswith("421"):
            # RFC 5321 §3.8: who says this closes.
            raise Dropped
        return _is_positive(text)

    async def _accept(self, recipients: Sequence[str], mail: tuple[str, bytes]) -> None:
        sender, content = mail
        head = b"\r\n" + content[: content.find(b"\r\n\r\n") + 2]
        names = head.lower()
        lines = [
            Accepted(
                time.time(),
                self._number,
                recipient,
                sender,
                _header(head, names, b"message-id"),
                _header(head, names, b"x-order-id"),
                hashlib.sha256(content).hexdigest(),
                len(content),
                self._wire.is_tls,
                self._user,
            )
            for recipient in recipients
        ]
        await self._server.journal.append(lines, content)
        self._server.counters.mails += 1

    async def _line(self, within_seconds: float | None = None) -> bytes:
        """Return a line without its end; a client that breaks the rules of lines is cut off."""
        buffer = self._wire.buffer
        while (end := buffer.find(b"\n")) < 0 and len(buffer) < MAX_LINE_BYTES:
            try:
                await self._wire.more(within_seconds=within_seconds)
            except TimeoutError as error:
                self._server.counters.stages["idle"] += 1
                await self._act("idle", "")
                raise Dropped from error
        line = bytes(buffer[: end + 1])
        del buffer[: end + 1]
        if not 0 <= end < MAX_LINE_BYTES or line.find(b"\r") != end - 1:
            self._server.counters.note("a command that is too long or not ended by CRLF alone")
            await self._say("other", "500 5.5.2 a line is CRLF-ended and short")
            raise Dropped
        return line[:-2]

    @property
    def _may_start_tls(self) -> bool:
        return self._settings.tls == "starttls" and not self._wire.is_tls

    @property
    def _needs_tls(self) -> bool:
        return self._settings.is_tls_required and not self._wire.is_tls

    async def _start_tls(self) -> None:
        self._wire.hold()
        if self._server.script.is_about("tls"):
            await self._act("tls", "")
        await self._wire.start_tls(self._server.context(self._settings))
        self._server.counters.stages["tls"] += 1
        self._reset()
        self._is_greeted, self._user = False, None

    def _reset(self) -> None:
        self._sender, self._recipients, self._is_utf8 = None, [], False


class Server:
    """What the sessions share."""

    def __init__(self, script: Script, journal: Journal, certificates: Path | None) -> None:
        self.script = script
        self.journal = journal
        self.counters = Counters()
        self._certificates = certificates
        self._contexts: dict[tuple[str, bool], ssl.SSLContext] = {}
        self._connections = 0
        self._mails = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def wire(self) -> Wire:
        """Return a new connection's."""
        return Wire(self._begin, self._end)

    def next_mail(self) -> int:
        """Return the number of a mail that begins."""
        self._mails += 1
        return self._mails

    def context(self, settings: Settings) -> ssl.SSLContext:
        """Return how a connection is encrypted."""
        key = (settings.certificate, settings.is_tls_old)
        if key not in self._contexts:
            if self._certificates is None:
                raise ValueError("TLS without certificates")
            self._contexts[key] = _context(self._certificates, settings)
        return self._contexts[key]

    def answer(self, question: str) -> str:
        """Do what the parent asks, and count."""
        if question == "load":
            self.script.load(connections=self._connections, mails=self._mails)
        elif question == "forget":
            still_open = self.counters.open
            self.counters = Counters(open=still_open, most_open=still_open)
        self.counters.fired = self.script.fired
        # dataclasses.asdict breaks a Counter before Python 3.12.
        return json.dumps({each.name: getattr(self.counters, each.name) for each in COUNTED})

    def _begin(self, wire: Wire) -> None:
        self._connections += 1
        counters = self.counters
        counters.connections += 1
        counters.open += 1
        counters.most_open = max(counters.most_open, counters.open)
        talk = self._talk(Session(self._connections, wire, self), wire)
        task = asyncio.get_running_loop().create_task(talk)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _end(self) -> None:
        self.counters.open -= 1

    async def _talk(self, session: Session, wire: Wire) -> None:
        try:
            with suppress(Dropped):
                await session.run()
        finally:
            wire.close()


async def serve(
    port: int,
    script: Script,
    journal: Journal,
    *,
    host: str = HOST,
    certificates: Path | None = None,
    is_controlled: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT; when controlled, until the parent is gone too."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    server = Server(script, journal, certificates)
    listener = await loop.create_server(server.wire, host, port, backlog=1024)
    sys.stdout.write(f"listening on {host}:{listener.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    control = loop.create_task(_control(server, stop)) if is_controlled else None
    await stop.wait()
    listener.close()
    if control is not None and not control.cancel():
        # It may have ended by an error.
        await control


async def _control(server: Server, stop: asyncio.Event) -> None:
    questions = asyncio.StreamReader()
    protocol = asyncio.StreamReaderProtocol(questions)
    await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, sys.stdin)
    try:
        while question := await questions.readline():
            sys.stdout.write(f"{server.answer(question.decode().strip())}\n")
            sys.stdout.flush()
    finally:
        stop.set()


def _context(certificates: Path, settings: Settings) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / f"{settings.certificate}.pem", certificates / "key.pem")
    if settings.is_tls_old:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1
        # OpenSSL 3 has its signatures at no other level.
        context.set_ciphers("ALL:@SECLEVEL=0")
    return context


def _is_positive(do: str | Action) -> bool:
    """Say whether a command is accepted by this; no reply at all refuses nothing."""
    if isinstance(do, str):
        return do[:1] in "23"
    return isinstance(do, Delay | Tarpit) or do.is_accepted


def _expanded(do: str | Action) -> str | Action:
    if not isinstance(do, str):
        return do
    if do.startswith(DELAY):
        return Delay(float(do.removeprefix(DELAY)))
    return Drop() if do == DROP else do


def _encoded(rule: Rule) -> dict[str, Any]:
    encoded = asdict(rule)
    if not isinstance(rule.do, str):
        encoded["do"] = {"kind": type(rule.do).__name__, **asdict(rule.do)}
    if isinstance(rule.do, Raw):
        encoded["do"]["data"] = rule.do.data.decode("latin-1")
    return encoded


def _decoded(encoded: dict[str, Any]) -> Rule:
    do = encoded.pop("do")
    if isinstance(do, dict):
        if "data" in do:
            do["data"] = do["data"].encode("latin-1")
        do = ACTIONS[do.pop("kind")](**do)
    return Rule(do=do, **encoded)


def _write_all(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


def _lines(batch: Sequence[tuple[Sequence[Accepted], bytes]], start: int | None) -> Iterator[str]:
    for mails, content in batch:
        for mail in mails:
            # dataclasses.asdict copies deeply, at many times the cost.
            line = {name: getattr(mail, name) for name in JOURNALED}
            yield json.dumps({**line, "start": start}) + "\n"
        start = None if start is None else start + len(content)


def _header(head: bytes, names: bytes, name: bytes) -> str | None:
    """Return the first header of a name, unfolded; `names` is `head` in small letters."""
    start = names.find(b"\r\n%s:" % name)
    if start < 0:
        return None
    start = end = start + len(name) + 3
    while (end := head.find(b"\r\n", end)) >= 0 and head[end + 2 : end + 3] in (b" ", b"\t"):
        end += 2
    return " ".join(head[start:end].decode("utf-8", "replace").split())


def _unwrapped(text: str) -> str:
    try:
        return base64.b64decode(text, validate=True).decode()
    except binascii.Error as error:
        raise ValueError("not base64") from error


def _path(argument: str, prefix: str) -> tuple[str | None, list[str]]:
    """Return address and parameters of `FROM:<address> …`; no address when it is not that."""
    start = len(prefix) + 1
    if argument[:start].upper() != f"{prefix}<" or ">" not in argument:
        return None, []
    address, _, parameters = argument[start:].partition(">")
    return address, parameters.upper().split()


def _free_port() -> int:
    for port in random.sample(PORTS, len(PORTS)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port")


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(description="A journaled SMTP sink.")
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one")
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--contents", type=Path, help="a file to keep contents in")
    parser.add_argument("--not-durable", action="store_true", help="answer 250 without fsync")
    parser.add_argument("--delay-ms", type=float, default=0.0, help="before the 250 to each mail")
    parser.add_argument("--script", type=Path, help="settings and rules in JSON")
    parser.add_argument("--certificates", type=Path, help="a directory, for TLS")
    parser.add_argument("--control", action="store_true", help="answer questions on stdin")
    options = parser.parse_args()
    delay = [Rule("dot", Delay(options.delay_ms / 1000))] if options.delay_ms else []
    journal = Journal(
        options.journal, contents=options.contents, is_durable=not options.not_durable
    )
    asyncio.run(
        serve(
            options.port,
            Script(options.script, *delay),
            journal,
            certificates=options.certificates,
            is_controlled=options.control,
        )
    )


if __name__ == "__main__":
    main()
