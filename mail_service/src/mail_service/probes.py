"""/livez /readyz /metrics, on every process."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from flask import Blueprint, Flask, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from werkzeug.serving import make_server

from mail_service import startup
from mail_service.telemetry import log

Check = Callable[[], bool]


def probes(*, is_live: Check, is_ready: Check) -> Blueprint:
    """Build the three routes."""
    blueprint = Blueprint("probes", __name__)

    @blueprint.get("/livez")
    def livez() -> Response:
        return _answer(is_well=is_live())

    @blueprint.get("/readyz")
    def readyz() -> Response:
        return _answer(is_well=is_ready())

    @blueprint.get("/metrics")
    def metrics() -> Response:
        return Response(generate_latest(), content_type=CONTENT_TYPE_LATEST)

    return blueprint


def is_fit(engine: Engine) -> bool:
    """Say whether the ledger answers and is as this release needs it."""
    try:
        with engine.connect() as connection:
            faults = startup.ledger_faults(connection)
    except SQLAlchemyError:
        return False
    if faults:
        log.error("ledger.unfit", faults=faults)
    return not faults


@contextmanager
def serving(app: Flask, port: int) -> Iterator[None]:
    """Serve the probes in a thread; port 0 is a free one.

    Raises StartUpRefused when the port is taken.
    """
    try:
        server = make_server("0.0.0.0", port, app, threaded=True)  # noqa: S104 - probes come from outside the container
    except SystemExit as error:
        # Werkzeug has told why, and would end the process with a code of its own.
        raise startup.StartUpRefused(f"PROBE_PORT: {port} cannot be served") from error
    thread = threading.Thread(target=server.serve_forever, name="probes", daemon=True)
    thread.start()
    log.info("probes.served", port=server.port)
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


def _answer(*, is_well: bool) -> Response:
    return Response("ok\n" if is_well else "no\n", status=200 if is_well else 503)
