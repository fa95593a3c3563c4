"""Orders become mails in containers, whichever of them is stopped, killed or multiplied."""

import json
import re
import socket
import time
import uuid
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from threading import Event

import httpx
import pytest
from confluent_kafka import Consumer, Producer

from tests.support.containers import Containers, place
from tests.support.world import eventually

ORDERS = 60
RECOVERY_SECONDS = 90
KILLED = ("order-proxy", "order-api", "order-relay", "order-db", "kafka", "mail-db", "mail")
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 5432), 3)"


def test_an_order_becomes_a_mail(project: Containers, alice: httpx.Client) -> None:
    """POST, 201, COMPLETED, one mail in the inbox."""
    order_id = place(alice)
    eventually(lambda: project.inbox.copies()[order_id] == 1, within_seconds=15)
    eventually(lambda: event_state(alice, order_id) == "COMPLETED", within_seconds=10)


@pytest.mark.parametrize("replicas", [1, 3, 5])
def test_replicas_share_the_work(project: Containers, alice: httpx.Client, replicas: int) -> None:
    """However many replicas there are, each mail is sent by one of them, and once."""
    project.compose("up", "--detach", "--no-build", "--wait", "--scale", f"mail={replicas}")
    assert len(project.ids("mail")) == replicas
    eventually(lambda: partitions_placed(project) >= min(replicas, 3), within_seconds=30)
    order_ids = [place(alice) for _ in range(ORDERS)]
    eventually(lambda: set(order_ids) <= set(project.inbox.copies()), within_seconds=60)
    copies = project.inbox.copies()
    assert [copies[order_id] for order_id in order_ids] == [1] * ORDERS
    eventually(lambda: sum(sent_by(project, order_ids).values()) == ORDERS, within_seconds=10)
    assert len(sent_by(project, order_ids)) == min(replicas, 3)


def test_another_group_reads_the_same_events(project: Containers, alice: httpx.Client) -> None:
    """Who else reads the topic needs neither service, and the mail service not them."""
    early = place(alice)
    with project.stopped("mail"):
        late = place(alice)
        eventually(lambda: event_state(alice, late) == "COMPLETED", within_seconds=15)
        assert {early, late} <= read_as_another_group(project, {early, late})
        assert project.inbox.copies()[late] == 0
    eventually(lambda: project.inbox.copies()[late] == 1, within_seconds=RECOVERY_SECONDS)


@pytest.mark.fault("F-H12")
@pytest.mark.timeout(300)
@pytest.mark.parametrize("service", KILLED)
def test_a_crash_under_load_loses_nothing(
    project: Containers, alice: httpx.Client, service: str
) -> None:
    """A container whose process is killed comes back by itself; every 201 becomes a mail."""
    restarts = int(project.inspect(project.ids(service)[0], "{{.RestartCount}}"))
    crashed = Event()
    with ThreadPoolExecutor(4) as pool:
        loads = [pool.submit(place_until, alice, crashed) for _ in range(4)]
        time.sleep(2)
        project.crash(service)
        time.sleep(3)
        crashed.set()
        order_ids = [order_id for load in loads for order_id in load.result(timeout=120)]
    project.wait()
    assert int(project.inspect(project.ids(service)[0], "{{.RestartCount}}")) > restarts
    assert len(order_ids) > 20
    eventually(
        lambda: set(order_ids) <= set(project.inbox.copies()), within_seconds=RECOVERY_SECONDS
    )
    copies = project.inbox.copies()
    assert max(copies[order_id] for order_id in order_ids) <= 2


