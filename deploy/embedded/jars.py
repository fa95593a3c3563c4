"""Java libraries by Maven coordinate, downloaded once for all checkouts of this user."""

import fcntl
import hashlib
import os
import shutil
import sys
from pathlib import Path

from deploy.embedded.part import Attempt, Command, Job

REPOSITORY = Path(__file__).parents[2]
DOWNLOAD_SECONDS = 600.0


def directory(coordinates: str) -> Path:
    """Where the jars of these coordinates are, or will be."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    key = hashlib.sha256(coordinates.encode()).hexdigest()[:16]
    return cache / "order-and-mail" / key


def ensure(coordinates: str, log_path: Path, attempt: Attempt) -> None:
    """Download the jars unless they are there."""
    target = directory(coordinates)
    if target.exists():
        return
    attempt.say("downloading, the first time only")
    # A process of its own, because only a process can be ended in the middle of a download.
    argv = [sys.executable, "-m", "deploy.embedded.jars", coordinates, str(target)]
    command = Command(argv=argv, log_path=log_path, cwd=REPOSITORY)
    name = f"download of {coordinates.partition('+')[0]}"
    Job(name=name, command=command, timeout_seconds=DOWNLOAD_SECONDS).bring_up(attempt)


def download(coordinates: str, target: Path) -> None:
    """Resolve and fetch the jars; the target appears only when it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if target.exists():
            return
        scratch = target.with_suffix(".part")
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            fetch(coordinates, scratch).rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)


def fetch(coordinates: str, scratch: Path) -> Path:
    """Let jgo work in an empty directory and return the one in it that has all the jars."""
    # Only the downloading process needs these, and they take a third of a second.
    from jgo.env import EnvironmentBuilder, LinkStrategy  # noqa: PLC0415
    from jgo.maven import MavenContext  # noqa: PLC0415

    context = MavenContext(repo_cache=scratch / "repository")
    builder = EnvironmentBuilder(
        context, cache_dir=scratch / "environments", link_strategy=LinkStrategy.HARD
    )
    environment = builder.from_endpoint(coordinates)
    complete = scratch / "jars"
    complete.mkdir()
    for jar in (*environment.class_path_jars, *environment.module_path_jars):
        jar.rename(complete / jar.name)
    return complete


if __name__ == "__main__":
    try:
        download(sys.argv[1], Path(sys.argv[2]))
    except (OSError, RuntimeError) as error:
        sys.exit(f"cannot download {sys.argv[1]}: {error}")
