"""create_app: Flask, blueprints, one error handler (problem+json)."""

import re
from collections.abc import Iterator, Mapping, Sequence
from http import HTTPStatus
from typing import Any

import psycopg2
from flask import Flask, Response, g, json, request
from flask.json.provider import DefaultJSONProvider
from psycopg2.errors import ReadOnlySqlTransaction
from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from structlog.contextvars import bind_contextvars, clear_contextvars
from uuid_utils.compat import uuid7
from werkzeug.exceptions import HTTPException
from werkzeug.http import HTTP_STATUS_CODES

from order_service import api, bodies, docs, probes, swagger_ui
from order_service.auth import TokenVerifier
from order_service.errors import Problem, TemporarilyUnavailable
from order_service.models import API_ENGINE_OPTIONS, db, ping_after_a_pause
from order_service.settings import Settings
from order_service.telemetry import log

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class ProblemApi(docs.DescribedApi):
    """flask-smorest, with application/problem+json for every error."""

    def handle_http_exception(self, error: HTTPException) -> Response:
        """Render what Flask, Werkzeug or webargs refused."""
        data: Mapping[str, Any] = getattr(error, "data", None) or {}
        messages = data.get("messages") or {}
        errors = [*_pointers(messages.get("json", {}), ""), *_parameters(messages.get("query", {}))]
        status = HTTPStatus(error.code or 500)
        detail = "The request is not as described." if errors else (error.description or "")
        headers = dict(data.get("headers") or {})
        if error.response is None:
            headers |= {
                name: value
                for name, value in error.get_headers()
                if name.lower() in ("allow", "retry-after")
            }
        return problem(status, "about:blank", detail, errors=errors, headers=headers)


def create_app(settings: Settings) -> Flask:
    """Build the REST service; it opens no connection yet."""
    app = Flask("order_service", static_folder=None)
    app.config.update(
        SQLALCHEMY_DATABASE_URI=settings.database_url,
        SQLALCHEMY_ENGINE_OPTIONS=API_ENGINE_OPTIONS,
        # One more than is taken: what has this length is longer.
        MAX_CONTENT_LENGTH=bodies.MAX_BODY_BYTES + 1,
    )
    provider = DefaultJSONProvider(app)
    provider.ensure_ascii, provider.sort_keys = False, False
    app.json = provider
    app.extensions["settings"] = settings
    app.extensions["token_verifier"] = TokenVerifier(
        issuer=settings.auth_issuer, audience=settings.auth_audience, jwks=settings.auth_jwks
    )
    db.init_app(app)
    with app.app_context():
        ping_after_a_pause(db.engine)
    rest = ProblemApi(app)
    rest.register_blueprint(api.blueprint)
    app.register_blueprint(swagger_ui.pages)
    app.register_blueprint(
        probes.probes(
            is_live=lambda: True,
            is_ready=lambda: probes.is_fit(db.engine),
            metrics=probes.metrics_of_all_workers,
            not_on_port=settings.http_port,
        )
    )
    app.before_request(_bind_request_id)
    app.after_request(_finish)
    # An address with `//` in it is not ours: no redirect built from what the client calls us.
    app.url_map.merge_slashes = False
    app.register_error_handler(Problem, _render)
    # Reads fail as SQLAlchemy's Connection has it, an order's transaction as the driver does.
    for fault in (DBAPIError, psycopg2.Error):
        app.register_error_handler(fault, _failed)
    for failure in (
        OperationalError,
        InterfaceError,
        PoolTimeout,
        psycopg2.OperationalError,
        psycopg2.InterfaceError,
        ReadOnlySqlTransaction,
    ):
        app.register_error_handler(failure, _unavailable)
    return app


def _bind_request_id() -> None:
    """Log under the client's X-Request-ID, or one of ours when there is none to be trusted."""
    given = request.headers.get("X-Request-ID", "")
    g.request_id = given if REQUEST_ID.fullmatch(given) else str(uuid7())
    clear_contextvars()
    bind_contextvars(request_id=g.request_id)


def _finish(response: Response) -> Response:
    response.headers["X-Request-ID"] = g.request_id
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


def problem(
    status: HTTPStatus,
    kind: str,
    detail: str,
    *,
    errors: Sequence[Mapping[str, str]] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Build an application/problem+json response (RFC 9457)."""
    body: dict[str, Any] = {
        "type": kind,
        "title": HTTP_STATUS_CODES[status],
        "status": int(status),
        "detail": detail,
    }
    if errors:
        body["errors"] = list(errors)
    return Response(
        # A name in a refused body may be no Unicode text; it is shown with question marks.
        json.dumps(body).encode(errors="replace"),
        status=status,
        headers=dict(headers or {}),
        content_type="application/problem+json",
    )


def _render(error: Problem) -> Response:
    return problem(
        error.status,
        f"urn:order-service:problem:{error.slug}",
        error.detail,
        errors=error.errors,
        headers=error.headers,
    )


def _failed(error: DBAPIError) -> Response:
    _log_failure(error)
    return problem(HTTPStatus.INTERNAL_SERVER_ERROR, "about:blank", "It is our fault, and logged.")


def _log_failure(error: Exception) -> None:
    """Log what kind of failure it was: the database's own words may hold a customer's address."""
    original = getattr(error, "orig", None) or error
    log.error(
        "database.failed",
        error=type(original).__name__,
        sqlstate=getattr(original, "pgcode", None),
    )


def _unavailable(error: Exception) -> Response:
    _log_failure(error)
    return _render(
        TemporarilyUnavailable(
            "The database did not answer in time. With the same Idempotency-Key it is safe to "
            "send the order again.",
            headers={"Retry-After": "1"},
        )
    )


def _parameters(messages: Any) -> Iterator[dict[str, str]]:
    """Name the parameters of the query that are at fault; one of an unknown name is one of them."""
    for name, told in messages.items():
        for message in told:
            yield {"parameter": str(name), "detail": str(message)}


def _pointers(messages: Any, path: str) -> Iterator[dict[str, str]]:
    """Flatten marshmallow's nested messages into JSON Pointers."""
    if isinstance(messages, Mapping):
        for name, inner in messages.items():
            escaped = str(name).replace("~", "~0").replace("/", "~1")
            step = "" if name == "_schema" else f"/{escaped}"
            yield from _pointers(inner, path + step)
    else:
        for message in messages:
            yield {"pointer": path, "detail": str(message)}
