"""The environment, read once, all faults in one message."""

from pathlib import Path

import pytest

from mail_service.settings import (
    KAFKA_PROPERTIES_WE_SET,
    TEST_TIMING,
    TIMING,
    Settings,
    SettingsError,
)

Environment = dict[str, str]


def faults_of(environment: Environment) -> dict[str, str]:
    """Return the faults by the variable they name."""
    with pytest.raises(SettingsError) as refused:
        Settings.from_environment(environment)
    lines = [line.partition(": ") for line in str(refused.value).splitlines()]
    return {name: reason for name, _, reason in lines}


def test_every_fault_is_named_in_one_message() -> None:
    """One run tells an operator everything that is wrong."""
    faults = faults_of(
        {
            "APP_ENV": "staging",
            "SMTP_PORT": "smtp",
            "SMTP_TLS": "maybe",
            "MAIL_FROM": "orders@shop.example, other@shop.example",
            "MAIL_CONCURRENCY": "0",
            "MAIL_GIVE_UP_HOURS": "721",
            "MAIL_ON_UNKNOWN": "guess",
            "SHOP_URL": "shop",
            "SHOP_LOCALE": "fr",
            "SHOP_TIME_ZONE": "Seoul",
            "SHOP_CURRENCY": "won",
            "LOG_LEVEL": "loud",
            "KAFKA_ENABLE_AUTO_COMMIT": "true",
        }
    )

    assert set(faults) == {
        "APP_ENV",
        "DATABASE_URL",
        "KAFKA_BOOTSTRAP_SERVERS",
        "KAFKA_ENABLE_AUTO_COMMIT",
        "LOG_LEVEL",
        "MAIL_CONCURRENCY",
        "MAIL_FROM",
        "MAIL_GIVE_UP_HOURS",
        "MAIL_ONLY_TO",
        "MAIL_ON_UNKNOWN",
        "SHOP_CURRENCY",
        "SHOP_LOCALE",
        "SHOP_NAME",
        "SHOP_TIME_ZONE",
        "SHOP_URL",
        "SMTP_HOST",
        "SMTP_PORT",
        "SMTP_TLS",
    }


def test_a_fault_does_not_show_a_secret(environment: Environment) -> None:
    """The message of faults may be logged."""
    secrets = {"SMTP_PASSWORD": "canary-1", "KAFKA_SASL_PASSWORD": "canary-2"}

    faults = faults_of({**environment, **secrets, "SMTP_USER": "shop", "SMTP_PORT": "x"})

    assert set(faults) == {"SMTP_PORT"}
    assert "canary" not in str(faults)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("smtp_port", 587),
        ("mail_concurrency", 16),
        ("mail_on_unknown", "resend"),
        ("mail_give_up_hours", 24),
        ("shop_locale", "ko"),
        ("shop_time_zone", "Asia/Seoul"),
        ("shop_currency", "KRW"),
        ("mail_reply_to", None),
        ("smtp_password", None),
    ],
)
def test_what_is_not_said_has_a_default(settings: Settings, name: str, value: object) -> None:
    """Only what installations must differ in is required."""
    assert getattr(settings, name) == value


def test_tls_is_on_unless_it_is_turned_off(environment: Environment) -> None:
    """Nobody sends in clear by having said nothing."""
    del environment["SMTP_TLS"]

    assert Settings.from_environment(environment).smtp_tls == "starttls"


def test_production_refuses_smtp_without_tls(environment: Environment) -> None:
    """Addresses do not cross a network in clear."""
    assert set(faults_of({**environment, "APP_ENV": "production"})) == {"SMTP_TLS"}


@pytest.mark.parametrize("tls", ["starttls", "implicit"])
def test_production_takes_smtp_with_tls(environment: Environment, tls: str) -> None:
    """Both kinds of TLS are good enough for production."""
    production = {**environment, "APP_ENV": "production", "SMTP_TLS": tls}

    assert Settings.from_environment(production).smtp_tls == tls


@pytest.mark.parametrize("name", ["SMTP_USER", "SMTP_PASSWORD"])
def test_half_of_a_login_is_a_fault(environment: Environment, name: str) -> None:
    """The relay would be spoken to without any, and nobody would know why it refuses."""
    assert set(faults_of({**environment, name: "x"})) == {"SMTP_USER, SMTP_PASSWORD"}


