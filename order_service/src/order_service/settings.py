"""The environment, read once, all faults in one message."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from marshmallow import EXCLUDE, Schema, ValidationError, fields, validate

# The promise rests on these; an installation that changed one would break it silently.
KAFKA_PROPERTIES_WE_SET = frozenset(
    {
        "acks",
        "allow.auto.create.topics",
        "auto.commit.enable",
        "auto.offset.reset",
        "delivery.timeout.ms",
        "enable.auto.commit",
        "enable.auto.offset.store",
        "enable.idempotence",
        "enable.partition.eof",
        "group.id",
        "group.protocol",
        "message.timeout.ms",
        "partition.assignment.strategy",
        "partitioner",
        "request.required.acks",
        "transactional.id",
    }
)
LAST_PORT = 65_535
POSTGRESQL_URL = r"^postgres(ql)?(\+\w+)?://\S+\Z"
# Whose tokens `order-service token` makes.
DEVELOPMENT_ISSUER = "urn:order-service:development"
# Read by Kafka's own console tools, which may share our shell.
KAFKA_VARIABLES_OF_OTHERS = frozenset({"KAFKA_OPTS", "KAFKA_HEAP_OPTS"})


class SettingsError(Exception):
    """The environment cannot be used; the message lists every fault."""


class _Environment(Schema):
    class Meta:
        unknown = EXCLUDE

    app_env = fields.String(
        required=True,
        data_key="APP_ENV",
        validate=validate.OneOf(("development", "test", "production")),
    )
    database_url = fields.String(
        required=True,
        data_key="DATABASE_URL",
        validate=validate.Regexp(POSTGRESQL_URL, error="Not an address like postgresql://…"),
    )
    auth_issuer = fields.String(required=True, data_key="AUTH_ISSUER")
    auth_audience = fields.String(required=True, data_key="AUTH_AUDIENCE")
    auth_jwks = fields.String(required=True, data_key="AUTH_JWKS")
    shop_currency = fields.String(
        load_default="KRW", data_key="SHOP_CURRENCY", validate=validate.Regexp(r"^[A-Z]{3}\Z")
    )
    orders_per_user_per_minute = fields.Integer(
        load_default=30, data_key="ORDERS_PER_USER_PER_MINUTE", validate=validate.Range(min=1)
    )
    orders_per_recipient_per_hour = fields.Integer(
        load_default=20, data_key="ORDERS_PER_RECIPIENT_PER_HOUR", validate=validate.Range(min=1)
    )
    # Not a free one: the probes, which users must not see, are told apart by this port.
    http_port = fields.Integer(
        load_default=8000, data_key="HTTP_PORT", validate=validate.Range(1, LAST_PORT)
    )
    probe_port = fields.Integer(
        load_default=0, data_key="PROBE_PORT", validate=validate.Range(0, LAST_PORT)
    )
    log_level = fields.String(
        load_default="INFO",
        data_key="LOG_LEVEL",
        validate=validate.OneOf(("DEBUG", "INFO", "WARNING", "ERROR")),
    )


@dataclass(frozen=True, slots=True)
class Settings:
    """What two installations may differ in.

    `kafka` holds librdkafka properties by name; `auth_jwks` is a URL or a file; a port 0 is a
    free one.
    """

    app_env: str
    database_url: str
    kafka: Mapping[str, str]
    auth_issuer: str
    auth_audience: str
    auth_jwks: str
    shop_currency: str
    orders_per_user_per_minute: int
    orders_per_recipient_per_hour: int
    http_port: int
    probe_port: int
    log_level: str

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Read every setting; raise SettingsError naming all faults together."""
        values, faults = _with_secret_files(environment)
        kafka, kafka_faults = _kafka_properties(values)
        faults += kafka_faults
        if (values.get("APP_ENV"), values.get("AUTH_ISSUER")) == ("production", DEVELOPMENT_ISSUER):
            faults.append("AUTH_ISSUER: the development issuer is refused in production")
        loaded: dict[str, Any] = {}
        try:
            loaded = _Environment().load(values)
        except ValidationError as error:
            faults += [
                f"{name}: {' '.join(messages)}"
                for name, messages in sorted(error.normalized_messages().items())
            ]
        if faults:
            raise SettingsError("\n".join(faults))
        loaded["database_url"] = _with_driver(loaded["database_url"])
        return cls(kafka=kafka, **loaded)


def _with_secret_files(environment: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Put the content of the file named by `NAME_FILE` beside every `NAME`."""
    values, faults = dict(environment), []
    ours = {field.data_key for field in _Environment().fields.values()}
    for name in environment:
        target = name.removesuffix("_FILE")
        if target == name or not (target in ours or target.startswith("KAFKA_")):
            continue
        try:
            values[target] = Path(values.pop(name)).read_text(encoding="utf-8").strip()
        except OSError as error:
            faults.append(f"{name}: {error.strerror}")
        except UnicodeDecodeError:
            faults.append(f"{name}: Not UTF-8.")
    return values, faults


def _kafka_properties(values: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    properties, faults = {}, []
    for name, value in values.items():
        if not name.startswith("KAFKA_") or name in KAFKA_VARIABLES_OF_OTHERS:
            continue
        key = name.removeprefix("KAFKA_").lower().replace("_", ".")
        if key in KAFKA_PROPERTIES_WE_SET:
            faults.append(f"{name}: the promise rests on {key}; it cannot be changed")
        properties[key] = value
    if "bootstrap.servers" not in properties:
        faults.append("KAFKA_BOOTSTRAP_SERVERS: Missing data for required field.")
    return properties, faults


def _with_driver(url: str) -> str:
    """Name psycopg2: SQLAlchemy 2.1 takes a bare postgresql:// for psycopg 3."""
    return f"postgresql+psycopg2://{url.partition('://')[2]}"
