"""An SMTP sink that can be believed: what it answered 250 stands in its journal, fsynced before.

    python tests/support/sink.py --port 2525 --journal sink.jsonl [--script rules.json]

A process of its own on 127.0.0.1, of the standard library alone: it runs in any of our
environments. What it does with a mail is told by rules, re-read when their file changes.
"""

import argparse
import asyncio
import hashlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from email.parser import BytesHeaderParser
from pathlib import Path
from typing import Literal, Self

Stage = Literal["banner", "ehlo", "mail", "rcpt", "data", "dot"]

HOST = "127.0.0.1"
MAX_LINE_BYTES = 1000
MAX_CONTENT_BYTES = 10 * 1024 * 1024
READ_BUFFER_BYTES = 64 * 1024
STOP_SECONDS = 10.0
# Below the range the kernel takes ports from: while the sink is down nobody else gets its port.
PORTS = range(20_000, 32_000)
EXTENSIONS = (f"SIZE {MAX_CONTENT_BYTES}", "8BITMIME", "SMTPUTF8")
DROP = "drop"
DELAY = "delay:"


@dataclass(frozen=True, slots=True)
class Accepted:
    """One recipient of one mail that was answered 250, or would have been but for a drop."""

    at: float
    connection: int
    recipient: str
    sender: str
    message_id: str | None
    order_id: str | None
    sha256: str


@dataclass(frozen=True, slots=True)
class Rule:
    """What happens at a stage: a reply ("451 4.7.1 later"), "drop", or "delay:SECONDS".

    Rules are tried in order. A delay goes on with the next rule, a reply or a drop ends the search.
    `to` limits a rule to recipients that contain it, from the stage rcpt on; `times` to its first
    uses. At the dot a drop journals the mail first: accepted, and the answer lost. After a 421 the
    connection is closed.
    """

    stage: Stage
    do: str
    to: str = ""
    times: int | None = None


def accepted(journal: Path) -> list[Accepted]:
    """Return what stands in a journal; a last line that was torn was never answered 250."""
    if not journal.exists():
        return []
    whole = journal.read_bytes().rpartition(b"\n")[0]
    return [Accepted(**json.loads(line)) for line in whole.splitlines()]


class Sink:
    """A sink process for tests; it keeps port, journal and rules over a restart."""

    def __init__(self, directory: Path, *, port: int | None = None) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.port = port or _free_port()
        self.journal = directory / "sink.jsonl"
        self._rules = directory / "sink-rules.json"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        """Start it."""
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop it, unless that was done."""
        self.stop()

    def start(self) -> None:
        """Start the process and return when it answers."""
        command = [sys.executable, __file__, "--port", str(self.port)]
        command += ["--journal", str(self.journal), "--script", str(self._rules)]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
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
    def is_running(self) -> bool:
        """Whether there is a process, as far as this object started and stopped it."""
        return self._process is not None

    def forget(self) -> None:
        """Empty the journal and the rules, for another test."""
        self.script()
        if self.journal.exists():
            os.truncate(self.journal, 0)

    def script(self, *rules: Rule) -> None:
        """Replace the rules, from the next command on; counts of `times` begin anew."""
        draft = self._rules.with_suffix(".new")
        draft.write_text(json.dumps([asdict(rule) for rule in rules]), encoding="utf-8")
        draft.replace(self._rules)

    def accepted(self) -> list[Accepted]:
        """Return what the journal holds now."""
        return accepted(self.journal)


class Journal:
    """Lines that are on the disk when `append` returns."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        # What a kill tore was never answered.
        os.ftruncate(self._file, path.read_bytes().rfind(b"\n") + 1)

    def append(self, mails: Sequence[Accepted]) -> None:
        """Write a line for each and wait for the disk."""
        lines = "".join(json.dumps(asdict(mail)) + "\n" for mail in mails)
        os.write(self._file, lines.encode())
        os.fsync(self._file)


