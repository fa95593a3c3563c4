"""How a session's statements are named."""

from order_service.transaction import Statement


def test_parameters_are_numbered_once_each() -> None:
    """In the order in which they come first."""
    statement = Statement("SELECT %(a)s, %(b)s, %(a)s")
    assert statement.prepare == f"PREPARE {statement.name} AS SELECT $1, $2, $1"
    assert statement.execute == f"EXECUTE {statement.name} (%(a)s, %(b)s)"


def test_a_statement_that_vouches_for_others_is_named_after_all() -> None:
    """A release that changes any of them does not take another one's set for its own."""
    sets = [("SELECT 1", "SELECT 2"), ("SELECT 1", "SELECT 3"), ("SELECT 4", "SELECT 2")]
    names = {Statement(first, vouches_for=[Statement(other)]).name for first, other in sets}
    assert len(names) == len(sets)
    assert Statement("SELECT 1").name == Statement("SELECT 1").name
