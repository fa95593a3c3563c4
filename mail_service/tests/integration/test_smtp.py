"""One kept connection, against a relay that writes down what it accepted."""

import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator

import pytest
from sink import Rule, Sink
from sink import Stage as At

from mail_service.dialogues import finish
from mail_service.replies import Answer, Stage
from mail_service.settings import TEST_TIMING
from mail_service.smtp import CannotAddress, Relay, SmtpConnection

CONTENT = b"Message-ID: <1@shop.example>\r\nX-Order-Id: order-1\r\n\r\nHello\r\n"
TIMING = dataclasses.replace(TEST_TIMING, final_dot_seconds=3.0)
Deliver = Callable[..., Answer]


def relay(port: int) -> Relay:
    """Return the relay at a port, impatient after the final dot."""
    return Relay("127.0.0.1", port, "off", None, None, TIMING)


@pytest.fixture
def connection(sink: Sink) -> Iterator[SmtpConnection]:
    """Return a connection that is not yet open."""
    connection = SmtpConnection(relay(sink.port))
    yield connection
    finish(connection.close())


@pytest.fixture
def deliver(connection: SmtpConnection) -> Deliver:
    """Return how one mail is delivered."""

    def deliver(
        content: bytes = CONTENT,
        *,
        recipient: str = "minji@example.com",
        may_finish: Callable[[], bool] = lambda: True,
    ) -> Answer:
        return finish(
            connection.deliver(
                content, sender="orders@shop.example", recipient=recipient, may_finish=may_finish
            )
        )

    return deliver


def test_an_accepted_mail_is_answered_with_the_relays_words(sink: Sink, deliver: Deliver) -> None:
    """The 250 to the final dot is the end, and the journal has sender, recipient and names."""
    answer = deliver()

    assert answer == Answer(Stage.FINAL_DOT, 250, "2.0.0 accepted")
    (mail,) = sink.accepted()
    assert (mail.sender, mail.recipient) == ("orders@shop.example", "minji@example.com")
    assert (mail.message_id, mail.order_id) == ("<1@shop.example>", "order-1")


def test_a_kept_connection_is_used_again(sink: Sink, deliver: Deliver) -> None:
    """Mails go one after the other over one connection, refused ones between them."""
    sink.script(Rule("rcpt", "451 4.7.1 later", times=1, to="later"))

    for recipient in ("a@example.com", "later@example.com", "b@example.com", "c@example.com"):
        deliver(recipient=recipient)

    assert len(sink.accepted()) == 3
    assert len({mail.connection for mail in sink.accepted()}) == 1


@pytest.mark.parametrize(
    ("stage", "at", "code"),
    [
        ("banner", Stage.CONNECT, 554),
        ("ehlo", Stage.CONNECT, 550),
        ("mail", Stage.MAIL, 451),
        ("mail", Stage.MAIL, 550),
        ("rcpt", Stage.RCPT, 451),
        ("rcpt", Stage.RCPT, 550),
        ("data", Stage.DATA, 451),
        ("data", Stage.DATA, 554),
        ("dot", Stage.FINAL_DOT, 451),
        ("dot", Stage.FINAL_DOT, 554),
    ],
)
def test_a_refusal_is_answered_with_its_stage(
    sink: Sink, deliver: Deliver, stage: At, at: Stage, code: int
) -> None:
    """Code, text and how far the dialogue was are what a verdict needs; then mails go on."""
    # A refused EHLO is followed by HELO.
    times = 2 if stage == "ehlo" else 1
    sink.script(Rule(stage, f"{code} 5.7.1 go away", times=times))

    answer = deliver()

    assert answer == Answer(at, code, "5.7.1 go away")
    assert sink.accepted() == []
    assert deliver().code == 250


