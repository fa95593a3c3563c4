"""Nothing runs here but this process."""

import pytest

from mail_service.settings import Settings

TIMEOUT_SECONDS = 20


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests of this folder less time than those that wait for other processes."""
    for item in items:
        if item.path.is_relative_to(__file__.rpartition("/")[0]):
            item.add_marker(pytest.mark.timeout(TIMEOUT_SECONDS))


@pytest.fixture
def environment() -> dict[str, str]:
    """Return an environment that names what must be named."""
    return {
        "APP_ENV": "test",
        "DATABASE_URL": "postgresql://mail:secret@db/mail",
        "KAFKA_BOOTSTRAP_SERVERS": "kafka:9092",
        "SMTP_HOST": "relay",
        "SMTP_TLS": "off",
        "MAIL_FROM": "orders@shop.example",
        "MAIL_ONLY_TO": "*",
        "SHOP_NAME": "Tea House",
        "SHOP_URL": "https://shop.example",
    }


@pytest.fixture
def settings(environment: dict[str, str]) -> Settings:
    """Return the settings of that environment."""
    return Settings.from_environment(environment)
