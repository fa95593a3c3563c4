import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from flask import Flask
from sqlalchemy import Connection, Engine, text

from order_service import catalogue, idempotency, orders, outbox
from order_service.api import PLACE_ORDER
from order_service.models import PAUSE_SECONDS, POOL_SIZE, db

BODY: dict[str, Any] = {
    "email": "minji@example.com",
    "items": [{"sku": "TEA-GREEN-50", "quantity": 2}, {"sku": "CUP-WHITE", "quantity": 1}],
}
TABLES = ("orders", "order_items", "outbox", "idempotency_keys")
NOTHING = dict.fromkeys(TABLES, 0)
ONE_ORDER = {"orders": 1, "order_items": 2, "outbox": 1, "idempotency_keys": 1}
PROBLEM = "urn:order-service:problem:"
THREADS = 16

Post = Callable[..., Any]
Get = Callable[..., Any]
Query = Callable[..., Any]


@pytest.fixture
def post(app: Flask, bearer: Callable[[str], dict[str, str]]) -> Post:
    """Give a function that places an order; each call is a client of its own."""

    def send(
        body: dict[str, Any] = BODY, *, key: str | None = "key-1", user: str | None = "minji"
    ) -> Any:
        headers = bearer(user) if user else {}
        if key is not None:
            headers["Idempotency-Key"] = key
        return app.test_client().post("/v1/orders", json=body, headers=headers)

    return send


@pytest.fixture
def get(app: Flask, bearer: Callable[[str], dict[str, str]]) -> Get:
    """Give a function that asks for an address as a user."""
    return lambda path, *, user="minji": app.test_client().get(path, headers=bearer(user))


@pytest.fixture
def written(query: Query) -> Callable[[], dict[str, int]]:
    """Give a function that counts the rows of every table an order writes to."""
    return lambda: {table: query(f"SELECT count(*) FROM {table}")[0][0] for table in TABLES}


@pytest.fixture
def held_key(engine: Engine) -> Iterator[Connection]:
    """Let a transaction hold key-1 as a request does that is being worked on."""
    held = {"principal": "minji", "operation": PLACE_ORDER, "key": "key-1"}
    with engine.begin() as connection:
        assert connection.exec_driver_sql(f"SELECT {idempotency.TRY_LOCK}", held).scalar_one()
        yield connection


def test_an_order_is_answered_with_itself(post: Post) -> None:
    """The reply is the order: priced by the shop, its names in the order's language."""
    answer = post(BODY | {"locale": "en"})
    body = answer.get_json()
    assert (answer.status_code, body) == (
        201,
        {
            "id": body["id"],
            "userId": "minji",
            "email": "minji@example.com",
            "locale": "en",
            "currency": "KRW",
            "amount": "57000",
            "orderedAt": body["orderedAt"],
            "items": [
                {
                    "sku": "TEA-GREEN-50",
                    "name": "Boseong green tea 50 g",
                    "quantity": 2,
                    "unitPrice": "12000",
                },
                {
                    "sku": "CUP-WHITE",
                    "name": "White porcelain cup",
                    "quantity": 1,
                    "unitPrice": "33000",
                },
            ],
        },
    )


@pytest.mark.parametrize(
    ("locale", "name"), [("ko", "보성 녹차 50g"), ("en", "Boseong green tea 50 g")]
)
def test_a_line_is_named_in_the_orders_language(post: Post, locale: str, name: str) -> None:
    """Of the two names of a product the order keeps the one its mail will show."""
    assert post(BODY | {"locale": locale}).get_json()["items"][0]["name"] == name


def test_the_location_leads_to_the_order(post: Post, get: Get) -> None:
    """What the reply points at is the same order, with the state of its event."""
    placed = post()
    assert get(placed.headers["Location"]).get_json() == placed.get_json() | {
        "event": {"state": "INIT", "partition": None, "offset": None}
    }


def test_an_order_writes_one_row_of_everything(
    post: Post, written: Callable[[], dict[str, int]]
) -> None:
    """Order, items, event and key are there when the reply is."""
    post()
    assert written() == ONE_ORDER


def test_the_event_tells_of_the_order(post: Post, query: Query) -> None:
    """The outbox holds the event of just this order, waiting."""
    placed = post().get_json()
    row = query("SELECT * FROM outbox")[0]
    value = json.loads(bytes(row.payload))
    same = ("userId", "email", "locale", "currency", "amount", "orderedAt", "items")
    assert (row.state, row.aggregateid, row.type, value) == (
        "INIT",
        placed["id"],
        "order.created.v1",
        {"orderId": placed["id"]} | {name: placed[name] for name in same},
    )


