from pathlib import Path

import pytest

from order_service.settings import KAFKA_PROPERTIES_WE_SET, Settings, SettingsError


def test_every_fault_is_in_one_message(environment: dict[str, str]) -> None:
    """Somebody who sets up the service sees all that is wrong at once."""
    wrong = environment | {
        "APP_ENV": "staging",
        "SHOP_CURRENCY": "won",
        "HTTP_PORT": "http",
        "KAFKA_ACKS": "1",
        "DATABASE_URL_FILE": "/nowhere",
    }
    del wrong["AUTH_ISSUER"], wrong["KAFKA_BOOTSTRAP_SERVERS"]
    with pytest.raises(SettingsError) as refused:
        Settings.from_environment(wrong)
    assert {line.partition(":")[0] for line in str(refused.value).splitlines()} == {
        "APP_ENV",
        "SHOP_CURRENCY",
        "HTTP_PORT",
        "KAFKA_ACKS",
        "DATABASE_URL_FILE",
        "AUTH_ISSUER",
        "KAFKA_BOOTSTRAP_SERVERS",
    }


@pytest.mark.parametrize(
    "name", ["APP_ENV", "DATABASE_URL", "AUTH_ISSUER", "AUTH_AUDIENCE", "AUTH_JWKS"]
)
def test_what_has_no_default_must_be_set(environment: dict[str, str], name: str) -> None:
    """A variable without a default is missed by its name."""
    del (lacking := dict(environment))[name]
    with pytest.raises(SettingsError, match=f"^{name}: Missing"):
        Settings.from_environment(lacking)


def test_the_rest_has_defaults(settings: Settings) -> None:
    """An installation that sets only what it must gets won, port 8000 and INFO."""
    assert (
        settings.shop_currency,
        settings.http_port,
        settings.probe_port,
        settings.log_level,
    ) == ("KRW", 8000, 0, "INFO")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("SHOP_CURRENCY", "KRW\n"),
        ("SHOP_CURRENCY", "krw"),
        ("LOG_LEVEL", "TRACE"),
        ("PROBE_PORT", "8001.5"),
        ("PROBE_PORT", "65536"),
        ("HTTP_PORT", "0"),
        ("DATABASE_URL", "db.example.com/orders"),
        ("DATABASE_URL", "mysql://db.example.com/orders"),
    ],
)
def test_a_value_that_cannot_be_used_is_refused(
    environment: dict[str, str], name: str, value: str
) -> None:
    """A wrong value is named by its variable."""
    with pytest.raises(SettingsError, match=f"^{name}: "):
        Settings.from_environment(environment | {name: value})


def test_a_secret_may_lie_in_a_file(environment: dict[str, str], tmp_path: Path) -> None:
    """DATABASE_URL_FILE is read in the place of DATABASE_URL, without its last newline."""
    secret = tmp_path / "url"
    secret.write_text("postgresql+psycopg2://user:secret@db/orders\n", encoding="utf-8")
    del (variables := dict(environment))["DATABASE_URL"]
    settings = Settings.from_environment(variables | {"DATABASE_URL_FILE": str(secret)})
    assert settings.database_url == "postgresql+psycopg2://user:secret@db/orders"


def test_a_kafka_secret_may_lie_in_a_file(environment: dict[str, str], tmp_path: Path) -> None:
    """KAFKA_SASL_PASSWORD_FILE sets the property sasl.password."""
    secret = tmp_path / "password"
    secret.write_text("s3cret\n", encoding="utf-8")
    settings = Settings.from_environment(environment | {"KAFKA_SASL_PASSWORD_FILE": str(secret)})
    assert settings.kafka["sasl.password"] == "s3cret"


def test_a_variable_of_others_that_ends_in_file_is_left_alone(environment: dict[str, str]) -> None:
    """A container may have variables ending in _FILE that are none of ours."""
    settings = Settings.from_environment(environment | {"HISTORY_FILE": "/nowhere"})
    assert settings.app_env == "test"


def test_any_property_of_librdkafka_can_be_set(environment: dict[str, str]) -> None:
    """KAFKA_ and a property's name in capitals sets that property."""
    settings = Settings.from_environment(
        environment | {"KAFKA_SASL_MECHANISM": "SCRAM-SHA-512", "KAFKA_SECURITY_PROTOCOL": "ssl"}
    )
    assert settings.kafka == {
        "bootstrap.servers": "127.0.0.1:1",
        "sasl.mechanism": "SCRAM-SHA-512",
        "security.protocol": "ssl",
    }


@pytest.mark.parametrize("name", sorted(KAFKA_PROPERTIES_WE_SET))
def test_what_the_promise_rests_on_cannot_be_changed(
    environment: dict[str, str], name: str
) -> None:
    """A property that the promise rests on is refused with the reason."""
    variable = f"KAFKA_{name.upper().replace('.', '_')}"
    with pytest.raises(SettingsError, match=f"^{variable}: the promise rests on {name}"):
        Settings.from_environment(environment | {variable: "x"})


@pytest.mark.parametrize("name", ["enable.idempotence", "acks", "group.id", "auto.offset.reset"])
def test_the_promise_rests_on(name: str) -> None:
    """The list of what cannot be changed keeps its most important names."""
    assert name in KAFKA_PROPERTIES_WE_SET


@pytest.mark.parametrize("name", ["KAFKA_OPTS", "KAFKA_HEAP_OPTS"])
def test_variables_of_the_console_tools_are_ignored(environment: dict[str, str], name: str) -> None:
    """Kafka's own tools may share our shell."""
    settings = Settings.from_environment(environment | {name: "-Xmx256m"})
    assert dict(settings.kafka) == {"bootstrap.servers": "127.0.0.1:1"}


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://user:p%40ss@db:5432/orders?sslmode=require",
        "postgres://user:p%40ss@db:5432/orders?sslmode=require",
        "postgresql+psycopg2://user:p%40ss@db:5432/orders?sslmode=require",
        "postgresql+psycopg://user:p%40ss@db:5432/orders?sslmode=require",
    ],
)
def test_the_driver_is_always_psycopg2(environment: dict[str, str], url: str) -> None:
    """However the database is named, psycopg2 is what connects to it."""
    settings = Settings.from_environment(environment | {"DATABASE_URL": url})
    assert (
        settings.database_url == "postgresql+psycopg2://user:p%40ss@db:5432/orders?sslmode=require"
    )
