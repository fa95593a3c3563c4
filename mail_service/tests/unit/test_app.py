"""The headless app: three probes, nothing else."""

import pytest

from mail_service.app import create_app
from mail_service.settings import Settings


@pytest.mark.parametrize("path", ["/livez", "/readyz"])
@pytest.mark.parametrize(("is_well", "status"), [(True, 200), (False, 503)])
def test_a_probe_says_what_its_check_says(
    settings: Settings, path: str, *, is_well: bool, status: int
) -> None:
    """Each route asks its own check, at every request."""
    asked = {"/livez": not is_well, "/readyz": not is_well, path: is_well}
    app = create_app(settings, is_live=lambda: asked["/livez"], is_ready=lambda: asked["/readyz"])

    assert app.test_client().get(path).status_code == status


def test_metrics_are_served(settings: Settings) -> None:
    """Prometheus reads how many records became what."""
    app = create_app(settings, is_live=lambda: True, is_ready=lambda: True)

    answer = app.test_client().get("/metrics")

    assert answer.status_code == 200
    assert "mail_records_taken_in_total" in answer.text


def test_there_is_nothing_else(settings: Settings) -> None:
    """The service is headless."""
    app = create_app(settings, is_live=lambda: True, is_ready=lambda: True)

    routes = {rule.rule for rule in app.url_map.iter_rules()}
    assert routes == {"/livez", "/readyz", "/metrics"}