@pytest.mark.parametrize(("requests", "wakings"), [(1, 1), (2, 1)], ids=["order", "replay"])
def test_an_order_wakes_the_relay(
    post: Post, autocommit: Connection, requests: int, wakings: int
) -> None:
    """Whoever listens is told of a new order, and not of a replay."""
    autocommit.execute(text(f"LISTEN {outbox.CHANNEL}"))
    for _ in range(requests):
        post()
    autocommit.execute(text("SELECT 1"))
    session: Any = autocommit.connection.dbapi_connection
    heard = len(session.notifies)
    autocommit.invalidate()
    assert heard == wakings


def test_the_state_shows_where_the_event_is(post: Post, get: Get, query: Query) -> None:
    """A client sees partition and offset once the event is in the topic."""
    location = post().headers["Location"]
    query("""UPDATE outbox SET state = 'COMPLETED', partition = 2, "offset" = 41""")
    assert get(location).get_json()["event"] == {"state": "COMPLETED", "partition": 2, "offset": 41}


def test_the_same_key_twice_is_one_order(post: Post, written: Callable[[], dict[str, int]]) -> None:
    """A client that sends again places nothing again."""
    post()
    post()
    assert written() == ONE_ORDER


def test_the_same_key_twice_is_the_same_reply(post: Post) -> None:
    """The second reply has the first one's status, place and bytes, and says what it is."""
    first, second = post(), post()
    assert (
        second.status_code,
        second.headers["Location"],
        second.headers.get("Idempotent-Replayed"),
        second.data,
    ) == (201, first.headers["Location"], "true", first.data)


def test_the_first_reply_is_no_replay(post: Post) -> None:
    """Only a replay says that it is one."""
    assert "Idempotent-Replayed" not in post().headers


def test_a_replay_keeps_the_price_of_then(post: Post, engine: Engine) -> None:
    """A price that changed in between changes no order."""
    first = post()
    dearer = catalogue.CatalogueEntry("CUP-WHITE", "백자 찻잔", "Cup", Decimal(99000))
    with engine.begin() as connection:
        catalogue.load(connection, [dearer], currency="KRW")
    assert post().data == first.data


def test_a_key_in_quotes_is_the_same_key(post: Post) -> None:
    """The draft writes the key in quotes, most clients do not."""
    assert post(key='"key-1"').get_json()["id"] == post(key="key-1").get_json()["id"]


def test_the_same_body_in_another_order_of_members_is_a_replay(post: Post) -> None:
    """What counts is what was ordered, not how it was written."""
    post()
    again = post({"items": BODY["items"], "locale": "ko", "email": BODY["email"]})
    assert again.headers.get("Idempotent-Replayed") == "true"


def test_two_users_may_choose_the_same_key(post: Post) -> None:
    """A key is its user's own."""
    assert post(user="minji").get_json()["id"] != post(user="junho").get_json()["id"]


@pytest.mark.fault("F-H3")
def test_a_key_with_another_body_is_refused(post: Post) -> None:
    """A client that mixes up its keys is told so."""
    post()
    answer = post(BODY | {"email": "junho@example.com"})
    assert (answer.status_code, answer.get_json(force=True)["type"]) == (
        422,
        f"{PROBLEM}idempotency-key-reused",
    )


@pytest.mark.fault("F-H2")
@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        ({"key": None}, 400),
        ({"key": ""}, 400),
        ({"user": None}, 401),
        ({"body": BODY | {"amount": "57000"}}, 422),
        ({"body": BODY | {"items": [BODY["items"][0] | {"unitPrice": "1"}]}}, 422),
        ({"body": BODY | {"items": [{"sku": "COFFEE", "quantity": 1}]}}, 422),
        ({"body": BODY | {"expectedAmount": "1"}}, 409),
    ],
    ids=["no key", "empty key", "no token", "amount", "price", "unknown product", "other amount"],
)
def test_what_is_refused_writes_nothing(
    post: Post,
    written: Callable[[], dict[str, int]],
    arguments: dict[str, Any],
    status: int,
) -> None:
    """A refusal leaves no order, no event and no key behind."""
    assert (post(**arguments).status_code, written()) == (status, NOTHING)


