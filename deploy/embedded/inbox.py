"""Sendria: takes every mail by SMTP and shows it on a page; as a program, Sendria itself."""

import asyncio
import importlib.util
import os
import pkgutil
import sys
from importlib.abc import Loader

from deploy.embedded.jars import REPOSITORY
from deploy.embedded.part import Attempt, Command, Part
from deploy.embedded.ports import HOST, is_answering
from deploy.embedded.state import State


def inbox_part(state: State, *, smtp_port: int, http_port: int) -> Part:
    """Describe the inbox; the mails are in one file of its directory."""
    home = state.data("inbox")
    argv = [sys.executable, "-m", "deploy.embedded.inbox", "--foreground", "--no-quit"]
    argv += ["--smtp-ip", HOST, "--smtp-port", str(smtp_port)]
    argv += ["--http-ip", HOST, "--http-port", str(http_port)]
    argv += ["--db", str(home / "mails.sqlite")]
    env = {**os.environ, "SENDRIA_CONFIG_DIR": str(home), "PYTHONWARNINGS": "ignore"}

    def prepare(_: Attempt) -> None:
        home.mkdir(mode=0o700, exist_ok=True)

    return Part(
        name="inbox",
        command=Command(argv=argv, log_path=state.log("inbox"), cwd=REPOSITORY, env=env),
        pid_path=state.pid("inbox"),
        prepare=prepare,
        is_ready=lambda: is_answering(smtp_port) and is_answering(http_port),
    )


def main() -> None:
    """Run Sendria without its daemon, and on Python 3.14, which took two things from it away."""
    if not hasattr(pkgutil, "get_loader"):
        pkgutil.get_loader = _get_loader
    # Importing it needs the line above.
    from sendria import cli, config  # noqa: PLC0415

    config.ensure_config_files()
    config.setup(cli.parse_argv(sys.argv[1:]))
    cli.configure_logger()
    loop = asyncio.new_event_loop()
    asyncio.set_event_loop(loop)
    cli.run_sendria_servers(loop)
    loop.run_forever()


def _get_loader(module_or_name: str) -> Loader | None:
    spec = importlib.util.find_spec(module_or_name)
    return spec.loader if spec else None


if __name__ == "__main__":
    main()
