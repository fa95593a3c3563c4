"""A customer's address, out of everything the order service keeps."""

import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from confluent_kafka import Message
from flask import Flask
from jsonschema import Draft202012Validator, FormatChecker
from sqlalchemy import Connection, Engine, text

from order_service import kafka, personal
from order_service.events import ERASED_ADDRESS
from order_service.kafka import TOPIC_SETTINGS, Topic
from order_service.operate.output import (
    EXIT_FAILED,
    EXIT_FOUND,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
)
from order_service.readback import ReadBack

COMMAND = Path(sys.executable).with_name("order-service")
OPENAPI = Path(__file__).parents[2] / "openapi.json"
CANARY = "canary.hana@example.com"
MASKED_CANARY = "c***@e***"
OTHER = "minji@example.com"
NOBODY = "127.0.0.1:1"
ITEMS = [{"sku": "TEA-GREEN-50", "quantity": 2}]
ADDRESS_IS_IN = {
    "orders",
    "outbox",
    "orders samples",
    "orders_recipient samples",
    "outbox samples",
}
STATES = ("INIT", "PUBLISHED", "COMPLETED", "FAILED")
KEPT = timedelta(
    milliseconds=int(TOPIC_SETTINGS["retention.ms"]) + int(TOPIC_SETTINGS["segment.ms"])
)
MANY = 3_000
STOP_SECONDS = 30.0
INTERRUPTIONS = 3

Query = Callable[..., Any]
Run = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., "subprocess.Popen[str]"]
WaitUntil = Callable[..., Any]
Post = Callable[..., Any]
Place = Callable[..., str]

# As the API writes them, many at once.
_PLACE_MANY = """
    WITH placed AS (
        INSERT INTO orders (id, user_id, email, locale, currency, amount, ordered_at)
        SELECT gen_random_uuid(), 'hana', :email, 'ko', 'KRW', 24000, now()
          FROM generate_series(1, :count)
        RETURNING *
    ), events AS (
        INSERT INTO outbox (id, aggregatetype, aggregateid, type, payload, headers, occurred_at)
        SELECT event.id, 'order', placed.id::text, 'order.created.v1',
               convert_to(
                   json_build_object('orderId', placed.id, 'userId', 'hana', 'amount', '24000',
                                     'email', :email)::text, 'UTF8'),
               json_build_object('ce_source', '/order-service', 'ce_id', event.id,
                                 'ce_subject', placed.id),
               now()
          FROM placed, LATERAL (SELECT gen_random_uuid() AS id WHERE placed.id IS NOT NULL) AS event
    )
    INSERT INTO idempotency_keys (principal, operation, key, fingerprint, order_id)
    SELECT 'hana', 'POST /v1/orders', id::text, sha256(:email), id FROM placed
"""

# Whatever a dump would hold; of bytes also what they say.
_ALL_ROWS = """
    SELECT format($$ SELECT '%1$s', t::text %2$s FROM %1$I AS t $$, table_name,
                  string_agg(format($$ || ' ' || encode(%I, 'escape') $$, column_name), '')
                      FILTER (WHERE data_type = 'bytea'))
      FROM information_schema.columns WHERE table_schema = 'public'
     GROUP BY table_name
"""
_SAMPLES = """
    SELECT tablename || ' samples', concat(most_common_vals, ' ', histogram_bounds)
      FROM pg_stats WHERE schemaname = 'public'
"""


@pytest.fixture
def where_kept(query: Query) -> Callable[[str], set[str]]:
    """Give a function that tells which tables of the database have an address, in any case.

    The planner's samples of a table count too.
    """

    def search(address: str) -> set[str]:
        statements = [row[0] for row in query(_ALL_ROWS)]
        assert len(statements) == 7
        found = [*query(" UNION ALL ".join(statements)), *query(_SAMPLES)]
        forms = (address.lower(), address.lower().encode().hex())
        return {place for place, kept in found if any(form in kept.lower() for form in forms)}

    return search


