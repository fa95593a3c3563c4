"""The real commands, as processes."""

import json
import signal
import subprocess
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from confluent_kafka.admin import AdminClient, ConfigResource, ResourceType

from order_service.auth import Principal, TokenVerifier
from order_service.catalogue import CatalogueEntry
from order_service.kafka import TOPIC, TOPIC_SETTINGS, Topic
from order_service.settings import Settings

STOP_SECONDS = 10.0

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., "subprocess.Popen[str]"]
Query = Callable[..., Any]
WaitUntil = Callable[..., Any]


def status(url: str) -> int | None:
    """Ask an address; None when nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=STOP_SECONDS) as answer:
            code: int = answer.status
            return code
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return None


def test_a_token_is_good_for_the_keys_beside_it(run: Run, settings: Settings) -> None:
    """What `token` prints is accepted by whoever reads the same JWKS file."""
    token = run("token", "--user", "minji", "--scope", "orders:read").stdout.strip()
    verifier = TokenVerifier(
        issuer=settings.auth_issuer, audience=settings.auth_audience, jwks=settings.auth_jwks
    )
    assert verifier.verify(token) == Principal("minji", frozenset({"orders:read"}))


@pytest.mark.usefixtures("topic")
def test_ensuring_the_topic_twice_is_no_fault(run: Run) -> None:
    """The job may run at every deployment."""
    again = run("topics", "ensure")
    assert (again.returncode, again.stdout) == (0, "order-created was there\n")


def test_the_topic_is_made_as_declared(topic: Topic, admin: AdminClient) -> None:
    """Partitions and settings at the broker are those of the declaration, as one broker can."""
    resource = ConfigResource(ResourceType.TOPIC, TOPIC)
    made = admin.describe_configs([resource])[resource].result(10)
    wanted = TOPIC_SETTINGS | {"min.insync.replicas": "1"}
    assert (topic.describe().partitions, {name: made[name].value for name in wanted}) == (3, wanted)


def test_products_are_loaded_and_updated(run: Run, query: Query, tmp_path: Path) -> None:
    """New products are added, prices changed, and those not named stay."""
    path = tmp_path / "products.csv"
    path.write_text(
        "sku,name_ko,name_en,unit_price\nCUP-WHITE,백자 찻잔,White cup,35000\nMUG,머그,Mug,9000\n",
        encoding="utf-8-sig",
    )
    loaded = run("products", "load", str(path))
    rows = query(
        "SELECT sku, unit_price FROM products WHERE sku IN ('CUP-WHITE', 'MUG', 'POT-CELADON')"
    )
    assert (loaded.stdout, {row.sku: int(row.unit_price) for row in rows}) == (
        "2 products loaded\n",
        {"CUP-WHITE": 35000, "MUG": 9000, "POT-CELADON": 128000},
    )


def test_a_file_with_a_fault_loads_nothing(
    run: Run, query: Query, tmp_path: Path, products: list[CatalogueEntry]
) -> None:
    """One wrong line, and even the good ones are left out."""
    path = tmp_path / "products.csv"
    path.write_text("sku,name_ko,name_en,unit_price\nMUG,머그,Mug,9000\nPAN,팬,Pan,x\n", "utf-8")
    refused = run("products", "load", str(path))
    assert (refused.returncode, refused.stderr, len(query("SELECT FROM products"))) == (
        1,
        "Error: line 3: unit_price: Not a decimal string.\n",
        len(products),
    )


def test_a_file_without_products_loads_nothing(run: Run, tmp_path: Path) -> None:
    """A file with nothing but its header is no crash."""
    path = tmp_path / "products.csv"
    path.write_text("sku,name_ko,name_en,unit_price\n", "utf-8")
    assert "Traceback" not in run("products", "load", str(path)).stderr


def test_the_outbox_is_shown_for_scripts(
    run: Run, query: Query, add_event: Callable[..., UUID]
) -> None:
    """With --json a row is an object with the names of the columns."""
    event_id = add_event(state="PUBLISHED", topic_id="t", partition=2, offset=41)
    order_id = query("SELECT aggregateid FROM outbox")[0].aggregateid
    (row,) = json.loads(run("outbox", "show", order_id, "--json").stdout)
    assert {
        name: row[name] for name in ("event_id", "order_id", "state", "partition", "offset")
    } == {
        "event_id": str(event_id),
        "order_id": order_id,
        "state": "PUBLISHED",
        "partition": 2,
        "offset": 41,
    }


def test_an_order_that_is_not_there_is_exit_1(run: Run) -> None:
    """A script can ask whether an order has an event."""
    shown = run("outbox", "show", "unknown", "--json")
    assert (shown.returncode, shown.stdout) == (1, "[]\n")


@pytest.mark.parametrize("command", ["api", "relay"])
def test_a_setting_that_cannot_be_used_is_exit_2_and_one_message(run: Run, command: str) -> None:
    """No command starts half: it says all that is wrong, and no traceback."""
    refused = run(command, APP_ENV="staging", KAFKA_ACKS="1")
    assert (refused.returncode, refused.stderr) == (
        2,
        (
            "KAFKA_ACKS: the promise rests on acks; it cannot be changed\n"
            "APP_ENV: Must be one of: development, test, production.\n"
        ),
    )


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("KAFKA_SECURITY_PROTOCOL", "nonsense", 'Invalid value "nonsense"'),
        ("KAFKA_NO_SUCH_PROPERTY", "1", 'No such configuration property: "no.such.property"'),
    ],
)
def test_what_the_kafka_client_does_not_take_is_exit_2_in_its_words(
    run: Run, name: str, value: str, said: str
) -> None:
    """Any librdkafka property can be set, so its own words are the message."""
    refused = run("relay", **{name: value})
    assert (refused.returncode, refused.stderr.count("\n")) == (2, 1)
    assert said in refused.stderr


@pytest.fixture
def api(
    start: Start, wait_until: WaitUntil, free_port: Callable[[], int]
) -> Iterator[tuple["subprocess.Popen[str]", int, int]]:
    """Give the running API with its two ports."""
    http, probe = free_port(), free_port()
    with start("api", HTTP_PORT=str(http), PROBE_PORT=str(probe)) as process:
        try:
            wait_until(lambda: status(f"http://127.0.0.1:{probe}/readyz") == 200)
            yield process, http, probe
        finally:
            process.kill()


@pytest.fixture
def relay(
    start: Start, wait_until: WaitUntil, free_port: Callable[[], int], topic: Topic
) -> Iterator[tuple["subprocess.Popen[str]", int]]:
    """Give the running relay with the port of its probes."""
    probe = free_port()
    with start("relay", PROBE_PORT=str(probe)) as process:
        try:
            wait_until(lambda: status(f"http://127.0.0.1:{probe}/readyz") == 200)
            yield process, probe
        finally:
            process.kill()


def test_sigterm_ends_the_api(api: tuple["subprocess.Popen[str]", int, int]) -> None:
    """The orchestrator's stop is a clean end within ten seconds."""
    api[0].send_signal(signal.SIGTERM)
    assert api[0].wait(STOP_SECONDS) == 0


