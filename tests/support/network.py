"""A link that can be cut: the kernel drops packets between two sockets and tells neither.

    with Link(database_port) as link:
        …  # connect to link.port
        link.cut()

No process stands in between, so keepalives are the two ends' own. It needs root and iptables.
"""

import subprocess
from contextlib import ExitStack
from typing import Self

from deploy.embedded.ports import HOST

COMMAND_SECONDS = 30


def link_fault() -> str | None:
    """Say why no link can be cut here; None when one can."""
    try:
        _iptables("-t", "nat", "-S", "OUTPUT")
    except OSError as error:
        return f"iptables: {error.strerror}"
    except subprocess.CalledProcessError as error:
        return f"iptables: {error.stderr.strip()}"
    return None


class Link:
    """The way to `target` for whoever connects to `port` of 127.0.0.1; others have their own."""

    def __init__(self, target: int, *, port: int) -> None:
        self.port = port
        redirected = ["-p", "tcp", "-d", HOST, "--dport", str(port)]
        self._way = ["OUTPUT", *redirected, "-j", "REDIRECT", "--to-ports", str(target)]
        self._drop = ["INPUT", "-p", "tcp", "-m", "conntrack", "--ctorigdstport", str(port)]
        self._drop += ["-j", "DROP"]
        self._rules = ExitStack()
        self._cut = ExitStack()

    def __enter__(self) -> Self:
        """Open the way."""
        _iptables("-t", "nat", "-I", *self._way)
        self._rules.callback(_iptables, "-t", "nat", "-D", *self._way)
        self._rules.push(self._cut)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing behind."""
        self._rules.close()

    def cut(self) -> None:
        """Drop every packet from now on, in both directions, of old connections and of new."""
        _iptables("-I", *self._drop)
        self._cut.callback(_iptables, "-D", *self._drop)

    def mend(self) -> None:
        """Let packets pass again."""
        self._cut.close()

    def dropped(self) -> int:
        """Return how many packets were dropped since the cut."""
        for line in _iptables("-n", "-v", "-x", "-L", "INPUT").splitlines():
            if line.endswith(f"ctorigdstport {self.port}"):
                return int(line.split()[0])
        return 0


def _iptables(*arguments: str) -> str:
    done = subprocess.run(
        ["iptables", "-w", *arguments],
        capture_output=True,
        text=True,
        timeout=COMMAND_SECONDS,
        check=True,
    )
    return done.stdout
