"""A running stack's ear: second terminals ask for verbs, one JSON line each way."""

import contextlib
import hmac
import json
import re
import secrets
import socketserver
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from deploy.embedded.errors import StackError, StoppingError, WrongUsageError
from deploy.embedded.ports import HOST, Ports
from deploy.embedded.services import Pair, add_replica, replica
from deploy.embedded.stack import Stack

REPLICA = re.compile(r"mail-\d+")
MOST_REPLICAS = 16
REQUEST_SECONDS = 10.0
LONGEST_REQUEST = 10_000
# How long a change waits for the one before it, and the end of the stack for the last one.
TURN_SECONDS = 60.0
END_SECONDS = 90.0
POLL_SECONDS = 0.1

Message = dict[str, Any]


class Control:
    """What second terminals may ask of the running pair; one change at a time."""

    def __init__(
        self, stack: Stack, ports: Ports, pair: Pair, addresses: Mapping[str, str]
    ) -> None:
        """Listen to nobody yet."""
        self._stack = stack
        self._ports = ports
        self._pair = pair
        self._addresses = dict(addresses)
        self._turn = threading.Lock()
        self._doing = ""
        self._is_ending = False

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Answer until the block ends; then the note of where is gone and no change goes on."""
        note = self._stack.state.control
        # New each time: whoever takes the port of a killed run is told one that opens nothing.
        secret = secrets.token_urlsafe(24)
        with _Server(self, secret) as server:
            note.touch(mode=0o600)
            note.write_text(json.dumps({"port": server.server_address[1], "secret": secret}))
            serve = {"poll_interval": POLL_SECONDS}
            threading.Thread(target=server.serve_forever, kwargs=serve, daemon=True).start()
            try:
                yield
            finally:
                note.unlink(missing_ok=True)
                server.shutdown()
                self._end()

    def answer(self, request: Message) -> Message:
        """Do what is asked and return the answer; raise StackError when it cannot be done."""
        match request:
            case {"verb": "ps"}:
                return {"parts": self._parts()}
            case {"verb": "addresses"}:
                return {"addresses": self._addresses}
            case {"verb": "start" | "stop" | "kill" as verb, "parts": [*names]}:
                return {"done": self._change(verb, names)}
            case {"verb": "scale", "part": str(part), "count": int(count)}:
                return {"done": self._scale(part, count)}
        raise WrongUsageError("the stack does not know this request")

    def _parts(self) -> list[Message]:
        # In this order: what is added meanwhile has a phase, too.
        parts, phases = self._stack.parts, self._stack.phases
        return [
            {
                "name": part.name,
                "phase": phases[part.name].value,
                "pid": part.pid if part.is_running else None,
                "age_seconds": part.age_seconds,
            }
            for part in parts
        ]

    def _change(self, verb: str, names: Sequence[str]) -> list[str]:
        parts = [self._stack.part(name) for name in names]
        with self._turn_for(f"{verb} {' '.join(names)}"):
            if verb == "start":
                self._stack.start(*names)
            elif verb == "stop":
                self._stop(names)
            else:
                if ended := [part.name for part in parts if not part.is_running]:
                    raise StackError(f"not running: {', '.join(ended)}")
                for name in names:
                    self._stack.kill(name)
        return list(names)

    def _scale(self, part: str, count: int) -> list[str]:
        if part != "mail":
            raise WrongUsageError(f"{part} cannot be scaled, only mail can")
        if not 0 <= count <= MOST_REPLICAS:
            raise WrongUsageError(f"mail={count}: from 0 to {MOST_REPLICAS}")
        with self._turn_for(f"scale mail={count}"):
            wanted = [replica(number) for number in range(1, count + 1)]
            there = [part.name for part in self._stack.parts if REPLICA.fullmatch(part.name)]
            for number, name in enumerate(wanted, start=1):
                if name not in there:
                    add_replica(self._stack, self._ports, self._pair, number)
            if wanted:
                self._stack.start(*wanted)
            self._stop([name for name in there if name not in wanted])
        return wanted

    def _stop(self, names: Sequence[str]) -> None:
        # Together: a replica awaits its last answers before it leaves.
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._stack.stop, names))

    @contextlib.contextmanager
    def _turn_for(self, what: str) -> Iterator[None]:
        if not self._turn.acquire(timeout=TURN_SECONDS):
            raise StackError(f"the stack is busy for over {TURN_SECONDS:g} s: {self._doing}")
        try:
            if self._is_ending:
                raise StoppingError("the stack is stopping")
            self._doing = what
            yield
        finally:
            self._turn.release()

    def _end(self) -> None:
        self._is_ending = True
        self._stack.give_up()
        if self._turn.acquire(timeout=END_SECONDS):
            self._turn.release()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, control: Control, secret: str) -> None:
        super().__init__((HOST, 0), _Conversation)
        self._control = control
        self._secret = secret.encode()

    def answer(self, line: bytes) -> Message:
        """Answer a request as it came."""
        try:
            match json.loads(line):
                case {"secret": str(secret), "request": dict(request)} if self._knows(secret):
                    return self._control.answer(request)
                case _:
                    return {"error": "the stack does not know this secret"}
        except WrongUsageError as error:
            return {"error": str(error), "is_usage": True}
        except (StackError, OSError, ValueError) as error:
            return {"error": str(error)}

    def _knows(self, secret: str) -> bool:
        return hmac.compare_digest(secret.encode(), self._secret)


class _Conversation(socketserver.StreamRequestHandler):
    """One request and its answer."""

    server: _Server
    timeout = REQUEST_SECONDS

    def handle(self) -> None:
        """Answer; whoever says nothing or does not listen is left alone."""
        with contextlib.suppress(OSError):
            answer = self.server.answer(self.rfile.readline(LONGEST_REQUEST))
            self.wfile.write(json.dumps(answer).encode() + b"\n")