def test_probes_answer_on_their_own_port_only(
    api: tuple["subprocess.Popen[str]", int, int],
) -> None:
    """Users see the REST API; metrics and probes are for the orchestrator."""
    _, http, probe = api
    assert {
        (name, path): status(f"http://127.0.0.1:{port}{path}")
        for name, port in (("users", http), ("probes", probe))
        for path in ("/livez", "/metrics", "/v1/products")
        if (name, path) != ("probes", "/v1/products")
    } == {
        ("users", "/livez"): 404,
        ("users", "/metrics"): 404,
        ("users", "/v1/products"): 200,
        ("probes", "/livez"): 200,
        ("probes", "/metrics"): 200,
    }


def test_sigterm_ends_the_relay(
    relay: tuple["subprocess.Popen[str]", int],
    active_session: Callable[[], int | None],
    wait_until: WaitUntil,
) -> None:
    """An active relay ends cleanly within ten seconds, and its lock is free."""
    wait_until(active_session)
    relay[0].send_signal(signal.SIGTERM)
    assert relay[0].wait(STOP_SECONDS) == 0
    # The server ends the session by itself when the process has hung up.
    wait_until(lambda: active_session() is None)


@pytest.mark.usefixtures("relay", "caught_up")
def test_the_relay_takes_an_event_to_the_topic_and_sees_it_there(
    add_event: Callable[..., UUID], row_of: Callable[[UUID], Any], wait_until: WaitUntil
) -> None:
    """With the real command alone, what is added to the outbox becomes COMPLETED."""
    event_id = add_event()
    wait_until(lambda: row_of(event_id).state == "COMPLETED")


def test_the_relay_answers_probes(relay: tuple["subprocess.Popen[str]", int]) -> None:
    """A process without a REST API has its probes all the same."""
    paths = ("/livez", "/readyz", "/metrics")
    assert [status(f"http://127.0.0.1:{relay[1]}{path}") for path in paths] == [200, 200, 200]