@pytest.fixture
def post(app: Flask, bearer: Callable[[str], dict[str, str]]) -> Post:
    """Give a function that posts an order."""

    def send(email: str = CANARY, *, user: str = "hana", key: str) -> Any:
        body = {"email": email, "items": ITEMS}
        headers = {**bearer(user), "Idempotency-Key": key}
        return app.test_client().post("/v1/orders", json=body, headers=headers)

    return send


@pytest.fixture
def place(post: Post, query: Query) -> Place:
    """Give a function that places an order, gives its event a state, and returns its id."""

    def one(email: str = CANARY, *, user: str = "hana", **columns: Any) -> str:
        placed = post(email, user=user, key=str(uuid4()))
        assert placed.status_code == 201
        order_id: str = placed.get_json()["id"]
        for name, value in columns.items():
            query(
                f"UPDATE outbox SET {name} = :value WHERE aggregateid = :order_id",
                value=value,
                order_id=order_id,
            )
        return order_id

    return one


@pytest.fixture
def place_many(query: Query) -> Callable[[], None]:
    """Give a function that places 3,000 orders of one customer."""
    return lambda: query(_PLACE_MANY, email=CANARY, count=MANY)


@pytest.fixture
def addresses(query: Query) -> Callable[[], dict[str, str]]:
    """Give a function that returns the address of each order."""
    return lambda: {str(row.id): row.email for row in query("SELECT id, email FROM orders")}


@pytest.fixture
def erased_count(query: Query) -> Callable[[], int]:
    """Give a function that counts the orders that were erased."""
    counted = "SELECT count(*) FROM orders WHERE email = :erased"
    return lambda: int(query(counted, erased=ERASED_ADDRESS)[0][0])


@pytest.fixture
def hold(engine: Engine) -> Iterator[Callable[[str], Connection]]:
    """Give a function by which somebody holds the event's row of an order."""
    held: list[Connection] = []

    def lock(order_id: str) -> Connection:
        connection = engine.connect()
        held.append(connection)
        statement = "SELECT FROM outbox WHERE aggregateid = :order_id FOR UPDATE"
        connection.execute(text(statement), {"order_id": order_id})
        return connection

    yield lock
    for connection in held:
        connection.close()


# What is erased


@pytest.mark.usefixtures("topic")
@pytest.mark.parametrize("state", STATES)
def test_no_table_keeps_an_address_that_was_erased(
    command: Run,
    place: Place,
    query: Query,
    where_kept: Callable[[str], set[str]],
    state: str,
) -> None:
    """Whatever the event's state: no row, no bytes and no sample of the planner has it."""
    order_id = place(state=state)
    place(OTHER)
    query("ANALYZE")
    before = where_kept(CANARY)
    done = command("erase", "--email", CANARY, "--yes")
    assert before == ADDRESS_IS_IN
    assert (done.returncode, done.stdout) == (0, f"{order_id}\n")
    assert (where_kept(CANARY), where_kept(OTHER)) == (set(), ADDRESS_IS_IN)


@pytest.mark.usefixtures("topic")
@pytest.mark.parametrize("state", STATES)
def test_an_erased_event_says_all_the_rest(
    command: Run, place: Place, query: Query, state: str
) -> None:
    """State, headers and every other byte of the payload are as they were."""
    place(state=state)
    before = query("SELECT * FROM outbox")[0]._asdict()
    command("erase", "--email", CANARY, "--yes").check_returncode()
    after = query("SELECT * FROM outbox")[0]._asdict()
    expected = bytes(before.pop("payload")).replace(CANARY.encode(), ERASED_ADDRESS.encode())
    assert (bytes(after.pop("payload")), after) == (expected, before)


def test_an_erased_event_is_published_again_and_names_nobody(
    command: Run,
    place: Place,
    publish: Callable[[], None],
    ends: Callable[[], dict[int, int]],
    records_since: Callable[[Mapping[int, int]], list[Message]],
) -> None:
    """The same key and headers, so who has it already takes it for a duplicate."""
    start = ends()
    order_id = place()
    publish()
    command("erase", order_id, "--yes").check_returncode()
    command("outbox", "republish", order_id).check_returncode()
    publish()
    first, second = records_since(start)
    assert (first.key(), first.headers()) == (second.key(), second.headers())
    assert json.loads(second.value() or b"") == json.loads(first.value() or b"") | {
        "email": ERASED_ADDRESS
    }


