"""A second terminal beside `make run`: its verbs, Kafka's tools, orders, their way, reconcile."""

import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest

from deploy.embedded.ports import HOST
from tests.support.world import eventually

REPOSITORY = Path(__file__).parents[2]
COMMAND_SECONDS = 150
# The first use of a console tool downloads it.
DOWNLOAD_SECONDS = 170
BACK_SECONDS = 30
# A replica that cannot say goodbye to the group, being in the middle of its rebalance, keeps its
# partitions for 45 s.
MAIL_SECONDS = 90
END_SECONDS = 60
INFRASTRUCTURE = ["kafka", "order-db", "mail-db", "inbox"]
PARTS = [*INFRASTRUCTURE, "order-api", "order-relay", "mail-1", "mail-2"]


@dataclass(frozen=True)
class Terminal:
    """A second terminal on the pair of this state directory."""

    root: Path

    def run(
        self, *argv: str, typed: str = "", seconds: float = COMMAND_SECONDS
    ) -> subprocess.CompletedProcess[str]:
        """Run one of the pair's commands, from a directory that is not ours."""
        return subprocess.run(
            [self.root / "bin" / argv[0], *argv[1:]],
            cwd=self.root,
            input=typed,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )

    def good(self, *argv: str, typed: str = "", seconds: float = COMMAND_SECONDS) -> str:
        """Return what one of the pair's commands prints."""
        done = self.run(*argv, typed=typed, seconds=seconds)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def parts(self) -> dict[str, dict[str, Any]]:
        """Return what `stack ps` says of each part."""
        return {part["name"]: part for part in json.loads(self.good("stack", "ps", "--json"))}

    def running_replicas(self) -> list[str]:
        """Name the mail replicas that are up."""
        parts = self.parts().values()
        replicas = [part for part in parts if re.fullmatch(r"mail-\d+", part["name"])]
        return [replica["name"] for replica in replicas if replica["phase"] == "ready"]

    def sql(self, service: str, statement: str, *values: object) -> list[tuple[Any, ...]]:
        """Run a statement in a service's database."""
        wrapper = shlex.split((self.root / "bin" / service).read_text())
        (url,) = [word.partition("=")[2] for word in wrapper if word.startswith("DATABASE_URL=")]
        connection = psycopg2.connect(url.replace("+psycopg2", ""))
        try:
            with connection, connection.cursor() as cursor:
                cursor.execute(statement, values)
                return cursor.fetchall() if cursor.description else []
        finally:
            connection.close()

    def place(self, count: int) -> list[str]:
        """Place orders and return their ids."""
        done = pair("orders", str(count), "--json", "--state", str(self.root))
        assert done.returncode == 0, done.stderr
        order_ids: list[str] = json.loads(done.stdout)
        assert len(set(order_ids)) == count
        return order_ids

    def sent(self, order_ids: Sequence[str]) -> list[str]:
        """Return which of these the ledger has SENT in one attempt."""
        rows = self.sql(
            "mail-service",
            "SELECT order_id FROM deliveries WHERE state = 'SENT' AND attempts = 1"
            " AND unknown_count = 0 AND order_id = ANY(%s)",
            list(order_ids),
        )
        return [order_id for (order_id,) in rows]

    def await_sent(self, order_ids: Sequence[str]) -> None:
        """Wait until all of these are SENT."""
        eventually(
            lambda: sorted(self.sent(order_ids)) == sorted(order_ids), within_seconds=MAIL_SECONDS
        )

    def copies(self) -> Counter[str]:
        """Count the mails in the inbox of each order."""
        with closing(sqlite3.connect(self.root / "inbox/mails.sqlite")) as inbox:
            mails = [source for (source,) in inbox.execute("SELECT source FROM message")]
        return Counter(re.findall(r"^X-Order-Id: (\S+)", "\n".join(mails), re.MULTILINE))


