"""How an order's way is told when it is not over, or not straight."""

from typing import Any

from deploy.hops import hops

EVENT = {
    "state": "COMPLETED",
    "partition": 1,
    "offset": 7,
    "occurred_at": "2026-11-21 10:00:00+00:00",
    "published_at": "2026-11-21 10:00:00.004+00:00",
    "completed_at": "2026-11-21 10:00:00.006+00:00",
    "reason": None,
}
MAIL = {
    "campaign": "",
    "state": "RETRY",
    "attempts": 2,
    "message_id": "<m@example.com>",
    "taken_in_at": "2026-11-21 10:00:00.005+00:00",
    "due_at": "2026-11-21 10:05:00+00:00",
    "owner": None,
    "reason": "450 later",
    "sent_at": None,
    "sent_by": None,
    "reply": None,
}


def told(event: dict[str, Any], *mails: dict[str, Any]) -> list[str]:
    return [hop.what for hop in hops([EVENT | event], [MAIL | mail for mail in mails])]


def test_hops_are_told_in_the_order_of_time() -> None:
    """The mail side may be faster than the read-back; what has no time comes last."""
    now = "mail now RETRY after 2 attempts, due 2026-11-21 10:05:00+00:00: 450 later"
    assert told({}, {}) == [
        "accepted: INIT",
        "INIT → PUBLISHED, partition 1, offset 7",
        "mail taken in",
        "COMPLETED: read back from the topic, partition 1, offset 7",
        f"{now}, <m@example.com>",
    ]


def test_an_event_that_is_not_in_the_topic_says_why() -> None:
    """FAILED is a state with a reason and without a time."""
    failed = {"state": "FAILED", "published_at": None, "completed_at": None, "reason": "too large"}
    assert told(failed) == ["accepted: INIT", "event now FAILED: too large"]


def test_every_campaign_is_told() -> None:
    """A mail under way names its replica, a resend its campaign."""
    sending = {"state": "SENDING", "attempts": 1, "owner": "mail-2", "due_at": None, "reason": None}
    sent = {
        "campaign": "again",
        "state": "SENT",
        "attempts": 1,
        "taken_in_at": "2026-11-21 11:00:00+00:00",
        "sent_at": "2026-11-21 11:00:01+00:00",
        "sent_by": "mail-1",
        "reply": "250 OK",
    }
    assert told({}, sending, sent)[-3:] == [
        "mail of campaign again taken in",
        "mail of campaign again SENT by mail-1 after 1 attempt: 250 OK, <m@example.com>",
        "mail now SENDING of mail-2 after 1 attempt, <m@example.com>",
    ]