@pytest.mark.fault("F-H3")
def test_a_reused_key_writes_nothing(post: Post, written: Callable[[], dict[str, int]]) -> None:
    """The order that the key stands for stays the only one."""
    post()
    post(BODY | {"email": "junho@example.com"})
    assert written() == ONE_ORDER


def test_another_users_order_is_not_told_from_an_unknown_one(post: Post, get: Get) -> None:
    """Nobody learns from a reply that somebody else's order exists."""
    theirs = get(post(user="minji").headers["Location"], user="junho")
    unknown = get(f"/v1/orders/{uuid4()}", user="junho")
    assert (theirs.status_code, theirs.data) == (404, unknown.data)


def test_an_unknown_product_is_pointed_at(post: Post) -> None:
    """Of two items the one that is not for sale is named."""
    answer = post(BODY | {"items": [*BODY["items"], {"sku": "COFFEE", "quantity": 1}]})
    assert answer.get_json(force=True)["errors"] == [
        {"pointer": "/items/2/sku", "detail": "COFFEE is not for sale."}
    ]


def test_a_product_of_another_currency_is_not_for_sale(post: Post, engine: Engine) -> None:
    """An order has one currency: the shop's."""
    mug = catalogue.CatalogueEntry("MUG", "머그", "Mug", Decimal("8.25"))
    with engine.begin() as connection:
        catalogue.load(connection, [mug], currency="USD")
    assert post(BODY | {"items": [{"sku": "MUG", "quantity": 1}]}).status_code == 422


@pytest.mark.parametrize("amount", ["57000", "57000.00"])
def test_the_expected_amount_is_no_obstacle(post: Post, amount: str) -> None:
    """Who expects what the order comes to gets the order."""
    assert post(BODY | {"expectedAmount": amount}).status_code == 201


def test_another_amount_than_expected_is_a_conflict(post: Post) -> None:
    """The client is told what the order comes to now."""
    answer = post(BODY | {"expectedAmount": "50000"}).get_json(force=True)
    assert (answer["status"], answer["type"], answer["detail"]) == (
        409,
        f"{PROBLEM}price-changed",
        "The order comes to 57000 KRW, not to the expected amount.",
    )


def test_a_refused_order_does_not_burn_its_key(post: Post) -> None:
    """With the right amount the same key places the order."""
    post(BODY | {"expectedAmount": "50000"})
    assert post(BODY | {"expectedAmount": "57000"}).status_code == 201


@pytest.mark.fault("F-H4")
def test_one_key_in_sixteen_threads_is_one_order(
    post: Post, written: Callable[[], dict[str, int]]
) -> None:
    """However many requests come at once, one places the order, and all are told of that one."""
    together = threading.Barrier(THREADS)

    def send(_: int) -> tuple[int, str | None]:
        together.wait()
        answer = post()
        return answer.status_code, answer.get_json(force=True).get("id")

    with ThreadPoolExecutor(THREADS) as pool:
        answers = set(pool.map(send, range(THREADS)))
    placed = {order_id for status, order_id in answers if status == 201}
    assert (len(placed), {status for status, _ in answers} <= {201, 409}, written()) == (
        1,
        True,
        ONE_ORDER,
    )


@pytest.mark.usefixtures("held_key")
def test_a_key_in_use_is_a_conflict_at_once(post: Post) -> None:
    """While another transaction holds the key, nobody waits for it."""
    sent_at = time.monotonic()
    answer = post()
    seconds = time.monotonic() - sent_at
    assert (
        answer.status_code,
        answer.get_json(force=True)["type"],
        answer.headers["Retry-After"],
        seconds < 1,
    ) == (409, f"{PROBLEM}request-in-flight", "1", True)


def test_a_key_is_free_when_its_request_came_to_nothing(post: Post, held_key: Connection) -> None:
    """A request that died with its connection holds its key no longer."""
    held_key.rollback()
    assert post().status_code == 201


@pytest.mark.fault("F-H4")
def test_the_unique_key_decides_where_the_lock_was_evaded(
    post: Post, engine: Engine, query: Query, wait_until: Callable[..., Any]
) -> None:
    """An order whose key was taken meanwhile is rolled back, and the other one is answered."""
    first = post(key="key-1")
    taken = text("""
        INSERT INTO idempotency_keys (principal, operation, key, fingerprint, order_id)
        SELECT principal, operation, 'key-2', fingerprint, order_id FROM idempotency_keys
    """)
    waiting = "SELECT 1 FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
    with ThreadPoolExecutor(1) as pool, engine.connect() as other:
        other.execute(taken)
        second = pool.submit(post, key="key-2")
        wait_until(lambda: query(waiting))
        other.commit()
        answer = second.result()
    assert (
        answer.status_code,
        answer.data,
        answer.headers.get("Idempotent-Replayed"),
        len(query("SELECT 1 FROM orders")),
    ) == (201, first.data, "true", 1)


