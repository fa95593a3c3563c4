"""Orders against mails: what is missing, what is a ghost, what went out twice."""

from typing import Any

from deploy.pair import Reconciled, join


def order_side(**changes: Any) -> dict[str, Any]:
    """Return a report of the order side."""
    ids = {"with_event": [], "on_their_way": [], "outside_retention": [], "missing": []}
    ids |= changes.pop("order_ids", {})
    counts = {name: len(found) for name, found in ids.items() if name != "missing"}
    return {
        "orders": sum(map(len, ids.values())),
        "repeated_events": 0,
        "missing": ids["missing"],
        "ghosts": [],
        **counts,
        **changes,
        "order_ids": ids,
    }


def mail_side(**changes: Any) -> dict[str, Any]:
    """Return a report of the mail side."""
    ids = changes.pop("order_ids", {})
    return {
        "records": 0,
        "orders": 0,
        "states": {state: len(found) for state, found in ids.items()},
        "waiting": [],
        "missing": [],
        "doubles": [],
        "unread": [],
        "dead_letters": 0,
        **changes,
        "order_ids": ids,
    }


def joined(order: dict[str, Any], mail: dict[str, Any]) -> Reconciled:
    return join(order, mail, since="2026-11-20T00:00Z", until="2026-11-21T00:00Z")


def test_orders_that_are_mailed_or_under_way_are_no_finding() -> None:
    """SENT, open, waiting in the topic, and not yet in the topic: all are as they should be."""
    order = order_side(order_ids={"with_event": ["a", "b", "c"], "on_their_way": ["d"]})
    mail = mail_side(order_ids={"SENT": ["a"], "RETRY": ["b"]}, waiting=["c"])
    found = joined(order, mail)
    assert not any(found.findings().values())
    assert (found.orders, found.with_event, found.on_their_way, found.waiting) == (4, 3, 1, 1)
    assert found.mails == {"SENT": 1, "RETRY": 1}


def test_an_order_without_a_row_is_missing_wherever_its_event_is() -> None:
    """In the topic, lost from it, or too old for it: no ledger row, no mail."""
    ids = {"with_event": ["a"], "outside_retention": ["b"], "missing": ["c"]}
    assert joined(order_side(order_ids=ids), mail_side()).missing == ["a", "b", "c"]


def test_an_order_that_was_mailed_is_not_missing_though_its_event_is_gone() -> None:
    """The mail is what counts."""
    ids = {"outside_retention": ["b"], "missing": ["c"]}
    mail = mail_side(order_ids={"SENT": ["b", "c"]})
    assert joined(order_side(order_ids=ids), mail).missing == []


def test_a_record_read_and_not_in_the_ledger_is_missing_whoever_wrote_it() -> None:
    """A foreign producer's event deserves its mail too."""
    assert joined(order_side(), mail_side(missing=["foreign-1"])).missing == ["foreign-1"]


def test_a_mail_of_an_order_nobody_placed_is_a_ghost() -> None:
    """Its event may be in the topic or not."""
    order = order_side(order_ids={"on_their_way": ["a"]}, ghosts=["y"])
    mail = mail_side(order_ids={"SENT": ["a", "x"], "DEAD": ["y"]})
    assert joined(order, mail).ghosts == ["x", "y"]


def test_a_record_that_left_nothing_is_named_by_its_place() -> None:
    """It has no order id, and is a finding all the same."""
    found = joined(order_side(), mail_side(unread=["2/7"]))
    assert found.findings() == {"missing": [], "ghost": [], "double": [], "unread": ["2/7"]}


def test_doubles_are_the_mail_sides() -> None:
    """What may have gone out twice is named, in order."""
    order = order_side(order_ids={"with_event": ["a", "b"]})
    mail = mail_side(order_ids={"SENT": ["a", "b"]}, doubles=["b", "a"])
    assert joined(order, mail).doubles == ["a", "b"]