def test_half_sent_requests_stop_nobody(project: Containers, alice: httpx.Client) -> None:
    """The proxy keeps a hundred half-sent heads and bodies from the API, and drops them."""
    host, port = project.api_url.removeprefix("http://").split(":")
    head = b"POST /v1/orders HTTP/1.1\r\nHost: x\r\n"
    with ExitStack() as stack:
        slow = [
            stack.enter_context(socket.create_connection((host, int(port)), 10)) for _ in range(100)
        ]
        for number, connection in enumerate(slow):
            body = b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{"
            connection.sendall(head + (body if number % 2 else b"X-Half:"))
        time.sleep(1)
        seconds = []
        for _ in range(3):
            began_at = time.monotonic()
            place(alice)
            seconds.append(time.monotonic() - began_at)
        assert min(seconds) < 1
        slow[0].settimeout(10)
        assert slow[0].recv(20).startswith(b"HTTP/1.1 408")


def test_without_the_order_database_mails_go_on(project: Containers, alice: httpx.Client) -> None:
    """The mail service does not notice; the API says 503 and when to come again."""
    with project.stopped("order-db"):
        order_id = f"foreign-{uuid.uuid4()}"
        value = {"orderId": order_id, "userId": 7, "amount": 100, "email": "minji@example.com"}
        producer = Producer({"bootstrap.servers": project.kafka})
        producer.produce("order-created", json.dumps(value).encode())
        assert producer.flush(15) == 0
        eventually(lambda: project.inbox.copies()[order_id] == 1, within_seconds=20)
        body = {"email": "minji@example.com", "items": [{"sku": "CUP-WHITE", "quantity": 1}]}
        refused = alice.post("/v1/orders", json=body, headers={"Idempotency-Key": order_id})
        assert refused.status_code == 503
        assert refused.headers["Retry-After"]
    assert alice.post("/v1/orders", json=body, headers={"Idempotency-Key": order_id}).is_success


def test_without_the_mail_database_orders_go_on(project: Containers, alice: httpx.Client) -> None:
    """Orders are taken and completed; their mails come when the ledger is back."""
    with project.stopped("mail-db"):
        order_id = place(alice)
        eventually(lambda: event_state(alice, order_id) == "COMPLETED", within_seconds=15)
        assert project.inbox.copies()[order_id] == 0
    eventually(lambda: project.inbox.copies()[order_id] == 1, within_seconds=RECOVERY_SECONDS)


@pytest.mark.parametrize(
    ("service", "own", "other"),
    [
        ("order-api", "order-db", "mail-db"),
        ("order-relay", "order-db", "mail-db"),
        ("mail", "mail-db", "order-db"),
    ],
)
def test_a_service_reaches_its_own_database_only(
    project: Containers, service: str, own: str, other: str
) -> None:
    """Neither by name nor by address is there a way to the other one's."""
    networks = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    address = project.inspect(project.ids(other)[0], networks)
    project.execute(service, "python3", "-c", CONNECT, own)
    for target in (other, address):
        with pytest.raises(AssertionError, match=r"gaierror|TimeoutError|unreachable"):
            project.execute(service, "python3", "-c", CONNECT, target)


def test_every_process_ends_cleanly_when_told(project: Containers) -> None:
    """After `docker compose stop` the exit codes are 0: nobody had to be killed."""
    names = ("order-api", "order-relay", "mail")
    with project.stopped(*names):
        codes = {
            name: [project.inspect(one, "{{.State.ExitCode}}") for one in project.ids(name)]
            for name in names
        }
        assert {code for found in codes.values() for code in found} == {"0"}, codes


def place_until(client: httpx.Client, stop: Event) -> list[str]:
    """Place orders, one after the other, at some ten a second."""
    order_ids = []
    while not stop.is_set():
        order_ids.append(place(client))
        time.sleep(0.1)
    return order_ids


def event_state(client: httpx.Client, order_id: str) -> str:
    """Return the state of an order's event, as the API shows it."""
    return str(client.get(f"/v1/orders/{order_id}").json()["event"]["state"])


def log_events(project: Containers, name: str) -> dict[str, list[dict[str, str]]]:
    """Return the log events of this name by mail replica."""
    found = defaultdict(list)
    for line in project.compose("logs", "--no-color", "mail").splitlines():
        # Compose may put control sequences before a name.
        written = re.search(r"(mail-\d+) +\| (?P<entry>\{.*\})", line)
        if written and f'"event": "{name}"' in written["entry"]:
            found[written[1]].append(json.loads(written["entry"]))
    return found


def partitions_placed(project: Containers) -> int:
    """Return how many replicas were given a partition since they started."""
    return len(log_events(project, "partition.placed"))


def sent_by(project: Containers, order_ids: list[str]) -> Counter[str]:
    """Count, by replica, which of these orders' mails it says it has sent."""
    wanted = set(order_ids)
    return Counter(
        replica
        for replica, entries in log_events(project, "mail.judged").items()
        for entry in entries
        if entry["verdict"] == "SENT" and entry["order_id"] in wanted
    )


def read_as_another_group(project: Containers, wanted: set[str]) -> set[str]:
    """Read the topic from its start in a group of one's own until the wanted keys were seen."""
    consumer = Consumer(
        {
            "bootstrap.servers": project.kafka,
            "group.id": f"somebody-else-{uuid.uuid4()}",
            "auto.offset.reset": "earliest",
        }
    )
    consumer.subscribe(["order-created"])
    seen: set[str] = set()
    try:
        deadline = time.monotonic() + 30
        while not wanted <= seen and time.monotonic() < deadline:
            message = consumer.poll(1)
            if message is not None and not message.error():
                seen.add(bytes(message.key() or b"").decode())
    finally:
        consumer.close()
    return seen