@pytest.mark.parametrize(
    ("stage", "at"),
    [
        ("banner", Stage.CONNECT),
        ("mail", Stage.MAIL),
        ("rcpt", Stage.RCPT),
        ("data", Stage.DATA),
        ("dot", Stage.FINAL_DOT),
    ],
)
def test_a_relay_that_says_421_and_hangs_up_is_heard(
    sink: Sink, deliver: Deliver, stage: At, at: Stage
) -> None:
    """What it said before it closed is the answer, and the next mail opens a new connection."""
    sink.script(Rule(stage, "421 4.3.2 shutting down", times=1))

    assert deliver() == Answer(at, 421, "4.3.2 shutting down")

    assert deliver().code == 250


@pytest.mark.parametrize(
    ("stage", "at"),
    [
        ("banner", Stage.CONNECT),
        ("ehlo", Stage.CONNECT),
        ("mail", Stage.MAIL),
        ("rcpt", Stage.RCPT),
        ("data", Stage.DATA),
    ],
)
def test_a_connection_lost_before_the_dot_is_answered_with_its_stage(
    sink: Sink, deliver: Deliver, stage: At, at: Stage
) -> None:
    """No code: nothing was sent, and a new connection may try again."""
    sink.script(Rule(stage, "drop", times=1))

    answer = deliver()

    assert (answer.stage, answer.code) == (at, None)
    assert sink.accepted() == []
    assert deliver().code == 250


@pytest.mark.fault("F-S19")
def test_a_connection_closed_while_idle_is_opened_again(sink: Sink, deliver: Deliver) -> None:
    """Nothing was said yet, so nobody hears of it."""
    deliver()
    sink.stop()
    sink.start()

    answer = deliver(recipient="second@example.com")

    assert answer.code == 250
    assert [mail.recipient for mail in sink.accepted()] == [
        "minji@example.com",
        "second@example.com",
    ]


@pytest.mark.fault("F-S19")
def test_a_connection_that_was_told_to_go_while_idle_is_opened_again(
    sink: Sink, deliver: Deliver
) -> None:
    """A 421 that lay in it is of the connection; a relay in trouble says it to the next one too."""
    deliver()
    sink.script(Rule("mail", "421 4.4.2 idle for too long", times=1))

    assert deliver(recipient="second@example.com").code == 250

    assert len({mail.connection for mail in sink.accepted()}) == 2


def test_a_relay_that_is_down_is_answered_as_not_connected(sink: Sink, deliver: Deliver) -> None:
    """A refused connect is no exception."""
    sink.stop()

    answer = deliver()

    assert (answer.stage, answer.code) == (Stage.CONNECT, None)
    assert "ConnectionRefused" in answer.text


def test_a_relay_that_went_down_while_idle_is_answered_as_not_connected(
    sink: Sink, deliver: Deliver
) -> None:
    """The attempt to reconnect fails like any other."""
    deliver()
    sink.stop()

    answer = deliver()

    assert (answer.stage, answer.code) == (Stage.CONNECT, None)


def test_a_link_that_breaks_after_the_dot_leaves_it_open(sink: Sink, deliver: Deliver) -> None:
    """The relay has the mail and we cannot know: no code, and no second dialogue by itself."""
    deliver()
    sink.script(Rule("dot", "drop"))

    answer = deliver(recipient="second@example.com")

    assert (answer.stage, answer.code) == (Stage.FINAL_DOT, None)
    assert [mail.recipient for mail in sink.accepted()] == [
        "minji@example.com",
        "second@example.com",
    ]


def test_a_relay_silent_after_the_dot_leaves_it_open(sink: Sink, deliver: Deliver) -> None:
    """Time running out after the dot says nothing of the mail."""
    sink.script(Rule("dot", "delay:6", times=1))

    answer = deliver()

    assert (answer.stage, answer.code) == (Stage.FINAL_DOT, None)
    assert len(sink.accepted()) == 1
    assert deliver().code == 250


def test_a_slow_answer_to_the_dot_is_waited_for(sink: Sink, deliver: Deliver) -> None:
    """A relay may take its time."""
    sink.script(Rule("dot", "delay:0.5"))

    assert deliver().code == 250


