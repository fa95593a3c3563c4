"""Faults of the API, its workers and its database, around one order (faults.toml, F-H*)."""

import json
import os
import shutil
import signal
import subprocess
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Barrier, Event
from typing import Any, Self

import httpx
import psutil
import psycopg2.errors
import pytest
from psycopg2.extensions import cursor

from deploy.embedded.ports import HOST
from deploy.embedded.postgres import Database, database_part
from deploy.embedded.services import PRODUCTS
from tests.api.wire import exchange
from tests.support.failpoint import disarm
from tests.support.order_side import OrderSide, order_ids
from tests.support.proxy import (
    HalfClose,
    Mode,
    Proxy,
    Reset,
    ResetAfter,
    Slow,
    SwallowReplies,
)
from tests.support.service import Service
from tests.support.world import order

Tokens = Sequence[str]

REPOSITORY = Path(__file__).parents[3]
ORDER_PYTHON = REPOSITORY / ".venv/order/bin/python"
PRINT_TOKENS = """
import sys
from order_service.operate.token import token
for number in range(int(sys.argv[1])):
    token.main(["--user", f"user-{number}"], standalone_mode=False)
"""
WORKERS = 2
# A worker that starts has that long to come up.
SHORT_TIMEOUT = "--timeout 6"
# Two workers of eight threads, each thread with at most one connection.
THREADS = 16
CLIENTS = 50
ORDERS = 10
# A request may try a transaction three times, and wait 2 s for a lock each time.
ANSWER_SECONDS = 30.0
IMPATIENT_SECONDS = 1.0
NEW_WORKER_SECONDS = 5.0
# A connection that was used less long ago is not asked whether it lives.
PAUSE_SECONDS = 1.0
POOL_TIMEOUT_SECONDS = 2.0
RECOVERY_SECONDS = 25.0
TRIES = 3
CIRCLES = 5
TAKE = "SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))"
# Its reply passes; where the statements are prepared already, the next message holds the COMMIT.
FIRST_MESSAGE = b"BEGIN; EXECUTE"
BROKEN = (httpx.RemoteProtocolError, httpx.ReadError)
DISK = "size=96m"
LONG_KEY_CHARACTERS = 200
MOST_ORDERS_TO_A_PAGE = 100


