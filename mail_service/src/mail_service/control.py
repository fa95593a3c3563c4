"""What all replicas of the group go by: the pause, and the tokens of its rate; one row."""

from sqlalchemy import Connection, text

_IS_PAUSED = text("SELECT is_paused FROM control")
_PAUSE = text("UPDATE control SET is_paused = true, reason = :reason")
_RESUME = text("UPDATE control SET is_paused = false, reason = NULL")
_REASON = text("SELECT reason FROM control WHERE is_paused")

# What was not used is kept for a twentieth of a second only: a burst after a rest would be more
# than the relay was promised.
_TAKE_TOKENS = text("""
    WITH bucket AS (
        SELECT least(greatest(1, :rate * 0.05),
                     tokens + :rate * extract(epoch FROM clock_timestamp() - refilled_at)) AS held,
               clock_timestamp() AS at
          FROM control FOR UPDATE
    )
    UPDATE control
       SET tokens = held - least(:wanted, floor(held)), refilled_at = at
      FROM bucket
    RETURNING least(:wanted, floor(held))
""")

_GIVE_BACK_TOKENS = text("UPDATE control SET tokens = tokens + :unused")


def is_paused(connection: Connection) -> bool:
    """Say whether an operator has stopped all claims."""
    return bool(connection.execute(_IS_PAUSED).scalar_one())


def take_tokens(connection: Connection, *, rate_per_second: float, wanted: int) -> int:
    """Return how many mails the whole group's rate lets this replica claim now."""
    return int(
        connection.execute(_TAKE_TOKENS, {"rate": rate_per_second, "wanted": wanted}).scalar_one()
    )


def give_back_tokens(connection: Connection, *, unused: int) -> None:
    """Let others have what was not needed."""
    connection.execute(_GIVE_BACK_TOKENS, {"unused": unused})


def pause(connection: Connection, reason: str) -> None:
    """Stop all claims of the group; what is in a slot is finished."""
    connection.execute(_PAUSE, {"reason": reason})


def resume(connection: Connection) -> None:
    """Let the group claim again."""
    connection.execute(_RESUME)


def pause_reason(connection: Connection) -> str | None:
    """Return why the group is paused; None when it is not."""
    reason: str | None = connection.execute(_REASON).scalar_one_or_none()
    return reason