def test_a_lease_lost_before_the_dot_sends_nothing(sink: Sink, deliver: Deliver) -> None:
    """The content went out, the dot did not: the relay has no mail."""
    answer = deliver(may_finish=lambda: False)

    assert (answer.stage, answer.code) == (Stage.STOPPED, None)
    assert deliver(recipient="next@example.com").code == 250
    assert [mail.recipient for mail in sink.accepted()] == ["next@example.com"]


def test_the_lease_is_asked_for_when_only_the_dot_is_left(sink: Sink, deliver: Deliver) -> None:
    """A lease that ends in a slow dialogue is noticed."""
    sink.script(Rule("data", "delay:0.3"))
    began_at = time.monotonic()
    asked_at: list[float] = []

    def may_finish() -> bool:
        asked_at.append(time.monotonic())
        return True

    deliver(may_finish=may_finish)

    assert [at - began_at >= 0.3 for at in asked_at] == [True]


@pytest.mark.parametrize(
    "content",
    [
        b"A: b\r\n\r\n.\r\n",
        b"A: b\r\n\r\n..\r\n",
        b"A: b\r\n\r\n.hidden\r\n.\r\nMAIL FROM:<x@y>\r\n.\r\n",
        b"A: b\r\n\r\n\r\n.\r\n\r\n",
        b".: dot first\r\n\r\n",
        b"A: b\r\n\r\n" + "한국어\r\n".encode(),
        b"A: b\r\n\r\n" + b"x" * 990 + b"\r\n",
        b"A: b\r\n\r\n" + b"line\r\n" * 20_000,
    ],
    ids=["dot", "two dots", "commands", "empty lines", "first", "8 bit", "long line", "120 kB"],
)
def test_the_content_arrives_byte_by_byte(sink: Sink, deliver: Deliver, content: bytes) -> None:
    """No line ends a mail, or is changed, whatever it looks like."""
    assert deliver(content).code == 250

    (mail,) = sink.accepted()
    assert mail.sha256 == hashlib.sha256(content).hexdigest()


def test_a_reply_can_be_written_to_the_ledger(sink: Sink, deliver: Deliver) -> None:
    """It is short and printable, whatever the relay said: PostgreSQL takes no NUL."""
    sink.script(Rule("dot", f"250 2.0.0 ok \x00\x1b[31m {'x' * 400}"))

    answer = deliver()

    assert answer.code == 250
    assert answer.text.isprintable()
    assert len(answer.text) <= 300


@pytest.mark.parametrize(
    "recipient", ["a\r\nDATA@example.com", "a b@example.com", "a>@example.com"]
)
def test_a_recipient_the_protocol_cannot_say_is_no_answer_of_the_relays(
    sink: Sink, deliver: Deliver, recipient: str
) -> None:
    """One mail is given up on, and the connection is kept."""
    with pytest.raises(CannotAddress):
        deliver(recipient=recipient)

    assert deliver().code == 250
    assert len(sink.accepted()) == 1


def test_a_farewell_that_is_answered_badly_is_no_error(sink: Sink) -> None:
    """After the 250 nothing counts."""
    connection = SmtpConnection(relay(sink.port))
    sent = finish(
        connection.deliver(
            CONTENT, sender="a@b.example", recipient="c@d.example", may_finish=lambda: True
        )
    )
    sink.kill()

    finish(connection.close())

    assert sent.code == 250


def test_a_reply_too_long_to_be_read_leaves_it_unknown(sink: Sink, deliver: Deliver) -> None:
    """After the dot only the relay can refuse: smtplib's own complaint is no refusal."""
    sink.script(Rule("dot", f"250 {'x' * 200_000}", times=1))

    answer = deliver()

    assert (answer.stage, answer.code) == (Stage.FINAL_DOT, None)
    assert len(sink.accepted()) == 1
    assert deliver().code == 250