@pytest.fixture(params=["order_items", "outbox", "idempotency_keys"])
def refusing_table(request: pytest.FixtureRequest, query: Query) -> Iterator[Callable[[], None]]:
    """Let one table take no row, and give a function that ends this."""
    table = request.param

    def end() -> None:
        query(f"ALTER TABLE {table} DROP CONSTRAINT IF EXISTS nothing_goes_in")

    query(f"ALTER TABLE {table} ADD CONSTRAINT nothing_goes_in CHECK (false) NOT VALID")
    yield end
    end()


@pytest.mark.usefixtures("refusing_table")
def test_an_order_is_written_whole_or_not_at_all(
    post: Post, written: Callable[[], dict[str, int]]
) -> None:
    """Whichever of its rows cannot be written, none is."""
    assert (post().status_code, written()) == (500, NOTHING)


def test_an_order_that_failed_can_be_placed_again(
    post: Post, refusing_table: Callable[[], None]
) -> None:
    """A failure of ours does not burn the key."""
    post()
    refusing_table()
    answer = post()
    assert (answer.status_code, "Idempotent-Replayed" in answer.headers) == (201, False)


@pytest.fixture
def in_session(app: Flask) -> Callable[[str], list[str]]:
    """Give a function that executes SQL in the session of all orders, which is a new one."""
    with app.app_context():
        db.engine.dispose()

    def execute(statement: str) -> list[str]:
        with app.app_context(), db.engine.connect() as connection:
            result = connection.exec_driver_sql(statement)
            return list(result.scalars()) if result.returns_rows else []

    return execute


PREPARED = "SELECT name FROM pg_prepared_statements ORDER BY name"


@pytest.mark.parametrize("lost", [slice(None), slice(1), slice(1, None)])
def test_a_session_without_our_statements_is_given_them(
    post: Post, in_session: Callable[[str], list[str]], lost: slice
) -> None:
    """Behind a transaction pooler it may be another one each time, with all, some or none."""
    post()
    prepared = in_session(PREPARED)
    in_use_first = [each.name for each in (orders._TRY_LOCKS, *orders._TRY_LOCKS.vouches_for)]
    for name in in_use_first[lost]:
        in_session(f"DEALLOCATE {name}")
    answer = post(key="key-2")
    assert (answer.status_code, in_session(PREPARED), sorted(in_use_first)) == (
        201,
        prepared,
        prepared,
    )


def test_a_column_that_changes_its_type_costs_no_order(
    post: Post, query: Query, in_session: Callable[[str], list[str]]
) -> None:
    """What the session has prepared returns the old type, so it is prepared anew."""
    post()
    session = in_session("SELECT pg_backend_pid()")
    query("ALTER TABLE products ALTER unit_price TYPE numeric(12, 2)")
    try:
        answer = post(key="key-2")
    finally:
        query("ALTER TABLE products ALTER unit_price TYPE numeric")
    assert (answer.status_code, in_session("SELECT pg_backend_pid()")) == (201, session)


@pytest.mark.parametrize("table", ["idempotency_keys", "orders", "products", "outbox"])
def test_a_locked_table_is_503_and_no_hang(post: Post, engine: Engine, table: str) -> None:
    """A thread waits two seconds for a lock, no longer; the client has done nothing wrong."""
    with engine.begin() as other:
        other.execute(text(f"LOCK TABLE {table}"))
        sent_at = time.monotonic()
        answer = post()
        seconds = time.monotonic() - sent_at
    assert (answer.status_code, answer.headers["Retry-After"], seconds < 4) == (503, "1", True)


@pytest.mark.parametrize(
    "lock",
    [
        "SELECT pg_advisory_xact_lock(hashtextextended('user minji', 0))",
        "SELECT pg_advisory_xact_lock(hashtextextended('recipient minji@example.com', 0))",
    ],
    ids=["user", "recipient"],
)
def test_too_many_at_once_are_429(post: Post, engine: Engine, lock: str) -> None:
    """Whose turn to be counted does not come within two seconds has too many orders under way."""
    with engine.begin() as other:
        other.execute(text(lock))
        answer = post()
    assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")


