"""A database as PostgreSQL's own tools write it down, and put it back."""

import subprocess
from pathlib import Path

from deploy.embedded.postgres import _binary

SECONDS = 60.0


def back_up(url: str, file: Path) -> Path:
    """Write down a database as it is at this moment; return the file."""
    _run("pg_dump", "--format=custom", f"--file={file}", _database(url))
    return file


def put_back(url: str, backup: Path) -> None:
    """Make a database what it was then."""
    _run("pg_restore", "--clean", "--if-exists", "--single-transaction", _database(url), backup)


def written_out(url: str) -> str:
    """Return all that a database's tables hold, as text."""
    return _run("pg_dump", _database(url))


def samples(url: str) -> str:
    """Return what the planner keeps of them, taken anew, as text."""
    statements = ("--command=ANALYZE", "--command=SELECT * FROM pg_stats")
    return _run("psql", "--no-psqlrc", "--quiet", "--tuples-only", *statements, _database(url))


def _database(url: str) -> str:
    return f"--dbname={url.replace('+psycopg2', '')}"


def _run(name: str, *arguments: str | Path) -> str:
    done = subprocess.run(
        [_binary(name), *arguments], capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