@pytest.mark.usefixtures("topic")
def test_the_key_of_an_erased_order_places_no_other(
    command: Run, post: Post, query: Query, where_kept: Callable[[str], set[str]]
) -> None:
    """The client that sends its order again is refused; neither order nor address comes back."""
    order_id = post(key="key-1").get_json()["id"]
    command("erase", order_id, "--yes").check_returncode()
    again = post(key="key-1")
    assert (again.status_code, again.get_json(force=True)["type"]) == (
        422,
        "urn:order-service:problem:idempotency-key-reused",
    )
    fingerprints = [bytes(row[0]) for row in query("SELECT fingerprint FROM idempotency_keys")]
    assert (len(query("SELECT FROM orders")), where_kept(CANARY), fingerprints) == (1, set(), [b""])


@pytest.mark.usefixtures("topic")
def test_the_key_of_another_order_is_good(command: Run, post: Post) -> None:
    """Of the same user: what was not erased is replayed."""
    erased = post(key="key-1").get_json()["id"]
    kept = post(OTHER, key="key-2")
    command("erase", erased, "--yes").check_returncode()
    assert post(OTHER, key="key-2").data == kept.data


@pytest.mark.usefixtures("topic")
def test_an_erased_order_is_shown_to_its_user(
    command: Run, place: Place, app: Flask, bearer: Callable[[str], dict[str, str]]
) -> None:
    """As the OpenAPI document says, alone and in the list, and else as it was."""
    order_id = place()
    asked = (f"/v1/orders/{order_id}", "/v1/orders")
    client, headers = app.test_client(), bearer("hana")
    before, _ = (client.get(path, headers=headers).get_json() for path in asked)
    command("erase", order_id, "--yes").check_returncode()
    after, page = (client.get(path, headers=headers).get_json() for path in asked)
    components = json.loads(OPENAPI.read_text("utf-8"))["components"]
    schema = {"$ref": "#/components/schemas/TrackedOrder", "components": components}
    validator = Draft202012Validator(schema, format_checker=FormatChecker())
    assert (after, page["items"]) == (before | {"email": ERASED_ADDRESS}, [after])
    assert [error.message for error in validator.iter_errors(after)] == []


# Which orders