def test_a_replay_waits_for_no_other_order(post: Post, engine: Engine) -> None:
    """What was placed is told whatever else the user and the recipient have under way."""
    first = post()
    with engine.begin() as other:
        other.execute(text("SELECT pg_advisory_xact_lock(hashtextextended('user minji', 0))"))
        assert post().data == first.data


@pytest.mark.parametrize(("held", "granted"), [("user", 1), ("recipient", 2)])
def test_the_user_is_locked_before_the_recipient(
    post: Post,
    engine: Engine,
    query: Query,
    wait_until: Callable[..., Any],
    held: str,
    granted: int,
) -> None:
    """Always in this order, so that no two orders wait for each other in a circle."""
    name = {"user": "user minji", "recipient": "recipient minji@example.com"}[held]
    waiting = """
        SELECT count(*) FILTER (WHERE granted) AS granted FROM pg_locks
         WHERE locktype = 'advisory' GROUP BY pid HAVING NOT bool_and(granted)
    """
    with ThreadPoolExecutor(1) as pool, engine.connect() as other:
        other.execute(
            text("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))"), {"name": name}
        )
        answer = pool.submit(post)
        has = wait_until(lambda: query(waiting))[0].granted
        other.rollback()
        assert (has, answer.result().status_code) == (granted, 201)


@pytest.fixture
def end_sessions(query: Query) -> Callable[[], None]:
    """Give a function that ends every other session, as a restart of the database does."""
    return lambda: query("""
        SELECT pg_terminate_backend(pid, 1000) FROM pg_stat_activity
         WHERE datname = current_database() AND pid <> pg_backend_pid()
           AND backend_type = 'client backend'
    """)


def test_orders_outlive_their_connections(post: Post, end_sessions: Callable[[], None]) -> None:
    """A database that was restarted costs no order, however many connections were kept."""
    together = threading.Barrier(POOL_SIZE)

    def send(number: int) -> int:
        together.wait()
        status: int = post(key=f"key-{number}", user=f"user-{number}").status_code
        return status

    with ThreadPoolExecutor(POOL_SIZE) as pool:
        before = list(pool.map(send, range(POOL_SIZE)))
        end_sessions()
        after = list(pool.map(send, range(POOL_SIZE, 2 * POOL_SIZE)))
    assert before + after == [201] * 2 * POOL_SIZE


def test_a_read_after_a_pause_outlives_its_connection(
    post: Post, get: Get, end_sessions: Callable[[], None]
) -> None:
    """A connection that was not used for a second is tried before it is."""
    location = post().headers["Location"]
    time.sleep(PAUSE_SECONDS)
    end_sessions()
    assert get(location).status_code == 200


@pytest.fixture
def lost_at_commit(query: Query) -> Iterator[Callable[[], int]]:
    """Let every COMMIT of an order lose its session; give a function that counts them."""
    query("CREATE SEQUENCE commits")
    query("""
        CREATE FUNCTION lose() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            PERFORM nextval('commits'), pg_terminate_backend(pg_backend_pid());
            RETURN NULL;
        END $$
    """)
    query("""
        CREATE CONSTRAINT TRIGGER lost AFTER INSERT ON orders DEFERRABLE INITIALLY DEFERRED
        FOR EACH ROW EXECUTE FUNCTION lose()
    """)
    yield lambda: query("SELECT last_value FROM commits")[0][0]
    query("DROP FUNCTION lose CASCADE")
    query("DROP SEQUENCE commits")


def test_a_commit_without_an_answer_is_503_and_not_repeated(
    post: Post, lost_at_commit: Callable[[], int]
) -> None:
    """Nobody knows what became of it: the client asks again, with the same key."""
    answer = post()
    assert (answer.status_code, answer.headers["Retry-After"], lost_at_commit()) == (503, "1", 1)


def test_the_catalogue_is_for_everybody(app: Flask) -> None:
    """Products are listed without a token, by sku, with both names."""
    answer = app.test_client().get("/v1/products")
    assert (answer.status_code, answer.get_json()["items"][0]) == (
        200,
        {
            "sku": "CUP-WHITE",
            "names": {"ko": "백자 찻잔", "en": "White porcelain cup"},
            "unitPrice": "33000",
            "currency": "KRW",
        },
    )


def test_a_service_with_its_database_is_ready(app: Flask) -> None:
    """The readiness probe asks the database."""
    assert app.test_client().get("/readyz").status_code == 200
