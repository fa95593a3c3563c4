"""The environment, read once, all faults in one message."""

import os
import zoneinfo
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from marshmallow import EXCLUDE, Schema, ValidationError, fields, validate

# The promise rests on these; an installation that changed one would break it silently.
KAFKA_PROPERTIES_WE_SET = frozenset(
    {
        "allow.auto.create.topics",
        "auto.commit.enable",
        "auto.offset.reset",
        "enable.auto.commit",
        "enable.auto.offset.store",
        "group.id",
        "group.protocol",
        "isolation.level",
        "partition.assignment.strategy",
        "session.timeout.ms",
    }
)
# Read by Kafka's own console tools, which may share our shell.
KAFKA_VARIABLES_OF_OTHERS = frozenset({"KAFKA_OPTS", "KAFKA_HEAP_OPTS"})
ONLY_TO = validate.Regexp(
    r"(\s*(\*|[^@\s,]*@[^@\s,]+)\s*(,|\Z))*\Z", error="Not a list of addresses, @domains or *."
)
LAST_PORT = 65_535
POSTGRESQL_URL = r"^postgres(ql)?(\+\w+)?://\S+\Z"
ADDRESS = validate.Regexp(r"[^@\s,;<>\"]+@[^@\s,;<>\"]+\Z", error="Not one plain address.")


class SettingsError(Exception):
    """The environment cannot be used; the message lists every fault."""


@dataclass(frozen=True, slots=True)
class Timing:
    """How long things may take; tests run on a profile of their own."""

    session_timeout_ms: int
    lease_seconds: float
    unknown_delay_seconds: float
    retry_base_seconds: float
    retry_cap_seconds: float
    probe_seconds: float
    connect_seconds: float
    envelope_seconds: float
    content_seconds: float
    final_dot_seconds: float
    goodbye_seconds: float


# RFC 5321 §4.5.3.2 has the time-outs of the dialogue. The ten minutes at the final dot are no
# luxury: less makes second copies.
TIMING = Timing(
    session_timeout_ms=45_000,
    lease_seconds=30,
    unknown_delay_seconds=60,
    retry_base_seconds=60,
    retry_cap_seconds=3600,
    probe_seconds=10,
    connect_seconds=60,
    envelope_seconds=300,
    content_seconds=180,
    final_dot_seconds=600,
    goodbye_seconds=5,
)
TEST_TIMING = Timing(
    session_timeout_ms=6_000,
    lease_seconds=5,
    unknown_delay_seconds=2,
    retry_base_seconds=0.2,
    retry_cap_seconds=2,
    probe_seconds=1,
    connect_seconds=3,
    envelope_seconds=5,
    content_seconds=5,
    final_dot_seconds=12,
    goodbye_seconds=1,
)