class Script:
    """The rules of a file, as it is now."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._seen: tuple[int, int] | None = None
        self._rules: list[Rule] = []
        self._uses: list[int] = []

    def rules(self, stage: Stage, recipients: Sequence[str]) -> Iterator[Rule]:
        """Yield the rules that hold at this point, each counted as used."""
        self._reload()
        uses = self._uses
        for index, rule in enumerate(self._rules):
            is_spent = rule.times is not None and uses[index] >= rule.times
            is_for_them = not rule.to or any(rule.to in recipient for recipient in recipients)
            if rule.stage == stage and is_for_them and not is_spent:
                uses[index] += 1
                yield rule

    def _reload(self) -> None:
        if self._path is None or not self._path.exists():
            return
        state = self._path.stat()
        seen = (state.st_mtime_ns, state.st_ino)
        if seen != self._seen:
            rules = [Rule(**rule) for rule in json.loads(self._path.read_text(encoding="utf-8"))]
            self._seen, self._rules, self._uses = seen, rules, [0] * len(rules)


class Dropped(Exception):
    """The connection is over, without another word."""


class Session:
    """One connection."""

    def __init__(
        self,
        number: int,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        script: Script,
        journal: Journal,
    ) -> None:
        self._number = number
        self._reader = reader
        self._writer = writer
        self._script = script
        self._journal = journal
        self._is_greeted = False
        self._sender: str | None = None
        self._recipients: list[str] = []

    async def run(self) -> None:
        """Talk until the client, or a rule, ends it."""
        if not await self._say("banner", "220 sink ESMTP"):
            return
        while line := await self._line():
            verb, _, argument = line.decode("utf-8", "surrogateescape").partition(" ")
            command = getattr(self, f"_do_{verb.lower()}", None) if verb.isalpha() else None
            if command is None:
                await self._reply("502 5.5.1 command not known")
                continue
            await command(argument.strip())

    async def _do_ehlo(self, _: str) -> None:
        lines = ["sink", *EXTENSIONS]
        greeting = "\r\n".join(f"250-{line}" for line in lines[:-1]) + f"\r\n250 {lines[-1]}"
        self._reset()
        self._is_greeted = await self._say("ehlo", greeting)

    async def _do_helo(self, _: str) -> None:
        self._reset()
        self._is_greeted = await self._say("ehlo", "250 sink")

    async def _do_mail(self, argument: str) -> None:
        address = _path(argument, "FROM:")
        if address is None:
            await self._reply("501 5.5.4 MAIL FROM:<address>")
        elif not self._is_greeted or self._sender is not None:
            await self._reply("503 5.5.1 not now")
        elif await self._say("mail", "250 2.1.0 ok"):
            self._sender = address

    async def _do_rcpt(self, argument: str) -> None:
        address = _path(argument, "TO:")
        if not address:
            await self._reply("501 5.5.4 RCPT TO:<address>")
        elif self._sender is None:
            await self._reply("503 5.5.1 MAIL first")
        elif await self._say("rcpt", "250 2.1.5 ok", [address]):
            self._recipients.append(address)

    async def _do_data(self, _: str) -> None:
        if not self._recipients:
            await self._reply("503 5.5.1 RCPT first")
        elif await self._say("data", "354 go on", self._recipients):
            await self._take_content()

    async def _do_rset(self, _: str) -> None:
        self._reset()
        await self._reply("250 2.0.0 ok")

    async def _do_noop(self, _: str) -> None:
        await self._reply("250 2.0.0 ok")

    async def _do_quit(self, _: str) -> None:
        await self._reply("221 2.0.0 bye")
        raise Dropped

    async def _take_content(self) -> None:
        lines, size = [], 0
        while (line := await self._line()) != b".":
            size += len(line) + 2
            if size <= MAX_CONTENT_BYTES:
                lines.append(line.removeprefix(b".") + b"\r\n")
        content, recipients, sender = b"".join(lines), self._recipients, self._sender or ""
        self._reset()
        if size > MAX_CONTENT_BYTES:
            await self._reply("552 5.3.4 too large")
            return
        mails = self._mails(content, sender, recipients)
        await self._say("dot", "250 2.0.0 accepted", recipients, journaled=mails)

    def _mails(self, content: bytes, sender: str, recipients: Sequence[str]) -> list[Accepted]:
        headers = BytesHeaderParser().parsebytes(content)
        names = {
            field: " ".join(str(headers[name]).split()) if name in headers else None
            for field, name in (("message_id", "Message-ID"), ("order_id", "X-Order-Id"))
        }
        digest = hashlib.sha256(content).hexdigest()
        return [
            Accepted(time.time(), self._number, recipient, sender, sha256=digest, **names)
            for recipient in recipients
        ]

    async def _say(
        self,
        stage: Stage,
        reply: str,
        recipients: Sequence[str] = (),
        *,
        journaled: Sequence[Accepted] = (),
    ) -> bool:
        """Answer as the rules say, else with `reply`; say whether the answer was positive.

        What is to be journaled is, before the answer, its delay or its loss; not when refused.
        """
        delay_seconds = 0.0
        for rule in self._script.rules(stage, recipients):
            if not rule.do.startswith(DELAY):
                reply = rule.do
                break
            delay_seconds += float(rule.do.removeprefix(DELAY))
        is_positive = reply == DROP or reply[0] in "23"
        if journaled and is_positive:
            self._journal.append(journaled)
        await asyncio.sleep(delay_seconds)
        if reply == DROP:
            raise Dropped
        await self._reply(reply)
        return is_positive

    async def _reply(self, text: str) -> None:
        self._writer.write(f"{text}\r\n".encode())
        await self._writer.drain()
        if text.startswith("421"):
            # RFC 5321 §3.8: who says this closes.
            raise Dropped

    async def _line(self) -> bytes:
        """Return a line without its end; a client that breaks the rules of lines is cut off."""
        try:
            line = await self._reader.readuntil(b"\r\n")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError) as error:
            raise Dropped from error
        line = line[:-2]
        if len(line) + 2 > MAX_LINE_BYTES or b"\n" in line or b"\r" in line:
            await self._reply("500 5.5.2 a line is CRLF-ended and short")
            raise Dropped
        return line

    def _reset(self) -> None:
        self._sender, self._recipients = None, []


async def serve(port: int, script: Script, journal: Journal, *, host: str = HOST) -> None:
    """Serve until SIGTERM or SIGINT."""
    numbers = iter(range(1, sys.maxsize))

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        session = Session(next(numbers), reader, writer, script, journal)
        try:
            await session.run()
        except (Dropped, ConnectionError):
            pass
        finally:
            writer.close()

    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = await asyncio.start_server(talk, host, port, limit=READ_BUFFER_BYTES, backlog=1024)
    sys.stdout.write(f"listening on {host}:{port}\n")
    sys.stdout.flush()
    await stop.wait()
    server.close()


def _path(argument: str, prefix: str) -> str | None:
    """Return the address in `FROM:<address> …`; None when that is not what was said."""
    is_path = argument.upper().startswith(f"{prefix}<") and ">" in argument
    return argument[len(prefix) + 1 :].partition(">")[0] if is_path else None


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
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--journal", type=Path, required=True)
    parser.add_argument("--script", type=Path, help="rules in JSON, re-read when the file changes")
    options = parser.parse_args()
    asyncio.run(serve(options.port, Script(options.script), Journal(options.journal)))


if __name__ == "__main__":
    main()