@pytest.mark.parametrize(
    ("variable", "read"),
    [
        ("DATABASE_URL", lambda settings: settings.database_url.rpartition("/")[2]),
        ("SMTP_PASSWORD", lambda settings: settings.smtp_password),
        ("KAFKA_SASL_PASSWORD", lambda settings: settings.kafka["sasl.password"]),
    ],
)
def test_a_secret_is_read_from_the_file_beside_it(
    environment: Environment, tmp_path: Path, variable: str, read: object
) -> None:
    """`NAME_FILE` names a file whose content is the value, without the editor's line end."""
    environment.pop(variable, None)
    secret = tmp_path / "secret"
    secret.write_text("postgresql://db/from-file\n", encoding="utf-8")

    settings = Settings.from_environment(
        {**environment, "SMTP_USER": "shop", "SMTP_PASSWORD": "x", f"{variable}_FILE": str(secret)}
    )

    assert callable(read)
    assert str(read(settings)).endswith("from-file")
    assert not str(read(settings)).endswith("\n")


@pytest.mark.parametrize("kind", ["missing", "folder", "not UTF-8"])
def test_a_secret_file_that_cannot_be_read_is_a_fault(
    environment: Environment, tmp_path: Path, kind: str
) -> None:
    """A wrong mount is reported with the rest, by the variable that names it."""
    secret = tmp_path / "secret"
    if kind == "folder":
        secret.mkdir()
    if kind == "not UTF-8":
        secret.write_bytes(b"\xff\xfe\xfa")

    assert "SMTP_PASSWORD_FILE" in faults_of({**environment, "SMTP_PASSWORD_FILE": str(secret)})


def test_a_kafka_variable_sets_the_property_of_its_name(environment: Environment) -> None:
    """Any librdkafka property can be set without a release of ours."""
    environment["KAFKA_SASL_MECHANISM"] = "SCRAM-SHA-512"

    assert Settings.from_environment(environment).kafka == {
        "bootstrap.servers": "kafka:9092",
        "sasl.mechanism": "SCRAM-SHA-512",
    }


@pytest.mark.fault("F-K16")
@pytest.mark.parametrize("name", sorted(KAFKA_PROPERTIES_WE_SET))
def test_a_property_the_promise_rests_on_is_refused(environment: Environment, name: str) -> None:
    """Nobody loses mails by a variable: the refusal says which and why."""
    variable = f"KAFKA_{name.upper().replace('.', '_')}"

    faults = faults_of({**environment, variable: "whatever"})

    assert faults == {variable: f"the promise rests on {name}; it cannot be changed"}


@pytest.mark.parametrize(
    "name",
    ["enable.auto.commit", "auto.offset.reset", "group.id", "partition.assignment.strategy"],
)
def test_the_properties_that_could_lose_mails_are_among_the_refused(name: str) -> None:
    """The list of refused properties holds those that faults are known of."""
    assert name in KAFKA_PROPERTIES_WE_SET


@pytest.mark.parametrize("variable", ["KAFKA_OPTS", "KAFKA_HEAP_OPTS"])
def test_the_console_tools_variables_are_ignored(environment: Environment, variable: str) -> None:
    """A shell set up for Kafka's own tools is no fault."""
    settings = Settings.from_environment({**environment, variable: "-Xmx1g"})

    assert settings.kafka == {"bootstrap.servers": "kafka:9092"}


@pytest.mark.parametrize(
    ("app_env", "timing"),
    [("test", TEST_TIMING), ("development", TIMING), ("production", TIMING)],
)
def test_only_tests_run_on_the_short_profile(
    environment: Environment, app_env: str, timing: object
) -> None:
    """Short waits exist for tests alone."""
    environment |= {"APP_ENV": app_env, "SMTP_TLS": "starttls"}

    assert Settings.from_environment(environment).timing is timing


def test_the_final_dot_is_given_ten_minutes() -> None:
    """RFC 5321 §4.5.3.2.6: less makes second copies."""
    assert TIMING.final_dot_seconds >= 600


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg2"])
def test_the_database_driver_is_psycopg2(environment: Environment, scheme: str) -> None:
    """A URL as every provider prints it works."""
    environment["DATABASE_URL"] = f"{scheme}://mail:secret@db/mail"

    url = Settings.from_environment(environment).database_url

    assert url == "postgresql+psycopg2://mail:secret@db/mail"