@dataclass(frozen=True, slots=True)
class Recipients:
    """Whom this environment may write to: addresses, whole domains as `@domain`, or everybody."""

    allowed: frozenset[str]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a list with commas; `*` is everybody."""
        return cls(frozenset(entry.strip().lower() for entry in text.split(",") if entry.strip()))

    def allow(self, address: str) -> bool:
        """Say whether a mail may go there."""
        address = address.lower()
        return not self.allowed.isdisjoint({"*", address, f"@{address.rpartition('@')[2]}"})


def _is_folder(path: str) -> None:
    if not Path(path).is_dir():
        raise ValidationError("Not a folder.")


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
    smtp_host = fields.String(required=True, data_key="SMTP_HOST")
    smtp_port = fields.Integer(
        load_default=587, data_key="SMTP_PORT", validate=validate.Range(1, LAST_PORT)
    )
    smtp_tls = fields.String(
        load_default="starttls",
        data_key="SMTP_TLS",
        validate=validate.OneOf(("starttls", "implicit", "off")),
    )
    smtp_user = fields.String(load_default=None, data_key="SMTP_USER")
    smtp_password = fields.String(load_default=None, data_key="SMTP_PASSWORD")
    mail_from = fields.String(required=True, data_key="MAIL_FROM", validate=ADDRESS)
    mail_reply_to = fields.String(load_default=None, data_key="MAIL_REPLY_TO", validate=ADDRESS)
    mail_bounce_to = fields.String(load_default=None, data_key="MAIL_BOUNCE_TO", validate=ADDRESS)
    mail_concurrency = fields.Integer(
        load_default=16, data_key="MAIL_CONCURRENCY", validate=validate.Range(1, 256)
    )
    mail_rate_per_second = fields.Float(
        load_default=None, data_key="MAIL_RATE_PER_SECOND", validate=validate.Range(min=0.01)
    )
    mail_only_to = fields.String(load_default="", data_key="MAIL_ONLY_TO", validate=ONLY_TO)
    mail_on_unknown = fields.String(
        load_default="resend",
        data_key="MAIL_ON_UNKNOWN",
        validate=validate.OneOf(("resend", "hold")),
    )
    mail_give_up_hours = fields.Integer(
        load_default=24, data_key="MAIL_GIVE_UP_HOURS", validate=validate.Range(1, 24 * 30)
    )
    mail_templates = fields.String(
        load_default=None,
        data_key="MAIL_TEMPLATES",
        validate=_is_folder,
    )
    shop_name = fields.String(required=True, data_key="SHOP_NAME")
    shop_url = fields.Url(required=True, data_key="SHOP_URL", require_tld=False)
    shop_locale = fields.String(
        load_default="ko", data_key="SHOP_LOCALE", validate=validate.OneOf(("ko", "en"))
    )
    shop_time_zone = fields.String(
        load_default="Asia/Seoul",
        data_key="SHOP_TIME_ZONE",
        validate=validate.OneOf(zoneinfo.available_timezones(), error="Not a time zone."),
    )
    shop_currency = fields.String(
        load_default="KRW", data_key="SHOP_CURRENCY", validate=validate.Regexp(r"[A-Z]{3}\Z")
    )
    probe_port = fields.Integer(
        load_default=0, data_key="PROBE_PORT", validate=validate.Range(0, LAST_PORT)
    )
    log_level = fields.String(
        load_default="INFO",
        data_key="LOG_LEVEL",
        validate=validate.OneOf(("DEBUG", "INFO", "WARNING", "ERROR")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What two installations may differ in; `kafka` holds librdkafka properties by name."""

    app_env: str
    database_url: str
    kafka: Mapping[str, str]
    smtp_host: str
    smtp_port: int
    smtp_tls: str
    smtp_user: str | None
    smtp_password: str | None
    mail_from: str
    mail_reply_to: str | None
    mail_bounce_to: str | None
    mail_concurrency: int
    mail_rate_per_second: float | None
    mail_only_to: Recipients
    mail_on_unknown: str
    mail_give_up_hours: int
    mail_templates: Path | None
    shop_name: str
    shop_url: str
    shop_locale: str
    shop_time_zone: str
    shop_currency: str
    probe_port: int
    log_level: str

    @property
    def timing(self) -> Timing:
        """The profile this installation runs on."""
        return TEST_TIMING if self.app_env == "test" else TIMING

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self:
        """Read every setting; raise SettingsError naming all faults together."""
        values, faults = _with_secret_files(environment)
        kafka, kafka_faults = _kafka_properties(values)
        faults += kafka_faults
        if values.get("APP_ENV") == "production" and values.get("SMTP_TLS") == "off":
            faults.append("SMTP_TLS: off is refused in production")
        if bool(values.get("SMTP_USER")) != bool(values.get("SMTP_PASSWORD")):
            faults.append("SMTP_USER, SMTP_PASSWORD: one is of no use without the other")
        if values.get("APP_ENV") != "production" and not values.get("MAIL_ONLY_TO", "").strip():
            faults.append(
                "MAIL_ONLY_TO: outside production name addresses, @domains, or * for everybody"
            )
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
        loaded["mail_templates"] = loaded["mail_templates"] and Path(loaded["mail_templates"])
        loaded["mail_only_to"] = Recipients.parse(loaded["mail_only_to"] or "*")
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