@dataclass(frozen=True)
class Api:
    """A running API, and what its users need to reach it."""

    service: Service
    port: int
    tokens: Tokens

    @property
    def workers(self) -> set[int]:
        """Return the process ids of gunicorn's workers."""
        return {each.pid for each in psutil.Process(self.service.pid).children()}

    @property
    def log(self) -> str:
        """Return what it has written, gunicorn's own lines too."""
        return self.service.part.command.log_path.read_text(errors="replace")

    @contextmanager
    def client(
        self, user: int = 0, *, port: int | None = None, seconds: float = ANSWER_SECONDS
    ) -> Iterator[httpx.Client]:
        """Give a connection of a user, by way of another port if there is one."""
        with httpx.Client(
            base_url=f"http://{HOST}:{port or self.port}",
            headers={"Authorization": f"Bearer {self.tokens[user]}"},
            timeout=seconds,
            # There is no TLS, and certificates would take long to read.
            verify=False,
        ) as client:
            yield client

    def place(self, key: str | None = None, *, user: int = 0) -> httpx.Response:
        """Send an order on a new connection."""
        with self.client(user) as client:
            return place(client, key)

    def place_together(self, count: int) -> list[httpx.Response]:
        """Send orders of so many users in one moment."""
        return self.together(count, place)

    def together(
        self, count: int, send: Callable[[httpx.Client], httpx.Response]
    ) -> list[httpx.Response]:
        """Let so many users send in one moment, each on a connection of its own."""
        barrier = Barrier(count)

        def wait_and_send(client: httpx.Client) -> httpx.Response:
            barrier.wait()
            return send(client)

        with ExitStack() as opened, ThreadPoolExecutor(count) as pool:
            clients = [opened.enter_context(self.client(user)) for user in range(count)]
            return list(pool.map(wait_and_send, clients))

    def request(self, key: str) -> bytes:
        """Return an order's whole request as bytes."""
        body = json.dumps(body_for(key)).encode()
        head = (
            f"POST /v1/orders HTTP/1.1\r\nHost: {HOST}\r\n"
            f"Authorization: Bearer {self.tokens[0]}\r\n"
            f"Idempotency-Key: {key}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@pytest.fixture(scope="session")
def tokens(parts: OrderSide) -> Tokens:
    """Give a token for each of many users: orders of one user wait for each other."""
    done = subprocess.run(
        [ORDER_PYTHON, "-c", PRINT_TOKENS, str(CLIENTS)],
        env=parts.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.fixture(scope="module")
def shared_api(parts: OrderSide, tokens: Tokens) -> Iterator[Api]:
    with serving(parts, tokens) as api:
        yield api


@pytest.fixture
def api(side: OrderSide, shared_api: Api) -> Api:
    """Give one API for all tests in which no failpoint acts."""
    return shared_api


@contextmanager
def serving(
    side: OrderSide,
    tokens: Tokens,
    *failpoints: str,
    workers: int = WORKERS,
    arguments: str = "",
) -> Iterator[Api]:
    """Run an API, with arguments for gunicorn; end it at once, for a graceful end takes longer."""
    port = side.ports.choose(0)
    settings = {"HTTP_PORT": str(port), "GUNICORN_CMD_ARGS": f"--workers {workers} {arguments}"}
    with side.running("api", *failpoints, **settings) as service:
        api = Api(service, port, tokens)
        # It is ready with its first worker, and gunicorn takes a breath before the next.
        side.wait_for(lambda: len(api.workers) == workers)
        yield api
        service.kill()


@pytest.mark.fault("F-H1")
def test_a_lost_answer_is_asked_for_while_the_order_is_placed(
    side: OrderSide, tokens: Tokens
) -> None:
    """Until it is placed the key is a 409 with Retry-After, then the one 201 to the byte."""
    key = str(uuid.uuid4())
    with serving(side, tokens, "http.before_commit=sleep:6000") as api, Proxy(api.port) as lossy:
        lossy.set(SwallowReplies())
        with (
            api.client(port=lossy.port, seconds=IMPATIENT_SECONDS) as impatient,
            pytest.raises(httpx.ReadTimeout),
        ):
            place(impatient, key)
        side.wait_for(lambda: api.service.hits)
        assert orders(side) == []
        early = api.place(key)
        assert early.status_code == httpx.codes.CONFLICT
        assert early.json()["type"] == "urn:order-service:problem:request-in-flight"
        reply = place_when_free(api, key, early)
        side.wait_for(lambda: lossy.swallowed["down"])
        assert is_replayed(reply)
        assert api.place(key).content == reply.content
        assert names(api) == ["http.before_commit"]
    assert_whole(side, [reply])


@pytest.mark.fault("F-H5")
def test_a_worker_killed_before_its_commit_leaves_nothing(side: OrderSide, tokens: Tokens) -> None:
    """Its client sees a reset, another worker is there in 2 s, the same key places the order."""
    key = str(uuid.uuid4())
    with serving(side, tokens, "http.before_commit=kill") as api:
        lose_worker(side, api, key)
        assert orders(side) == []
        assert_whole(side, [])
        reply = place_when_free(api, key)
        assert not is_replayed(reply)
    assert_whole(side, [reply])


@pytest.mark.fault("F-H6")
def test_a_worker_killed_after_its_commit_leaves_the_order(side: OrderSide, tokens: Tokens) -> None:
    """Its client sees a reset, another worker is there in 2 s, the same key answers the order."""
    key = str(uuid.uuid4())
    with serving(side, tokens, "http.after_commit=kill") as api:
        lose_worker(side, api, key)
        (placed,) = orders(side)
        reply = api.place(key)
        assert (reply.json()["id"], is_replayed(reply)) == (placed, True)
    assert_whole(side, [reply])


@pytest.mark.fault("F-H7")
@pytest.mark.parametrize(
    ("moment", "actions"),
    # A thread stops a moment after its process was told to: it waits for that.
    [("before_commit", ("sleep:1000", "stop")), ("after_commit", ("stop", "sleep:1000"))],
    ids=["before its commit", "after its commit"],
)
def test_a_frozen_worker_is_replaced(
    side: OrderSide, tokens: Tokens, moment: str, actions: Sequence[str]
) -> None:
    """The master kills what does not move for the time-out; the order is there, or it is not."""
    key = str(uuid.uuid4())
    failpoints = [f"http.{moment}={action}" for action in actions]
    armed = serving(side, tokens, *failpoints, arguments=SHORT_TIMEOUT)
    with armed as api, ThreadPoolExecutor() as pool:
        before = api.workers
        interrupted = pool.submit(api.place, key)
        side.wait_for(lambda: api.service.hits)
        disarm(api.service.journal)
        hit = api.service.hits[0]
        assert hit.action == "stop"
        side.wait_for(lambda: psutil.Process(hit.pid).status() == psutil.STATUS_STOPPED)
        # The other worker goes on meanwhile; what the frozen one has not undone holds the key.
        assert api.place(user=1).status_code == httpx.codes.CREATED
        meanwhile = api.place(key)
        is_placed = moment == "after_commit"
        assert meanwhile.status_code == (201 if is_placed else 409)
        with pytest.raises(BROKEN):
            interrupted.result()
        assert f"WORKER TIMEOUT (pid:{hit.pid})" in api.log
        side.wait_for(lambda: len(api.workers) == WORKERS and hit.pid not in api.workers)
        assert before - api.workers == {hit.pid}
        reply = place_when_free(api, key)
        assert is_replayed(reply) == is_placed
    assert reply.json()["id"] in orders(side)
    assert_whole(side, count=2)


@pytest.mark.fault("F-H7")
def test_a_request_longer_than_the_time_out_is_answered(side: OrderSide, tokens: Tokens) -> None:
    """The time-out is for a worker that is stuck, not for a thread that waits."""
    armed = serving(side, tokens, "http.before_commit=sleep:8500", arguments=SHORT_TIMEOUT)
    with armed as api:
        before = api.workers
        reply = api.place()
        assert names(api) == ["http.before_commit"]
        assert api.workers == before
        assert "WORKER TIMEOUT" not in api.log
    assert_whole(side, [reply])


@pytest.mark.fault("F-H8")
@pytest.mark.parametrize("is_sent", [True, False], ids=["sent", "cut off"])
def test_a_commit_without_an_answer(side: OrderSide, tokens: Tokens, is_sent: bool) -> None:  # noqa: FBT001
    """503 with Retry-After and no second try of ours; the same key says what became of it."""
    key = str(uuid.uuid4())
    one_session = serving(
        side, tokens, "http.before_commit=sleep:0", workers=1, arguments="--threads 1"
    )
    with one_session as api:
        earlier = api.place()
        resets = side.database.resets
        cut = (
            side.database.when_sent(b"COMMIT", SwallowReplies(reset_after_bytes=1))
            if is_sent
            else side.database.when_sent(FIRST_MESSAGE, ResetAfter("up", 100))
        )
        assert_unavailable(api.place(key))
        assert cut.fired == 1
        assert side.database.resets == resets + 1
        assert names(api) == 2 * ["http.before_commit"]
        assert len(orders(side)) == 1 + is_sent
        reply = place_when_free(api, key)
        assert is_replayed(reply) == is_sent
        assert len(api.service.logged("database.failed")) == 1
    assert_whole(side, [earlier, reply])


@pytest.mark.fault("F-H9")
@pytest.mark.parametrize("is_pinged", [True, False], ids=["a while ago", "just now"])
@pytest.mark.parametrize("end", ["restarted", "terminated", "reset"])
def test_connections_that_were_lost_unseen(
    side: OrderSide,
    api: Api,
    end: str,
    is_pinged: bool,  # noqa: FBT001
) -> None:
    """Every POST is a 201; a GET may be a 503 with Retry-After, where the loss is a second old."""
    placed = after_a_loss(side, api, place, end=end, is_pinged=is_pinged)
    assert set(statuses(placed)) == {201}
    read = after_a_loss(side, api, list_orders, end=end, is_pinged=is_pinged)
    note(f"GETs that met connections {end}", statuses(read))
    assert set(statuses(read)) <= ({200} if is_pinged else {200, 503})
    for refused in (
        reply for reply in read if reply.status_code == httpx.codes.SERVICE_UNAVAILABLE
    ):
        assert_unavailable(refused)
    assert statuses(api.together(THREADS, list_orders)) == {200: THREADS}
    assert {reply.json()["id"] for reply in placed} <= set(orders(side))
    assert_whole(side)


@pytest.mark.fault("F-H10")
@pytest.mark.parametrize("when", ["by its statement", "by its commit"])
@pytest.mark.parametrize("sqlstate", ["40001", "40P01"])
@pytest.mark.parametrize("failures", [1, 2, 1000])
def test_what_the_database_undid_is_tried_again(
    side: OrderSide, api: Api, sqlstate: str, when: str, failures: int
) -> None:
    """Three tries at most, and a 201 or a prompt 503 with no row; the same key is free then."""
    key = str(uuid.uuid4())
    began_at = time.monotonic()
    with refusing_orders(side, sqlstate, failures, when) as tries:
        reply = api.place(key)
        seconds = time.monotonic() - began_at
        assert tries() == min(failures + 1, TRIES)
        if failures >= TRIES:
            assert_unavailable(reply)
            assert seconds < 5
            assert_whole(side, [])
    reply = api.place(key)
    assert is_replayed(reply) == (failures < TRIES)
    assert_whole(side, [reply])


@pytest.mark.fault("F-H10")
def test_a_deadlock_is_undone_and_tried_again(side: OrderSide, api: Api) -> None:
    """Somebody else's locks, taken the other way round, close a circle: still one 201."""
    replies, has_given_way, before = [], False, deadlocks(side)
    for _ in range(CIRCLES):
        key = str(uuid.uuid4())
        with side.session() as other, other.cursor() as locks, ThreadPoolExecutor() as pool:
            locks.execute(TAKE, [f"recipient {body_for(key)['email']}"])
            waiting = pool.submit(api.place, key)
            side.wait_for(lambda: side.sql("SELECT pid FROM pg_locks WHERE NOT granted"))
            # It waits for the API, which waits for us; who waited longest looks first, and gives
            # way, unless it looked before the circle was closed.
            with suppress(psycopg2.errors.DeadlockDetected):
                locks.execute(TAKE, ["user user-0"])
                has_given_way = True
            other.rollback()
            replies.append(waiting.result())
        if has_given_way:
            break
    side.wait_for(lambda: deadlocks(side) == before + len(replies))
    assert has_given_way
    assert statuses(replies) == {201: len(replies)}
    assert_whole(side, replies)


def deadlocks(side: OrderSide) -> int:
    """Return how many the database has seen."""
    seen = "SELECT deadlocks FROM pg_stat_database WHERE datname = current_database()"
    ((count,),) = side.sql(seen)
    return int(count)


@pytest.mark.fault("F-H11")
def test_all_connections_are_taken(side: OrderSide, tokens: Tokens) -> None:
    """Where there are more threads than connections: 503 in time, alive, not ready; then whole."""
    armed = serving(side, tokens, "http.before_commit=sleep:8000", arguments="--threads 40")
    with armed as api, ThreadPoolExecutor(1) as pool:
        began_at = time.monotonic()
        sent = pool.submit(api.place_together, CLIENTS)
        # One of the two workers may have taken every client.
        side.wait_for(lambda: len(api.service.hits) >= THREADS // 2)
        assert api.service.is_live()
        side.wait_for(lambda: not api.service.is_ready())
        replies = sent.result()
        found = statuses(replies)
        note("answers while the pool is empty", found)
        for refused in (reply for reply in replies if reply.status_code != 201):
            assert_unavailable(refused)
            # Its worker's threads may all have waited once before its turn came.
            assert refused.elapsed.total_seconds() < 2 * POOL_TIMEOUT_SECONDS + 3.5
        assert found[503] > 0
        assert found.total() == CLIENTS
        assert time.monotonic() - began_at < 25
        disarm(api.service.journal)
        side.wait_for(api.service.is_ready)
        replies += api.place_together(THREADS)
    placed = [reply for reply in replies if reply.status_code == 201]
    assert len(placed) == found[201] + THREADS
    assert_whole(side, placed)


@pytest.mark.fault("F-H11")
def test_all_threads_are_taken(side: OrderSide, tokens: Tokens) -> None:
    """As it is deployed requests wait for a thread, never for a connection: all are placed."""
    with (
        serving(side, tokens, "http.before_commit=sleep:500") as api,
        ThreadPoolExecutor(1) as pool,
    ):
        sent = pool.submit(api.place_together, CLIENTS)
        side.wait_for(lambda: len(api.service.hits) >= THREADS)
        began_at = time.monotonic()
        url = f"http://{HOST}:{api.service.probe_port}/livez"
        assert httpx.get(url, timeout=ANSWER_SECONDS).status_code == httpx.codes.OK
        note("/livez while all threads are taken, s", round(time.monotonic() - began_at, 2))
        replies = sent.result()
        longest = max(reply.elapsed.total_seconds() for reply in replies)
        note("the longest of 50 POSTs that each take half a second, s", round(longest, 2))
        assert statuses(replies) == {201: CLIENTS}
        hits = sorted(hit.monotonic for hit in api.service.hits)
        # Never more at once than there are threads.
        assert all(
            later - earlier > 0.4 for earlier, later in zip(hits, hits[THREADS:], strict=False)
        )
        assert longest < 15
        assert api.service.is_live()
    assert_whole(side, replies)


@pytest.mark.fault("F-H11")
def test_the_database_takes_no_more_connections(side: OrderSide, api: Api) -> None:
    """What it lets in is placed, the others are 503 at once; with room again all are 201."""
    with superuser(side) as session:
        session.execute("ALTER ROLE order_service CONNECTION LIMIT 0")
        try:
            side.database.set(Reset())
            refused = api.place_together(THREADS)
            assert not api.service.is_ready()
            assert api.service.is_live()
            assert "too many connections for role" in side.stack.state.log("order-db").read_text()
        finally:
            session.execute("ALTER ROLE order_service CONNECTION LIMIT -1")
    assert statuses(refused) == {503: THREADS}
    for reply in refused:
        assert_unavailable(reply)
    replies = api.place_together(THREADS)
    assert statuses(replies) == {201: THREADS}
    assert_whole(side, replies)


@pytest.mark.fault("F-H12")
def test_a_crash_of_the_database_under_load(side: OrderSide, api: Api) -> None:
    """503 meanwhile and nothing worse; what was answered 201 is there, each key is one order."""
    with Shoppers(api, 6) as shoppers:
        side.wait_for(lambda: shoppers.count(201) > ORDERS)
        crashed = side.stack.part("order-db").pid
        assert crashed is not None
        crashed_at = time.monotonic()
        os.kill(crashed, signal.SIGQUIT)
        side.wait_for(lambda: shoppers.count(503))
        side.wait_for(lambda: shoppers.count(201, since=shoppers.last(503)) > ORDERS)
        recovered_at = shoppers.last(503)
    assert side.stack.part("order-db").pid != crashed
    note("the last 503 after the crash, s", round(recovered_at - crashed_at, 2))
    note("answers around the crash", shoppers.statuses)
    assert recovered_at - crashed_at < RECOVERY_SECONDS
    assert set(shoppers.statuses) <= {201, 503}
    assert max(seconds for _, _, seconds in shoppers.heard) < RECOVERY_SECONDS
    assert sorted(shoppers.order_ids) == sorted(orders(side))
    assert_whole(side)


@pytest.mark.fault("F-H13", "F-H17")
def test_a_database_put_back_to_an_older_point(side: OrderSide) -> None:
    """What is open again is read back or published again; what is gone is named, one by one."""
    published = side.add_orders(ORDERS)
    held = ("relay.after_mark=kill", "rb.after_poll=sleep:600000")
    with side.running("relay", *held, is_waited_for=False) as relay:
        assert relay.wait_for_end() == -signal.SIGKILL
    waiting = side.add_orders(ORDERS)
    with lossy_failover(side):
        later = side.add_orders(ORDERS)
        (lost,) = side.sql(
            "SELECT array_agg(id::text ORDER BY id) FROM outbox WHERE aggregateid = ANY(%s)", later
        )
        with side.running("relay") as relay:
            side.wait_until_completed()
            relay.kill()
        before = side.records()
        assert order_ids(before) == dict.fromkeys([*published, *waiting, *later], 1)
    assert side.states() == {"PUBLISHED": ORDERS, "INIT": ORDERS}
    with side.running("relay", "rb.after_poll=sleep:5000@1") as relay:
        side.wait_until_completed()
        side.wait_for(lambda: len(relay.logged("event.phantom")) == ORDERS)
        named = relay.logged("event.phantom")
        assert relay.metric("order_events_phantom_total") == ORDERS
        assert relay.metric("order_events_published_total", outcome="confirmed") == ORDERS
        assert relay.metric("order_events_lost_total", state="INIT") == 0
        assert [hit.name for hit in relay.hits] == ["rb.after_poll"]
        # It goes on.
        more = side.add_orders(1)
        side.wait_until_completed()
        relay.kill()
    assert sorted(line["event_id"] for line in named) == lost[0]
    where = {(record.partition, record.offset) for record in before if record.order_id in later}
    assert {(line["partition"], line["offset"]) for line in named} == where
    copies = order_ids(side.records())
    assert {copies[order_id] for order_id in (*published, *later, *more)} == {1}
    # A second event with the same id: the ledger knows its order.
    assert {copies[order_id] for order_id in waiting} == {2}
    assert sorted(orders(side)) == sorted([*published, *waiting, *more])


@pytest.mark.fault("F-H13")
def test_a_database_that_became_a_standby(side: OrderSide, api: Api) -> None:
    """It can be read and not written: 503 with Retry-After and not ready; then the same key."""
    key = str(uuid.uuid4())
    with superuser(side) as session:
        session.execute("ALTER DATABASE order_service SET default_transaction_read_only = on")
        side.database.set(Reset())
        try:
            refused, is_ready = api.place(key), api.service.is_ready()
            assert api.service.logged("database.failed")[-1]["sqlstate"] == "25006"
        finally:
            session.execute("ALTER DATABASE order_service RESET default_transaction_read_only")
            side.database.set(Reset())
    assert not is_replayed(api.place(key))
    assert_unavailable(refused)
    assert not is_ready


@pytest.mark.fault("F-H14")
def test_a_full_disk(side: OrderSide, tokens: Tokens) -> None:
    """503 with Retry-After and nothing half stored; with room again the same key is an order."""
    with on_a_small_disk(side) as (small, disk), serving(small, tokens) as api:
        replies = [api.place(long_key())]
        ballast = fill(disk)
        with api.client() as client:
            # A page that exists has room for some.
            for _ in range(MOST_ORDERS_TO_A_PAGE):
                key = long_key()
                reply = place(client, key)
                if reply.status_code != httpx.codes.CREATED:
                    break
                replies.append(reply)
        note("orders placed on a full disk before one was refused", len(replies) - 1)
        assert_unavailable(reply)
        assert {line["sqlstate"] for line in api.service.logged("database.failed")} == {"53100"}
        assert_whole(small, replies)
        assert api.service.is_live()
        ballast.unlink()
        replies.append(api.place(key))
        assert not is_replayed(replies[-1])
        assert_whole(small, replies)


@pytest.mark.fault("F-H16")
def test_a_request_in_slices_is_an_order(side: OrderSide, api: Api) -> None:
    """However slowly head, body and answer trickle, it is one whole order."""
    with Proxy(api.port) as slow:
        slow.set(Slow(slice_bytes=16, pause_seconds=0.01))
        with api.client(port=slow.port) as client:
            replies = [place(client), place(client)]
        # In slices of 16 bytes that many pauses were made.
        least_seconds = len(api.request("")) / 16 * 0.01
        assert all(reply.elapsed.total_seconds() > least_seconds for reply in replies)
        assert slow.accepted == 1
    assert_whole(side, replies)


@pytest.mark.fault("F-H16")
@pytest.mark.parametrize("end", ["reset", "closed"])
def test_half_a_request_is_no_order(side: OrderSide, api: Api, end: str) -> None:
    """Cut off in its head, at its end, in its body, or before the last byte: its key is free."""
    for fraction in (0.0, 0.5, 1.0):
        for part in ("head", "body"):
            key = str(uuid.uuid4())
            request = api.request(key)
            head_bytes = request.index(b"\r\n\r\n") + 4
            begin, stop = (1, head_bytes) if part == "head" else (head_bytes + 1, len(request) - 1)
            size = begin + int(fraction * (stop - begin))
            before = orders(side)
            with Proxy(api.port) as cut:
                if end == "reset":
                    cut.set(ResetAfter("up", size))
                pieces = [request] if end == "reset" else [request[:size]]
                reply = exchange((HOST, cut.port), pieces, half=end == "closed")
                # A body that ends too early is no JSON.
                assert reply.status in (0, 400)
                assert cut.carried["up"] == size
                assert cut.resets == (end == "reset")
            # Until it is placed anew there is nothing.
            assert orders(side) == before
            assert not is_replayed(place_when_free(api, key))
    assert_whole(side, count=6)


@pytest.mark.fault("F-H16")
@pytest.mark.parametrize(
    "mode", [ResetAfter("down", 1), HalfClose("down")], ids=["reset", "closed"]
)
def test_a_kept_connection_that_ends_with_the_answer(side: OrderSide, api: Api, mode: Mode) -> None:
    """The second order of the connection is whole, though its client hears nothing."""
    key = str(uuid.uuid4())
    with Proxy(api.port) as cut, api.client(port=cut.port) as client:
        replies = [place(client)]
        cut.when_sent(key.encode(), mode)
        with pytest.raises(BROKEN):
            place(client, key)
        assert (cut.accepted, cut.triggers[0].fired) == (1, 1)
        side.wait_for(lambda: cut.resets or cut.swallowed["down"])
        replies.append(place_when_free(api, key))
        assert is_replayed(replies[-1])
    assert_whole(side, replies)


@pytest.mark.fault("F-H18")
def test_an_api_loaded_before_the_fork(side: OrderSide, shared_api: Api, tokens: Tokens) -> None:
    """With --preload the workers share no connection with the master or each other, none hangs."""
    with serving(side, tokens, arguments="--preload") as api:
        replies: list[httpx.Response] = []
        links: list[set[int]] = [set()]
        # One worker may take all the clients that come together.
        while not all(links) and len(replies) < 5 * CLIENTS:
            replies += api.place_together(CLIENTS)
            links = [links_to(side.database.port, worker) for worker in api.workers]
        note("connections of each worker", [len(each) for each in links])
        assert statuses(replies) == {201: len(replies)}
        assert all(links)
        assert not links[0] & links[1]
        assert not links_to(side.database.port, api.service.pid)
        # It was loaded by the master.
        assert has_loaded_driver(api.service.pid)
        assert not has_loaded_driver(shared_api.service.pid)
        placed = api.service.metric("order_orders_placed_total", outcome="placed")
        assert placed == len(replies)
        # A worker that is forked later is as good.
        killed = min(api.workers)
        os.kill(killed, signal.SIGKILL)
        side.wait_for(lambda: killed not in api.workers and len(api.workers) == WORKERS)
        replies += api.place_together(CLIENTS)
    assert statuses(replies) == {201: len(replies)}
    assert_whole(side, replies)


class Shoppers:
    """Users who order without a pause; a key that was refused is sent again until it is a 201."""

    def __init__(self, api: Api, count: int) -> None:
        self.heard: list[tuple[float, int, float]] = []
        self.order_ids: list[str] = []
        self._api = api
        self._stop = Event()
        self._pool = ThreadPoolExecutor(count)
        self._shopping = [self._pool.submit(self._shop, user) for user in range(count)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Let each finish its order; raise what went wrong."""
        self._stop.set()
        for each in self._shopping:
            each.result(ANSWER_SECONDS)
        self._pool.shutdown()

    @property
    def statuses(self) -> Counter[int]:
        """Return how often there was each status."""
        return Counter(status for _, status, _ in list(self.heard))

    def count(self, wanted: int, *, since: float = 0.0) -> int:
        """Return how often there was this status."""
        return sum(status == wanted and at > since for at, status, _ in list(self.heard))

    def last(self, wanted: int) -> float:
        """Return when there was this status for the last time."""
        return max(at for at, status, _ in list(self.heard) if status == wanted)

    def _shop(self, user: int) -> None:
        with self._api.client(user) as client:
            while not self._stop.is_set():
                key = str(uuid.uuid4())
                while (reply := place(client, key)).status_code != httpx.codes.CREATED:
                    self._note(reply)
                    time.sleep(0.1)
                self._note(reply)
                self.order_ids.append(reply.json()["id"])

    def _note(self, reply: httpx.Response) -> None:
        now, seconds = time.monotonic(), reply.elapsed.total_seconds()
        self.heard.append((now, reply.status_code, seconds))


def note(what: str, figure: object) -> None:
    """Print a figure; `pytest -s` shows it."""
    print(f"{what}: {figure}")  # noqa: T201


def place(client: httpx.Client, key: str | None = None) -> httpx.Response:
    """Send an order with this key, else one of its own."""
    key = key or str(uuid.uuid4())
    headers = {"Idempotency-Key": key}
    return client.post("/v1/orders", json=body_for(key), headers=headers)


def body_for(key: str) -> dict[str, Any]:
    """Return the order of a key; it goes to a recipient of its own."""
    return order(email=f"{key[:8]}@example.com")


def list_orders(client: httpx.Client) -> httpx.Response:
    """Ask for the first page of orders."""
    return client.get("/v1/orders")


def place_when_free(api: Api, key: str, reply: httpx.Response | None = None) -> httpx.Response:
    """Send an order again, as Retry-After has it, for as long as its key is in use."""
    deadline = time.monotonic() + ANSWER_SECONDS
    reply = reply or api.place(key)
    while reply.status_code == httpx.codes.CONFLICT:
        assert time.monotonic() < deadline
        time.sleep(int(reply.headers["Retry-After"]))
        reply = api.place(key)
    assert reply.status_code == httpx.codes.CREATED, reply.text
    return reply


def is_replayed(reply: httpx.Response) -> bool:
    """Say whether a 201 is the answer to an earlier request."""
    assert reply.status_code == httpx.codes.CREATED, reply.text
    return reply.headers.get("Idempotent-Replayed") == "true"


def statuses(replies: Sequence[httpx.Response]) -> Counter[int]:
    """Return how often there is each status."""
    return Counter(reply.status_code for reply in replies)


def names(api: Api) -> list[str]:
    """Return which failpoints acted, in their order."""
    return [hit.name for hit in api.service.hits]


def assert_unavailable(reply: httpx.Response) -> None:
    """Check that it is a 503 that says when to come again."""
    assert reply.status_code == httpx.codes.SERVICE_UNAVAILABLE, reply.text
    assert int(reply.headers["Retry-After"]) >= 1
    assert reply.json()["type"] == "urn:order-service:problem:temporarily-unavailable"


def orders(side: OrderSide) -> list[str]:
    """Return the ids of the orders that are stored."""
    return [order_id for (order_id,) in side.sql("SELECT id::text FROM orders")]


def assert_whole(
    side: OrderSide, replies: Sequence[httpx.Response] | None = None, *, count: int | None = None
) -> None:
    """Each order has its items, one event and one key, and nothing else is stored.

    With replies their orders are those that are stored, one for each.
    """
    placed = sorted(orders(side))
    for column in (
        "SELECT DISTINCT order_id::text FROM order_items",
        "SELECT aggregateid FROM outbox",
        "SELECT order_id::text FROM idempotency_keys",
    ):
        assert sorted(order_id for (order_id,) in side.sql(column)) == placed, column
    if replies is not None:
        assert sorted(reply.json()["id"] for reply in replies) == placed
    if count is not None:
        assert len(placed) == count


def lose_worker(side: OrderSide, api: Api, key: str) -> None:
    """Send an order to a worker that a failpoint kills, and see another one in its place."""
    before = api.workers
    with pytest.raises(BROKEN):
        api.place(key)
    (hit,) = api.service.hits
    disarm(api.service.journal)
    assert hit.action == "kill"
    assert len(before) == WORKERS
    assert hit.pid in before
    side.wait_for(lambda: hit.pid not in api.workers and len(api.workers) == WORKERS)
    seconds = time.monotonic() - hit.monotonic
    note("another worker after, s", round(seconds, 2))
    assert seconds < NEW_WORKER_SECONDS


def after_a_loss(
    side: OrderSide,
    api: Api,
    send: Callable[[httpx.Client], httpx.Response],
    *,
    end: str,
    is_pinged: bool,
) -> list[httpx.Response]:
    """Fill the pools, lose all their connections, and send as many requests at once.

    Those that are pinged come later than a second after the last use; the others earlier: on a
    machine too busy for that it is done again.
    """
    replies: list[httpx.Response] = []
    for _ in range(10):
        assert statuses(api.place_together(THREADS)) == {201: THREADS}
        used_at = time.monotonic()
        lost = lose_connections(side, end)
        if is_pinged:
            time.sleep(PAUSE_SECONDS + 0.1)
        accepted = side.database.accepted
        replies += api.together(THREADS, send)
        assert len(lost) >= WORKERS
        assert side.database.accepted > accepted
        assert not lost & sessions(side)
        if is_pinged or time.monotonic() - used_at < PAUSE_SECONDS:
            return replies
    raise AssertionError("never sooner than a second")


def lose_connections(side: OrderSide, end: str) -> set[int]:
    """End all sessions but our own; return the process ids of their servers."""
    lost = sessions(side)
    match end:
        case "restarted":
            earlier = side.stack.part("order-db").pid
            side.stack.stop("order-db")
            side.stack.start("order-db")
            assert side.stack.part("order-db").pid != earlier
        case "terminated":
            side.sql("SELECT pg_terminate_backend(pid) FROM unnest(%s) AS pid", list(lost))
            side.wait_for(lambda: not lost & sessions(side))
        case "reset":
            resets = side.database.resets
            side.database.set(Reset())
            assert side.database.resets > resets
            side.wait_for(lambda: not lost & sessions(side))
    return lost


def sessions(side: OrderSide) -> set[int]:
    """Return the process ids of all sessions' servers but our own's."""
    found = side.sql(
        "SELECT pid FROM pg_stat_activity"
        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
    )
    return {pid for (pid,) in found}


@contextmanager
def superuser(side: OrderSide) -> Iterator[cursor]:
    """Give a session of whom no limit holds."""
    database = Database(side.stack.state, "order-db", "order_service", side.database.target or 0)
    with database.connect() as opened, opened.cursor() as session:
        yield session


@contextmanager
def refusing_orders(
    side: OrderSide, sqlstate: str, failures: int, when: str
) -> Iterator[Callable[[], int]]:
    """Have the database undo the first transactions with an order; give how many were tried."""
    deferred = "DEFERRABLE INITIALLY DEFERRED" if when == "by its commit" else ""
    # A sequence remembers what was undone.
    side.sql(
        "CREATE SEQUENCE tries; SELECT setval('tries', 1, false);"
        " CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN"
        f" IF nextval('tries') <= {failures} THEN"
        f" RAISE EXCEPTION 'again' USING ERRCODE = '{sqlstate}'; END IF; RETURN NULL; END $$;"
        f" CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON orders {deferred}"
        " FOR EACH ROW EXECUTE FUNCTION refuse()"
    )
    try:
        yield lambda: int(side.sql("SELECT last_value FROM tries WHERE is_called")[0][0])
    finally:
        side.sql("DROP TRIGGER refuse ON orders; DROP FUNCTION refuse; DROP SEQUENCE tries")


@contextmanager
def lossy_failover(side: OrderSide) -> Iterator[None]:
    """Keep the data as they are now, and go on with those when the block ends."""
    home = side.stack.state.data("order-db")
    copy = home.with_name("order-db-earlier")
    side.stack.stop("order-db")
    subprocess.run(["cp", "-a", home, copy], check=True)
    side.stack.start("order-db")
    try:
        yield
    finally:
        side.stack.stop("order-db")
        shutil.rmtree(home)
        copy.rename(home)
        side.stack.start("order-db")


@contextmanager
def on_a_small_disk(side: OrderSide) -> Iterator[tuple[OrderSide, Path]]:
    """Give the service's side on a database of its own, and the disk, of 96 MB, that this is on."""
    name, state = "order-db-on-a-small-disk", side.stack.state
    disk = state.data(name)
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", DISK, "small", disk], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        disk.rmdir()
        pytest.skip(f"no disk can be mounted: {mounted.stderr.decode().strip()}")
    try:
        database = Database(state, name, "order_service", side.ports.choose(0))
        side.stack.add(database_part(database))
        side.stack.start(name)
        small = replace(
            side,
            addresses=replace(side.addresses, order_database_url=database.url),
            environment={**side.environment, "DATABASE_URL": database.url},
            # Its services' logs are not those of others.
            _started=1000,
        )
        small.command("migrate")
        small.command("products", "load", str(PRODUCTS))
        yield small, disk
    finally:
        side.stack.stop(name)
        subprocess.run(["umount", disk], check=True)


def fill(disk: Path) -> Path:
    """Fill a disk to its last byte; return the file that does."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))
    assert shutil.disk_usage(disk).free == 0
    return ballast


def long_key() -> str:
    """Return a key of its own that takes room."""
    return str(uuid.uuid4()).ljust(LONG_KEY_CHARACTERS, "x")


def has_loaded_driver(pid: int) -> bool:
    """Say whether a process has loaded what speaks with PostgreSQL."""
    return any("_psycopg" in each.path for each in psutil.Process(pid).memory_maps())


def links_to(port: int, pid: int) -> set[int]:
    """Return the local ports of a process's connections to this port."""
    return {
        each.laddr.port
        for each in psutil.Process(pid).net_connections("tcp")
        if each.raddr and each.raddr.port == port
    }
