"""Commands of the service in processes of their own, forked from one that has them imported.

    python forked.py SOCKET

What takes a second from the start is here ready in a tenth. A request is the JSON of arguments and
environment with three file descriptors for standard input, output and error; the answer is the
exit code.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Self

MOST_BYTES = 1_000_000
START_SECONDS = 30.0


class Forked:
    """The client's side: a process that forks, for as long as the block lasts."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / "forked"

    def __enter__(self) -> Self:
        """Start the process that forks."""
        self._process = subprocess.Popen([sys.executable, __file__, str(self._path)])
        give_up_at = time.monotonic() + START_SECONDS
        while not self._path.exists():
            assert time.monotonic() < give_up_at
            time.sleep(0.02)
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._process.terminate()
        self._process.wait()

    def run(self, arguments: list[str], environment: dict[str, str], files: list[Any]) -> int:
        """Run a command to its end and return its exit code."""
        with socket.socket(socket.AF_UNIX) as asked:
            asked.connect(str(self._path))
            request = json.dumps([arguments, environment]).encode()
            socket.send_fds(asked, [b"\n"], [file.fileno() for file in files])
            asked.sendall(request)
            asked.shutdown(socket.SHUT_WR)
            return int(asked.recv(16))


def serve(path: str) -> None:
    """Fork for each request, until the end of time."""
    from mail_service import cli  # noqa: F401, PLC0415 - what the forked processes have imported

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path + ".new")
        listening.listen(64)
        Path(path + ".new").rename(path)
        while True:
            asked, _ = listening.accept()
            if os.fork() == 0:
                listening.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                answer(asked)
            asked.close()


def answer(asked: socket.socket) -> None:
    """Be the command that is asked for, to its end."""
    _, files, _, _ = socket.recv_fds(asked, 1, 3)
    request = b""
    while more := asked.recv(MOST_BYTES):
        request += more
    arguments, environment = json.loads(request)
    for number, file in enumerate(files):
        os.dup2(file, number)
    os.environ.clear()
    os.environ.update(environment)
    time.tzset()
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    asked.sendall(str(code).encode())
    os._exit(code)


def main(arguments: list[str]) -> int:
    """Run the command and return its exit code, as the interpreter would make it."""
    from mail_service.cli import main as run  # noqa: PLC0415 - as above

    sys.argv = ["mail-service", *arguments]
    try:
        run()
    except SystemExit as ended:
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
            return 1
        return ended.code or 0
    except BaseException:  # noqa: BLE001 - the interpreter would print it too
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    serve(sys.argv[1])