@pytest.fixture(scope="module")
def terminal(root: Path) -> Iterator[Terminal]:
    """Keep `make run`'s command up; its end leaves no note and no process."""
    state = root / "run"
    argv = [sys.executable, "-m", "deploy.embedded", "run", "--free-ports", "--state", str(state)]
    with subprocess.Popen(argv, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as run:
        try:
            assert run.stdout is not None
            assert any("Up until Ctrl-C" in line for line in run.stdout)
            # What it goes on to print is not to fill the pipe.
            threading.Thread(target=run.stdout.read, daemon=True).start()
            yield Terminal(state)
        finally:
            family = psutil.Process(run.pid).children(recursive=True)
            run.send_signal(signal.SIGINT)
            code = run.wait(END_SECONDS)
    assert code == 0
    assert not (state / "control.json").exists()
    assert not [process for process in family if process.is_running()]


def pair(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m deploy.pair` to its end."""
    argv = [sys.executable, "-m", "deploy.pair", *arguments]
    return subprocess.run(
        argv, cwd=REPOSITORY, capture_output=True, text=True, timeout=COMMAND_SECONDS, check=False
    )


def embedded(*arguments: str, typed: str = "") -> subprocess.CompletedProcess[str]:
    """Run `python -m deploy.embedded` to its end, with lines on its standard input."""
    return subprocess.run(
        [sys.executable, "-m", "deploy.embedded", *arguments],
        cwd=REPOSITORY,
        env={name: value for name, value in os.environ.items() if name != "SHELL"},
        input=typed,
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=False,
    )


def test_ps_lists_every_part(terminal: Terminal) -> None:
    """Name, phase, process id and age, for people and for scripts."""
    parts = terminal.parts()
    assert list(parts) == PARTS
    assert {part["phase"] for part in parts.values()} == {"ready"}
    assert all(psutil.pid_exists(part["pid"]) for part in parts.values())
    assert all(part["age_seconds"] > 0 for part in parts.values())
    header, *lines = terminal.good("stack", "ps").splitlines()
    assert header.split() == ["NAME", "PHASE", "PID", "AGE"]
    for line, part in zip(lines, parts.values(), strict=True):
        assert line.split()[:3] == [part["name"], "ready", str(part["pid"])]


def test_what_was_stopped_stays_stopped_until_it_is_started(terminal: Terminal) -> None:
    """`stop` ends the process for good, `start` brings a new one."""
    before = terminal.parts()["order-api"]["pid"]
    assert terminal.good("stack", "stop", "order-api") == "order-api  stopped\n"
    assert not psutil.pid_exists(before)
    time.sleep(1.5)
    stopped = terminal.parts()["order-api"]
    assert (stopped["phase"], stopped["pid"], stopped["age_seconds"]) == ("stopped", None, None)
    done = terminal.run("stack", "kill", "order-api")
    assert (done.returncode, done.stderr) == (3, "not running: order-api\n")
    assert terminal.good("stack", "start", "order-api") == "order-api  started\n"
    assert terminal.parts()["order-api"]["phase"] == "ready"
    terminal.await_sent(terminal.place(4))


def test_what_was_killed_comes_back_and_loses_nothing(terminal: Terminal) -> None:
    """A killed relay is a crash: it is started again, and publishes what waited."""
    before = terminal.parts()["order-relay"]["pid"]
    assert terminal.good("stack", "kill", "order-relay") == "order-relay  killed, comes back\n"
    order_ids = terminal.place(4)
    eventually(
        lambda: terminal.parts()["order-relay"]["phase"] == "ready", within_seconds=BACK_SECONDS
    )
    assert terminal.parts()["order-relay"]["pid"] != before
    terminal.await_sent(order_ids)


@pytest.mark.timeout(400)
def test_replicas_come_and_go_while_orders_flow(terminal: Terminal) -> None:
    """Three replicas, then one: every order is mailed once."""
    order_ids = []
    for count in (3, 1):
        with flowing(terminal, 60) as placed:
            terminal.good("stack", "scale", f"mail={count}")
            wanted = [f"mail-{number}" for number in range(1, count + 1)]
            assert terminal.running_replicas() == wanted
        order_ids += placed
    terminal.await_sent(order_ids)
    eventually(lambda: not set(order_ids) - set(terminal.copies()), within_seconds=MAIL_SECONDS)
    copies = terminal.copies()
    assert {order_id: copies[order_id] for order_id in order_ids if copies[order_id] != 1} == {}


@contextmanager
def flowing(terminal: Terminal, count: int) -> Iterator[list[str]]:
    """Place orders beside the block; their ids are there after it."""
    order_ids: list[str] = []
    flow = threading.Thread(target=lambda: order_ids.extend(terminal.place(count)))
    flow.start()
    yield order_ids
    flow.join(COMMAND_SECONDS)
    assert len(order_ids) == count


@pytest.mark.parametrize(
    ("argv", "code", "message"),
    [
        (["stop", "mial-1"], 2, "there is no part mial-1; there are kafka, order-db, mail-db"),
        (["logs", "mial-1"], 2, "there is no log of mial-1; there are inbox, kafka, mail-1"),
        (["scale", "order-db=2"], 2, "order-db cannot be scaled"),
        (["scale", "mail"], 2, "write mail=3"),
        (["dance"], 2, "dance"),
        (["start"], 2, "PART"),
    ],
)
def test_what_makes_no_sense_is_told(
    terminal: Terminal, argv: list[str], code: int, message: str
) -> None:
    """An exit code of 2, and a message with what there is."""
    done = terminal.run("stack", *argv)
    assert (done.returncode, done.stdout) == (code, "")
    assert message in done.stderr


def hear_interrupts() -> None:
    """Heed SIGINT, which a shell's background jobs and their children ignore."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_logs_are_printed_and_followed(terminal: Terminal) -> None:
    """The last lines, and with -f each that comes, until Ctrl-C."""
    printed = terminal.good("stack", "logs", "order-relay").splitlines()
    assert any("relay.activated" in line for line in printed)
    argv = [terminal.root / "bin/stack", "logs", "-f", "order-relay"]
    with subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        text=True,
        preexec_fn=hear_interrupts,  # noqa: PLW1509 - a signal, no lock
    ) as follower:
        assert follower.stdout is not None
        assert [follower.stdout.readline().rstrip("\n") for _ in printed] == printed
        terminal.good("stack", "stop", "order-relay")
        assert any("relay.deactivated" in line for line in follower.stdout)
        follower.send_signal(signal.SIGINT)
        assert follower.wait(COMMAND_SECONDS) == 130
    terminal.good("stack", "start", "order-relay")


def test_kafkas_own_tools_find_the_broker(terminal: Terminal) -> None:
    """Topics, a record there and back, the group's lag; nothing is to be said of an address."""
    listed = terminal.good("kafka-topics", "--list", seconds=DOWNLOAD_SECONDS)
    assert "order-created" in listed.splitlines()
    terminal.good("kafka-topics", "--create", "--topic", "greetings", "--partitions", "1")
    terminal.good("kafka-console-producer", "--topic", "greetings", typed="안녕, broker\n")
    consume = ("kafka-console-consumer", "--topic", "greetings", "--from-beginning")
    assert terminal.good(*consume, "--max-messages", "1") == "안녕, broker\n"
    group = terminal.good("kafka-consumer-groups", "--describe", "--group", "mail-service")
    rows = [line.split() for line in group.splitlines() if "order-created" in line]
    assert sorted(row[2] for row in rows) == ["0", "1", "2"]


def test_a_tool_may_be_sent_to_another_broker(terminal: Terminal) -> None:
    """`--bootstrap-server` is filled in unless it is given; warnings go to standard error."""
    argv = [terminal.root / "bin/kafka-topics", "--bootstrap-server=127.0.0.1:9", "--list"]
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as another:
        assert another.stdout is not None
        assert another.stderr is not None
        assert "WARN" in (warning := another.stderr.readline())
        assert "127.0.0.1:9" in warning
        another.terminate()
        assert another.stdout.read() == ""


def test_a_shell_has_commands_addresses_and_a_token(terminal: Terminal) -> None:
    """Lines typed into `make shell` do what they do in a terminal."""
    typed = """
        set -eu
        echo "$API $INBOX $KAFKA_BOOTSTRAP_SERVERS"
        curl -s -f "$API/v1/orders" -H "Authorization: Bearer $TOKEN"
        order-service topics list
        mail-service --help
        stack ps
        exit 7
    """
    done = embedded("shell", "--state", str(terminal.root), typed=typed)
    assert done.returncode == 7, done.stderr
    assert re.match(r"http://127\.0\.0\.1:\d+ http://127\.0\.0\.1:\d+ 127", done.stdout)
    for expected in ('"items":', "order-created", "Usage: mail-service", "mail-2"):
        assert expected in done.stdout
    assert "Commands: order-service" in done.stderr


def test_without_a_running_pair_it_says_so(root: Path) -> None:
    """One message that says how to start one."""
    nowhere = str(root / "nowhere")
    shell = embedded("shell", "--state", nowhere)
    assert (shell.returncode, shell.stdout) == (2, "")
    for verb in (["order", "x"], ["orders", "1"], ["reconcile"]):
        done = pair(*verb, "--state", nowhere)
        assert (done.returncode, done.stdout) == (3, "")
        assert done.stderr == shell.stderr
    assert shell.stderr == f"no pair is running on {nowhere}; start one with: make run\n"


def test_an_orders_way_is_told_hop_by_hop(terminal: Terminal) -> None:
    """Accepted, PUBLISHED, COMPLETED, taken in, SENT: in milliseconds after its acceptance."""
    (order_id,) = terminal.place(1)
    terminal.await_sent([order_id])
    eventually(
        lambda: (
            '"COMPLETED"' in terminal.good("order-service", "outbox", "show", order_id, "--json")
        ),
        within_seconds=MAIL_SECONDS,
    )
    done = pair("order", order_id, "--state", str(terminal.root))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    hops = [re.fullmatch(r" +(\d+) ms  (\S{29})  (.*)", line) for line in lines]
    told = [hop.groups() for hop in hops if hop]
    assert told[0][0] == "0"
    assert [int(ms) for ms, _, _ in told] == sorted(int(ms) for ms, _, _ in told)
    what = "\n".join(what for _, _, what in told)
    assert re.search(r"^accepted: INIT$", what, re.MULTILINE)
    assert re.search(r"^INIT → PUBLISHED, partition \d, offset \d+$", what, re.MULTILINE)
    assert re.search(r"^COMPLETED: read back from the topic, partition", what, re.MULTILINE)
    assert re.search(r"^mail taken in$", what, re.MULTILINE)
    message_id = f"<order-confirmation.{order_id}@teahouse.example>"
    sent = rf"^mail SENT by mail-service-\S+ after 1 attempt: 250 .*, {re.escape(message_id)}$"
    assert re.search(sent, what, re.MULTILINE)


def test_an_order_under_way_a_purged_one_and_an_unknown_one(terminal: Terminal) -> None:
    """What one side has not, is said; what neither has, ends with 1."""
    terminal.good("stack", "stop", "order-relay")
    (order_id,) = terminal.place(1)
    state = ("--state", str(terminal.root))
    done = pair("order", order_id, *state)
    assert done.returncode == 0
    assert "event now INIT" in done.stdout
    assert "No mail: the ledger does not know it." in done.stdout
    terminal.good("stack", "start", "order-relay")
    terminal.await_sent([order_id])
    terminal.sql("order-service", "DELETE FROM outbox WHERE aggregateid = %s", order_id)
    done = pair("order", order_id, *state)
    assert done.returncode == 0
    assert "No outbox row: COMPLETED over 14 days ago and purged" in done.stdout
    assert "mail SENT by" in done.stdout
    done = pair("order", str(uuid.uuid4()), *state)
    assert (done.returncode, done.stdout) == (1, "")


def test_the_commands_may_be_anybodys(terminal: Terminal, root: Path) -> None:
    """Named on the command line they need no stack of ours, as in containers."""
    (order_id,) = terminal.place(1)
    done = pair(
        *("order", order_id, "--state", str(root / "nowhere")),
        *("--order-service", f"env SEEN=1 {terminal.root}/bin/order-service"),
        *("--mail-service", f"env SEEN=1 {terminal.root}/bin/mail-service"),
    )
    assert done.returncode == 0, done.stderr
    assert "accepted: INIT" in done.stdout


def test_orders_differ_and_are_printed(terminal: Terminal) -> None:
    """Five ids, five recipients, both languages."""
    done = pair("orders", "5", "--state", str(terminal.root))
    assert done.returncode == 0, done.stderr
    order_ids = done.stdout.split()
    rows = terminal.sql(
        "order-service",
        "SELECT email, locale, (SELECT count(*) FROM order_items WHERE order_id = orders.id)"
        " FROM orders WHERE id = ANY(CAST(%s AS uuid[]))",
        order_ids,
    )
    assert len({email for email, _, _ in rows}) == 5
    assert {locale for _, locale, _ in rows} == {"ko", "en"}
    assert {lines for _, _, lines in rows} == {1, 2, 3, 4, 5}


class Limiter(BaseHTTPRequestHandler):
    """Answers 429 to the first of each key, and for ever to the recipient it dislikes."""

    seen: list[str]

    def do_POST(self) -> None:
        """Answer an order."""
        key = self.headers["Idempotency-Key"]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        is_disliked = body["email"] == "customer-3@example.com"
        is_first = key not in self.seen
        self.seen.append(key)
        self.send_response(429 if is_first or is_disliked else 201)
        self.send_header("Retry-After", "3600" if is_disliked else "1")
        answer = json.dumps({"id": key}).encode()
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_a_429_is_waited_for_within_reason() -> None:
    """The same key comes again after Retry-After; an hour is too long, and the code is 3."""
    Limiter.seen = []
    with ThreadingHTTPServer((HOST, 0), Limiter) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        where = ("--order-service", "echo", "--api", f"http://{HOST}:{server.server_port}")
        good, bad = pair("orders", "2", *where), pair("orders", "3", *where)
        server.shutdown()
    assert (good.returncode, len(good.stdout.split())) == (0, 2)
    assert (bad.returncode, len(bad.stdout.split())) == (3, 2)
    assert "not placed: answered 429" in bad.stderr
    assert sorted(Counter(Limiter.seen).values()) == [1, 2, 2, 2, 2]


def reconcile(terminal: Terminal, since: datetime, code: int) -> dict[str, Any]:
    """Reconcile orders and mails since a moment, which must end with this code."""
    asked = ("reconcile", "--from", since.isoformat(), "--state", str(terminal.root))
    table = pair(*asked)
    assert table.returncode == code, table.stdout + table.stderr
    done = pair(*asked, "--json")
    assert done.returncode == code, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    for word, name in (("missing", "missing"), ("ghost", "ghosts"), ("double", "doubles")):
        assert re.search(rf"^ +{word} +{len(found[name])}$", table.stdout, re.MULTILINE)
        for order_id in found[name]:
            assert f"\n{word}  {order_id}\n" in table.stdout
    return found


def findings(found: dict[str, Any]) -> tuple[list[str], list[str], list[str], list[str]]:
    """Return the four lists that should be empty."""
    return found["missing"], found["ghosts"], found["doubles"], found["unread"]


@pytest.mark.timeout(400)
def test_reconcile_of_a_pair_that_works_finds_nothing(terminal: Terminal) -> None:
    """Orders that are mailed, or wait for a replica or the relay, are as they should be."""
    since = datetime.now(UTC)
    mailed = terminal.place(6)
    terminal.await_sent(mailed)
    terminal.good("stack", "scale", "mail=0")
    waiting = terminal.place(3)
    eventually(
        lambda: (
            terminal.sql(
                "order-service",
                "SELECT count(*) FROM outbox WHERE state = 'COMPLETED' AND aggregateid = ANY(%s)",
                waiting,
            )
            == [(3,)]
        ),
        within_seconds=MAIL_SECONDS,
    )
    terminal.good("stack", "stop", "order-relay")
    terminal.place(2)
    found = reconcile(terminal, since, 0)
    assert findings(found) == ([], [], [], [])
    assert (found["orders"], found["with_event"]) == (11, 9)
    assert (found["on_their_way"], found["waiting"], found["mails"]) == (2, 3, {"SENT": 6})
    terminal.good("stack", "start", "order-relay")
    terminal.good("stack", "scale", "mail=2")


def test_reconcile_names_an_order_without_a_mail(terminal: Terminal) -> None:
    """A ledger row that is gone."""
    since = datetime.now(UTC)
    order_id, other = terminal.place(2)
    terminal.await_sent([order_id, other])
    terminal.sql("mail-service", "DELETE FROM deliveries WHERE order_id = %s", order_id)
    assert findings(reconcile(terminal, since, 1)) == ([order_id], [], [], [])


def test_reconcile_names_a_mail_without_an_order(terminal: Terminal) -> None:
    """One of a producer that is not ours, and one whose order is gone from our database."""
    since = datetime.now(UTC)
    foreign = f"foreign-{uuid.uuid4()}"
    event = {"orderId": foreign, "userId": "u", "amount": "1000", "email": "a@example.com"}
    terminal.good(
        "kafka-console-producer", "--topic", "order-created", typed=json.dumps(event) + "\n"
    )
    gone, kept = terminal.place(2)
    terminal.await_sent([foreign, gone, kept])
    terminal.sql("order-service", "DELETE FROM order_items WHERE order_id = CAST(%s AS uuid)", gone)
    terminal.sql("order-service", "DELETE FROM orders WHERE id = CAST(%s AS uuid)", gone)
    assert findings(reconcile(terminal, since, 1)) == ([], sorted([foreign, gone]), [], [])


def test_reconcile_names_a_mail_that_may_have_gone_out_twice(terminal: Terminal) -> None:
    """SENT after an attempt whose end nobody knows."""
    since = datetime.now(UTC)
    order_id, other = terminal.place(2)
    terminal.await_sent([order_id, other])
    terminal.sql(
        "mail-service", "UPDATE deliveries SET unknown_count = 1 WHERE order_id = %s", order_id
    )
    assert findings(reconcile(terminal, since, 1)) == ([], [], [order_id], [])


def test_reconcile_that_cannot_ask_a_side_says_which(terminal: Terminal) -> None:
    """A service that fails ends with 3, and a time without an offset with 2."""
    asked = ("reconcile", "--state", str(terminal.root))
    done = pair(*asked, "--mail-service", "sh -c 'echo no ledger >&2; exit 1'")
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.endswith("no ledger\n")
    assert pair(*asked, "--mail-service", "echo hello").returncode == 3
    assert pair(*asked, "--mail-service", "no-such-program").returncode == 3
    done = pair(*asked, "--from", "2026-11-20T00:00")
    assert done.returncode == 2
    assert "names no offset from UTC" in done.stderr
