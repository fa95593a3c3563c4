"""A transaction in few round trips: BEGIN goes with its first statements, COMMIT with its last.

psycopg2 sends a string of several statements as one message, and PostgreSQL stops at the first that
fails. Each is prepared once in a session, for parsing and planning would cost as much as executing.
Behind a transaction pooler the session may be another one each time: who finds a statement missing
prepares it, in the transaction that needs it. The pool is SQLAlchemy's; its Connection would cost
as much again as each of these statements.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from typing import Any

from psycopg2 import Error, OperationalError
from psycopg2.errors import FeatureNotSupported, InvalidSqlStatementName, ReadOnlySqlTransaction
from psycopg2.extensions import connection as PsycopgConnection  # noqa: N812 - a class
from sqlalchemy import Engine

PARAMETER = re.compile(r"%\((\w+)\)s")


class LostBeforeCommit(OperationalError):
    """The connection broke before COMMIT was sent, so the server rolls back."""


class Statement:
    """A statement that a session prepares once; its parameters are written `%(name)s`.

    Where one is found that vouches for others, they are there as well, in this very form.
    """

    def __init__(self, text: str, *, vouches_for: Sequence["Statement"] = ()) -> None:
        names = list(dict.fromkeys(PARAMETER.findall(text)))
        body = PARAMETER.sub(lambda found: f"${names.index(found[1]) + 1}", text)
        # By all texts, so that two releases may share a pooler's sessions.
        texts = "\0".join((body, *(other.name for other in vouches_for)))
        self.name: str = f"order_service_{hashlib.sha256(texts.encode()).hexdigest()[:16]}"
        self.vouches_for = vouches_for
        self.prepare = f"PREPARE {self.name} AS {body}"
        self.execute = f"EXECUTE {self.name} ({', '.join(f'%({name})s' for name in names)})"


class Transaction:
    """What `begin` gives."""

    def __init__(self, connection: PsycopgConnection, first: Statement) -> None:
        self._connection = connection
        self._first = first
        self._cursor = connection.cursor()
        self._is_open = False

    def fetch(self, *statements: Statement, parameters: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Execute statements in one message, each on a snapshot of its own; return the last's rows.

        Raises LostBeforeCommit when the connection breaks.
        """
        message = "; ".join(statement.execute for statement in statements)
        try:
            if self._is_open:
                self._cursor.execute(message, parameters)
            else:
                self._begin(message, parameters)
        except Error as error:
            if self._connection.closed:
                raise LostBeforeCommit from error
            raise
        return self._cursor.fetchall()

    def commit(self, statement: Statement, parameters: Mapping[str, Any], *, then: str) -> None:
        """Execute the last statement and commit; `then` follows, outside the transaction.

        Unless PostgreSQL says that the statement failed, nobody knows what was committed.
        """
        self._cursor.execute(f"{statement.execute}; COMMIT; {then}", parameters)
        self._is_open = False

    def close(self) -> None:
        """Undo what was not committed; a lost connection's is undone by the server."""
        if self._is_open and not self._connection.closed:
            self._cursor.execute("ROLLBACK")

    def _begin(self, message: str, parameters: Mapping[str, Any]) -> None:
        self._is_open = True
        try:
            self._cursor.execute(f"BEGIN; {message}", parameters)
        except (InvalidSqlStatementName, FeatureNotSupported):
            # Nothing was prepared, or a migration changed the type of a column that comes back.
            self._prepare_anew()
            self._cursor.execute(message, parameters)

    def _prepare_anew(self) -> None:
        self._cursor.execute("ROLLBACK; BEGIN; SELECT name FROM pg_prepared_statements")
        prepared = {name for (name,) in self._cursor.fetchall()}
        statements = (self._first, *self._first.vouches_for)
        for statement in statements:
            if statement.name in prepared:
                self._cursor.execute(f"DEALLOCATE {statement.name}")
        # The first one, which vouches for the others, last.
        for statement in reversed(statements):
            self._cursor.execute(statement.prepare)


@contextmanager
def begin(engine: Engine, first: Statement) -> Iterator[Transaction]:
    """Give a transaction that ends with this block, undone unless it was committed.

    It executes `first` first, and then what that vouches for. The engine must be one that
    autocommits.
    """
    pooled = engine.raw_connection()
    connection: Any = pooled.dbapi_connection
    try:
        with closing(Transaction(connection, first)) as transaction:
            yield transaction
    except ReadOnlySqlTransaction:
        # It became a standby: a new connection may find the one that took its place.
        connection.close()
        raise
    finally:
        if connection.closed:
            pooled.invalidate()
            # The others were lost with it, most likely: who tries again gets a new one.
            engine.dispose()
        else:
            pooled.close()
