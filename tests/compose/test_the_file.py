"""What docker-compose.yml and the images say of themselves."""

import re
from pathlib import Path

import pytest

from tests.support.containers import REPOSITORY, Containers, run, services

OURS = {"order-api", "order-relay", "order-migrate", "order-topics", "mail", "mail-migrate"}
JOBS = {"order-migrate", "order-topics", "mail-migrate"}
THEIRS = {"order-proxy", "order-db", "mail-db", "kafka", "inbox"}
DRAIN_SECONDS = 30
MAX_ADDED_BYTES = 200_000_000
OTHER = {"order-api": "mail", "mail": "order"}


@pytest.mark.parametrize("profile", ["", "tools"])
def test_the_file_is_clean(project: Containers, profile: str) -> None:
    """`docker compose config` warns of nothing, whatever the profile."""
    chosen = ["--profile", profile] if profile else []
    script = " ".join(["docker", "compose", *chosen, "config", "--quiet", "2>&1"])
    assert run(["sh", "-c", script], project.environment) == ""


def test_the_services_are_those_of_the_design(project: Containers) -> None:
    """No service is missing, none is there unannounced."""
    assert set(services(project.compose("config", "--format", "json"))) == OURS | THEIRS


def test_every_container_is_confined(project: Containers) -> None:
    """Read-only root, no capability, no new privilege, a numeric user that is not root."""
    config = project.compose("--profile", "tools", "config", "--format", "json")
    for name, service in services(config).items():
        assert service["read_only"], name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        user = service.get("user") or image_user(name)
        assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user), name


def test_every_port_is_bound_to_the_loopback_address(project: Containers) -> None:
    """Nothing of a development machine is offered to its network."""
    config = project.compose("--profile", "tools", "config", "--format", "json")
    published = [port for service in services(config).values() for port in service.get("ports", [])]
    assert published
    assert {port["host_ip"] for port in published} == {"127.0.0.1"}


def test_services_come_back_and_jobs_only_when_they_failed(project: Containers) -> None:
    """The restart policy tells a service from a job; services have time to drain."""
    for name, service in services(project.compose("config", "--format", "json")).items():
        expected = "on-failure" if name in JOBS else "unless-stopped"
        assert service["restart"] == expected, name
        if name in OURS - JOBS:
            assert int(service["stop_grace_period"].removesuffix("s")) > DRAIN_SECONDS, name


def test_no_secret_is_in_an_environment(project: Containers) -> None:
    """Passwords are files; the environment names where they are."""
    secrets = Path(project.environment["SECRETS"])
    passwords = [path.read_text() for path in secrets.glob("*_password")]
    assert len(passwords) == 2
    for name in (OURS | THEIRS) - JOBS:
        environment = project.inspect(project.ids(name)[0], "{{json .Config.Env}}")
        assert not any(password in environment for password in passwords), name


@pytest.mark.parametrize("service", OTHER)
def test_an_image_holds_nothing_of_the_other_service(project: Containers, service: str) -> None:
    """No file of the other package is in it."""
    other = f"{OTHER[service]}_service"
    program = f"import pathlib; print([str(p) for p in pathlib.Path('/').rglob('*{other}*')])"
    argv = ["docker", "run", "--rm", "--user=0", "--entrypoint=python3", project.image(service)]
    assert run([*argv, "-c", program], project.environment).strip() == "[]"


@pytest.mark.parametrize("service", OTHER)
def test_an_image_adds_little_to_its_base(project: Containers, service: str) -> None:
    """Less than 200 MB come on top of the Python image."""
    base = project.environment.get("PYTHON_IMAGE", "python:3.13-slim-trixie")
    sizes = [int(project.inspect(image, "{{.Size}}")) for image in (project.image(service), base)]
    assert sizes[0] - sizes[1] < MAX_ADDED_BYTES


def image_user(service: str) -> str:
    """Return the user of a service's own Dockerfile."""
    folder = "mail_service" if service.startswith("mail") else "order_service"
    dockerfile = (REPOSITORY / folder / "Dockerfile").read_text()
    found = re.search(r"^USER (\S+)$", dockerfile, re.MULTILINE)
    assert found
    return found[1]
