"""The load: kept connections, one request at a time on each, in a process that does little else.

It reads a Job as JSON from standard input and writes a Sample to standard output. All requests
are bytes before the clock starts.
"""

import itertools
import json
import selectors
import socket
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

HOST = "127.0.0.1"
CONNECTIONS = 16
SILENCE_SECONDS = 10.0
RECEIVED_BYTES = 65_536
CREATED = b"HTTP/1.1 201 "


@dataclass(frozen=True)
class Job:
    """What to send where: `requests` orders, by the users of these tokens in turn."""

    port: int
    path: str
    requests: int
    tokens: Sequence[str]


@dataclass(frozen=True)
class Sample:
    """What was measured from outside, and the CPU time that the load took itself."""

    requests_per_second: float
    p50_ms: float
    p99_ms: float
    load_cpu_ms: float


class Refused(Exception):
    """An answer was not 201, or none came."""


def run(job: Job) -> Sample:
    """Send everything; raise Refused at the first answer that is not 201."""
    requests = [_request(job, number) for number in range(job.requests)]
    cpu_began, began = time.process_time(), time.perf_counter()
    latencies = sorted(_exchange(job.port, requests))
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return Sample(
        requests_per_second=len(latencies) / seconds,
        p50_ms=1_000 * latencies[len(latencies) // 2],
        p99_ms=1_000 * latencies[len(latencies) * 99 // 100],
        load_cpu_ms=1_000 * cpu_seconds / len(latencies),
    )


def _request(job: Job, number: int) -> bytes:
    order = {
        "email": f"customer-{uuid.uuid4().hex}@example.com",
        "locale": "ko",
        "items": [
            {"sku": "TEA-GREEN-50", "quantity": 2},
            {"sku": "CUP-WHITE", "quantity": 1},
            {"sku": "TEA-BARLEY-100", "quantity": 1},
        ],
    }
    body = json.dumps(order, separators=(",", ":"))
    head = (
        f"POST {job.path} HTTP/1.1\r\nHost: {HOST}:{job.port}\r\n"
        f"Authorization: Bearer {job.tokens[number % len(job.tokens)]}\r\n"
        f'Idempotency-Key: "{uuid.uuid4()}"\r\n'
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return (head + body).encode()


def _exchange(port: int, requests: Sequence[bytes]) -> Iterator[float]:
    """Keep every connection busy until all is answered; give the seconds each answer took."""
    waiting = iter(requests)
    sent_at: dict[socket.socket, float] = {}
    received: dict[socket.socket, bytes] = {}
    with selectors.DefaultSelector() as selector:
        for request in itertools.islice(waiting, CONNECTIONS):
            connection = socket.create_connection((HOST, port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            selector.register(connection, selectors.EVENT_READ)
            sent_at[connection], received[connection] = time.perf_counter(), b""
            connection.sendall(request)
        while sent_at:
            ready = selector.select(SILENCE_SECONDS)
            if not ready:
                raise Refused(f"no answer within {SILENCE_SECONDS:g} s")
            for key, _ in ready:
                answering = key.fileobj
                assert isinstance(answering, socket.socket)
                received[answering] += answering.recv(RECEIVED_BYTES)
                if not _is_whole(received[answering]):
                    continue
                yield time.perf_counter() - sent_at.pop(answering)
                received[answering] = b""
                if following := next(waiting, None):
                    sent_at[answering] = time.perf_counter()
                    answering.sendall(following)
                else:
                    selector.unregister(answering)
                    answering.close()


def _is_whole(answer: bytes) -> bool:
    """Say whether the answer has come with its whole body."""
    if not answer.startswith(CREATED):
        raise Refused(answer.decode(errors="replace") or "the connection was closed")
    head, _, body = answer.partition(b"\r\n\r\n")
    _, _, rest = head.lower().partition(b"content-length:")
    return len(body) == int(rest.partition(b"\r\n")[0] or -1)


if __name__ == "__main__":
    json.dump(asdict(run(Job(**json.load(sys.stdin)))), sys.stdout)