@pytest.mark.usefixtures("topic")
@pytest.mark.parametrize(
    ("chosen", "erased"),
    [
        (("--email", CANARY), {"mine", "given"}),
        (("--email", CANARY.upper()), {"mine", "given"}),
        (("--email", "Canary.Hana@EXAMPLE.com"), {"mine", "given"}),
        (("--user", "hana"), {"mine", "bought"}),
        (("--email", CANARY, "--user", "hana"), {"mine", "given", "bought"}),
        (("{others}", "--user", "hana"), {"mine", "bought", "others"}),
        (("{others}", "{mine}", "{mine}"), {"mine", "others"}),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_orders_are_chosen_by_id_address_and_user(
    command: Run,
    place: Place,
    addresses: Callable[[], dict[str, str]],
    chosen: Sequence[str],
    erased: set[str],
) -> None:
    """What any of them chooses is erased and printed, and nothing else."""
    orders = {
        "mine": place(CANARY, user="hana"),
        "given": place(CANARY, user="minji"),
        "bought": place(OTHER, user="hana"),
        "others": place(OTHER, user="minji"),
    }
    done = command("erase", *(each.format_map(orders) for each in chosen), "--yes")
    found = {name for name, order_id in orders.items() if addresses()[order_id] == ERASED_ADDRESS}
    assert (done.returncode, found) == (0, erased)
    assert done.stdout.splitlines() == sorted(orders[name] for name in erased)


@pytest.mark.usefixtures("topic")
def test_an_address_is_found_however_it_is_typed(
    command: Run, place: Place, erased_count: Callable[[], int]
) -> None:
    """Composed or not, and with the domain's own letters or their ASCII form: as the API does."""
    place("하나@예시.kr")
    done = command("erase", "--email", "\u1112\u1161\u1102\u1161@xn--vv4b11d.kr", "--yes")
    assert (done.returncode, erased_count()) == (0, 1)


@pytest.mark.usefixtures("topic")
def test_an_address_that_is_not_taken_any_more_can_be_erased(
    command: Run, place: Place, query: Query, erased_count: Callable[[], int]
) -> None:
    """Rules for new orders may have become stricter since."""
    place()
    query("UPDATE orders SET email = 'hana@localhost'")
    done = command("erase", "--email", "Hana@localhost", "--yes")
    assert (done.returncode, erased_count()) == (0, 1)


@pytest.mark.usefixtures("topic")
def test_an_unknown_order_is_named_and_the_others_are_erased(
    command: Run, place: Place, erased_count: Callable[[], int]
) -> None:
    """Exit 1, so that nobody takes a mistyped id for an erased one."""
    order_id, unknown = place(), str(uuid4())
    done = command("erase", unknown, order_id, "--yes")
    assert (done.returncode, done.stdout, erased_count()) == (EXIT_FOUND, f"{order_id}\n", 1)
    assert f"{unknown} is not known\n" in done.stderr


@pytest.mark.parametrize("form", [(), ("--json",)], ids=["people", "script"])
def test_an_address_without_orders_is_exit_1(command: Run, form: tuple[str, ...]) -> None:
    """It may be mistyped: who has to erase it must not take that for done."""
    done = command("erase", "--email", CANARY, "--yes", *form)
    nothing = '{"order_ids": [], "topic_keeps_until": null}\n' if form else ""
    assert (done.returncode, done.stdout) == (EXIT_FOUND, nothing)


@pytest.mark.parametrize(
    "arguments", [(), ("not-an-id",), ("--yes", "--json")], ids=["nothing", "no id", "no order"]
)
def test_what_names_no_order_is_exit_2(
    command: Run, place: Place, erased_count: Callable[[], int], arguments: tuple[str, ...]
) -> None:
    """Above all it does not mean every order."""
    place()
    refused = command("erase", *arguments)
    assert (refused.returncode, refused.stdout, erased_count()) == (EXIT_USAGE, "", 0)


@pytest.mark.usefixtures("topic")
def test_erasing_again_changes_nothing_and_prints_the_ids_again(
    command: Run, place: Place, query: Query
) -> None:
    """So that the mail side can be told again, too."""
    order_id = place(state="COMPLETED")
    rows = "SELECT orders.xmin, outbox.xmin, * FROM orders, outbox, idempotency_keys"
    command("erase", order_id, "--yes").check_returncode()
    before = query(rows)
    again = command("erase", order_id, "--yes")
    assert (again.returncode, again.stdout, query(rows)) == (0, f"{order_id}\n", before)


# Asking first


@pytest.mark.usefixtures("topic")
@pytest.mark.parametrize("form", [(), ("--json",)], ids=["people", "script"])
def test_a_dry_run_lists_the_orders_and_changes_nothing(
    command: Run, place: Place, erased_count: Callable[[], int], form: tuple[str, ...]
) -> None:
    """With masked addresses; in no form could it be taken for the list of what was erased."""
    order_id = place()
    place(OTHER, user="minji")
    tried = command("erase", "--email", CANARY, "--dry-run", *form)
    assert (tried.returncode, erased_count()) == (0, 0)
    assert CANARY not in tried.stdout + tried.stderr
    if form:
        (row,) = json.loads(tried.stdout)
        assert (row["order_id"], row["email"]) == (order_id, MASKED_CANARY)
    else:
        _, line = tried.stdout.splitlines()
        assert (line.split()[0], line.split()[-1]) == (order_id, MASKED_CANARY)


@pytest.mark.usefixtures("engine")
def test_without_a_terminal_and_without_yes_nothing_is_erased(
    environment: dict[str, str], place: Place, erased_count: Callable[[], int]
) -> None:
    """Exit 2, and the message says how else."""
    place()
    refused = subprocess.run(
        [COMMAND, "erase", "--email", CANARY],
        env={"PATH": os.environ["PATH"], **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (refused.returncode, refused.stdout, erased_count()) == (EXIT_USAGE, "", 0)
    assert "--yes" in refused.stderr
    assert "--dry-run" in refused.stderr


def interrupt(process: "subprocess.Popen[str]") -> None:
    """Press Ctrl-C, and again: Python sleeps through one that comes as it begins to read."""
    for _ in range(INTERRUPTIONS):
        process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS / INTERRUPTIONS)
            return


@pytest.fixture
def ask(environment: dict[str, str]) -> Iterator[Callable[[bytes], tuple[int, str, str]]]:
    """Give a function that erases from a terminal, types an answer, and tells how it ended."""
    terminal, theirs = pty.openpty()

    def run(answer: bytes) -> tuple[int, str, str]:
        with subprocess.Popen(
            [COMMAND, "erase", "--email", CANARY],
            env={"PATH": os.environ["PATH"], **environment},
            stdin=theirs,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr
            assert process.stdout
            asked = ""
            while "]" not in asked:
                asked += process.stderr.read(1)
            if answer == b"\x03":
                interrupt(process)
            else:
                os.write(terminal, answer)
            return process.wait(STOP_SECONDS), process.stdout.read(), asked + process.stderr.read()

    yield run
    os.close(theirs)
    os.close(terminal)


@pytest.mark.usefixtures("topic")
@pytest.mark.parametrize(
    ("answer", "code", "erased"),
    [
        (b"y\n", 0, 2),
        (b"n\n", EXIT_FAILED, 0),
        (b"\n", EXIT_FAILED, 0),
        (b"\x04", EXIT_INTERRUPTED, 0),
        (b"\x03", EXIT_INTERRUPTED, 0),
    ],
    ids=["yes", "no", "nothing", "Ctrl-D", "Ctrl-C"],
)
def test_on_a_terminal_it_asks(
    ask: Callable[[bytes], tuple[int, str, str]],
    place: Place,
    erased_count: Callable[[], int],
    answer: bytes,
    code: int,
    erased: int,
) -> None:
    """After it has told how many; only a yes erases, and only ids come out for the pipe."""
    order_ids = sorted((place(), place()))
    ended, out, err = ask(answer)
    assert (ended, erased_count(), out.split()) == (code, erased, order_ids if erased else [])
    assert ("Orders found: 2" in err, "Traceback" in err) == (True, False)


# What the topic keeps


def kept_until(done: "subprocess.CompletedProcess[str]") -> datetime | None:
    told = json.loads(done.stdout)["topic_keeps_until"]
    return None if told is None else datetime.fromisoformat(told)


@pytest.mark.usefixtures("topic")
def test_the_topic_keeps_records_until_the_newest_has_gone(
    command: Run, place: Place, query: Query
) -> None:
    """Retention and a segment's time after the last publication; the same again when repeated."""
    early, late = "2026-01-01T00:00:00Z", "2026-02-03T04:05:06Z"
    order_ids = sorted(
        place(state="COMPLETED", published_at=moment) for moment in (late, early, None)
    )
    done, again = (command("erase", *order_ids, "--yes", "--json") for _ in range(2))
    until = datetime.fromisoformat(late) + KEPT
    assert (json.loads(done.stdout)["order_ids"], kept_until(done)) == (order_ids, until)
    assert f"until {until:%Y-%m-%dT%H:%M:%S}" in done.stderr
    assert again.stdout == done.stdout


@pytest.mark.usefixtures("topic")
def test_an_event_that_waits_may_be_published_this_moment(
    command: Run, place: Place, query: Query
) -> None:
    """The relay may have read its row already."""
    place(state="INIT")
    now = query("SELECT now()")[0][0]
    until = kept_until(command("erase", "--email", CANARY, "--yes", "--json"))
    assert until is not None
    assert timedelta(0) <= until - KEPT - now < timedelta(seconds=30)


@pytest.mark.usefixtures("topic")
def test_an_order_whose_event_was_purged_was_published_when_it_was_placed(
    command: Run, place: Place, query: Query
) -> None:
    """Its row is no longer there to tell."""
    place()
    query("DELETE FROM outbox")
    (placed_at,) = query("SELECT ordered_at FROM orders")[0]
    until = kept_until(command("erase", "--email", CANARY, "--yes", "--json"))
    assert until == placed_at + KEPT


@pytest.mark.usefixtures("topic")
def test_what_was_never_published_is_not_in_the_topic(command: Run, place: Place) -> None:
    """An event that no broker took left nothing there."""
    place(state="FAILED")
    done = command("erase", "--email", CANARY, "--yes", "--json")
    assert (kept_until(done), "the topic" in done.stderr) == (None, False)


@pytest.mark.parametrize("retention", ["-1", str(2**63 - 1)], ids=["no end", "longest"])
def test_a_topic_that_forgets_nothing_keeps_them_for_ever(
    command: Run, place: Place, alter_topic: Callable[..., None], retention: str
) -> None:
    """That is said; there is no time to print."""
    alter_topic("retention.ms", retention)
    place()
    done = command("erase", "--email", CANARY, "--yes", "--json")
    assert (done.returncode, kept_until(done), "for ever" in done.stderr) == (0, None, True)


def test_without_kafka_it_is_erased_all_the_same(
    command: Run,
    place: Place,
    erased_count: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A person's right does not wait for a broker; that nobody knows the time is said."""
    monkeypatch.setattr(kafka, "REQUEST_TIMEOUT_SECONDS", 1.0)
    place()
    done = command("erase", "--email", CANARY, "--yes", "--json", KAFKA_BOOTSTRAP_SERVERS=NOBODY)
    assert (done.returncode, kept_until(done), erased_count()) == (0, None, 1)
    assert "nobody knows how long (Kafka: " in done.stderr


# Others at work


@pytest.mark.usefixtures("topic")
def test_a_row_that_somebody_holds_is_erased_when_it_is_free(
    start: Start, place: Place, hold: Callable[[str], Connection], erased_count: Callable[[], int]
) -> None:
    """The relay holds rows for a moment. Who waits for them holds none, so nobody deadlocks."""
    first, second = sorted((place(), place()))
    other = hold(second)
    with start("erase", first, second, "--yes") as process:
        assert process.stdout
        # The ids are printed right before the first row is tried for.
        assert [process.stdout.readline().strip() for _ in range(2)] == [first, second]
        # It has tried, and tries again.
        time.sleep(0.3)
        other.execute(
            text("UPDATE outbox SET reason = 'held' WHERE aggregateid = :first"), {"first": first}
        )
        assert erased_count() == 0
        other.commit()
        process.communicate(timeout=STOP_SECONDS)
    assert (process.returncode, erased_count()) == (0, 2)


@pytest.mark.usefixtures("topic")
def test_a_row_that_is_never_free_is_exit_3(
    command: Run,
    place: Place,
    hold: Callable[[str], Connection],
    erased_count: Callable[[], int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch is erased whole or not at all."""
    monkeypatch.setattr(personal, "PATIENCE_SECONDS", 0.2)
    first, second = sorted((place(), place()))
    hold(second)
    failed = command("erase", first, second, "--yes")
    assert (failed.returncode, erased_count(), failed.stderr.splitlines()[-1]) == (
        EXIT_FAILED,
        0,
        'database: could not obtain lock on row in relation "outbox"',
    )


@pytest.mark.usefixtures("caught_up")
def test_orders_are_erased_while_they_are_published(
    run: Run,
    place_many: Callable[[], None],
    start_relay: Callable[..., Any],
    make_readback: Callable[[Topic], ReadBack],
    topic: Topic,
    query: Query,
    wait_until: WaitUntil,
    where_kept: Callable[[str], set[str]],
) -> None:
    """Relay, read-back and two erasures at once: all comes to its end, and no address is left."""
    place_many()
    start_relay(companion=make_readback(topic).running)
    with ThreadPoolExecutor(2) as pool:
        erasures = [pool.submit(run, "erase", "--user", "hana", "--yes") for _ in range(2)]
        ended = [erasure.result() for erasure in erasures]
    is_left = "SELECT FROM outbox WHERE state <> 'COMPLETED' LIMIT 1"
    wait_until(lambda: not query(is_left), seconds=60.0)
    assert [(each.returncode, len(each.stdout.split())) for each in ended] == [(0, MANY)] * 2
    assert (where_kept(CANARY), len(query("SELECT FROM outbox"))) == (set(), MANY)


# Ended in the middle


@pytest.fixture
def in_the_middle(
    start: Start,
    place_many: Callable[[], None],
    hold: Callable[[str], Connection],
    addresses: Callable[[], dict[str, str]],
    erased_count: Callable[[], int],
    wait_until: WaitUntil,
) -> Iterator[tuple["subprocess.Popen[str]", list[str], Connection]]:
    """Give an erasure of 3,000 orders that has done its first batch and waits in the second."""
    place_many()
    order_ids = sorted(addresses())
    other = hold(order_ids[personal.BATCH_ORDERS + 1])
    with start("erase", "--email", CANARY, "--yes") as process:
        printed: list[str] = []
        assert process.stdout
        reader = threading.Thread(target=printed.extend, args=(process.stdout,))
        reader.start()
        wait_until(lambda: erased_count() == personal.BATCH_ORDERS)
        yield process, printed, other
        process.kill()
        reader.join()
    assert [line.strip() for line in printed] == order_ids


@pytest.mark.usefixtures("topic")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_an_erasure_that_was_ended_leaves_whole_batches_and_can_be_run_again(
    run: Run,
    in_the_middle: tuple["subprocess.Popen[str]", list[str], Connection],
    query: Query,
    where_kept: Callable[[str], set[str]],
    erased_count: Callable[[], int],
    number: signal.Signals,
) -> None:
    """Every id was printed before; an order that is erased is so in all its tables."""
    process, _, other = in_the_middle
    process.send_signal(number)
    code = process.wait(STOP_SECONDS)
    assert process.stderr
    said = process.stderr.read()
    other.rollback()
    halves = query(
        "SELECT count(*) FROM orders JOIN outbox ON outbox.aggregateid = orders.id::text"
        " JOIN idempotency_keys ON idempotency_keys.order_id = orders.id"
        " WHERE (orders.email = :erased) <> (position(:canary IN payload) = 0)"
        " OR (orders.email = :erased) <> (fingerprint = '')",
        erased=ERASED_ADDRESS,
        canary=CANARY.encode(),
    )[0][0]
    left = erased_count()
    again = run("erase", "--email", CANARY, "--yes")
    expected = EXIT_INTERRUPTED if number == signal.SIGINT else -signal.SIGKILL
    assert (code, left, halves, "Traceback" in said) == (expected, personal.BATCH_ORDERS, 0, False)
    assert (again.returncode, len(again.stdout.split())) == (0, MANY - personal.BATCH_ORDERS)
    assert (where_kept(CANARY), erased_count()) == (set(), MANY)


@pytest.mark.usefixtures("topic")
def test_ids_that_nobody_takes_are_not_erased(
    start: Start, place_many: Callable[[], None], erased_count: Callable[[], int]
) -> None:
    """Where the mail side has ended, its orders could not be found by their address again."""
    place_many()
    with start("erase", "--email", CANARY, "--yes") as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, "Traceback" in said, erased_count()) == (EXIT_FAILED, False, 0)


@pytest.mark.usefixtures("topic")
def test_a_terminal_is_shown_how_far_it_is(
    environment: dict[str, str], place_many: Callable[[], None]
) -> None:
    """With standard error a terminal; a script's log has one line at the end."""
    place_many()
    terminal, theirs = pty.openpty()
    subprocess.run(
        [COMMAND, "erase", "--email", CANARY, "--yes"],
        env={"PATH": os.environ["PATH"], **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=theirs,
        check=True,
    )
    os.close(theirs)
    read = b""
    # The kernel says EIO when nobody is left at the other end.
    with suppress(OSError):
        while more := os.read(terminal, 65_536):
            read += more
    os.close(terminal)
    shown = read.decode()
    assert ("erasing" in shown, f"erased: {MANY} orders" in shown) == (True, True)
