"""Ports on 127.0.0.1 for parts."""

import random
import socket

from deploy.embedded.errors import StackError

HOST = "127.0.0.1"
# Below the ranges from which Linux and macOS take the local ports of outgoing connections, so
# that none of those can sit on a part's port while the part is being restarted.
OTHERS = range(20_000, 30_000)
ATTEMPTS = 100


class Ports:
    """Hands out distinct ports; `use_defaults` is off where several stacks run at once."""

    def __init__(self, *, use_defaults: bool = True) -> None:
        """Start with no port handed out."""
        self._use_defaults = use_defaults
        self._chosen: set[int] = set()

    def choose(self, default: int) -> int:
        """Return the default when it is free, else a free port."""
        others = random.sample(OTHERS, ATTEMPTS)
        for port in [default, *others] if self._use_defaults else others:
            if port not in self._chosen and is_free(port):
                self._chosen.add(port)
                return port
        message = f"found no free port between {OTHERS.start} and {OTHERS.stop}"
        raise StackError(message)


def is_free(port: int) -> bool:
    """Whether a server could listen there now."""
    # macOS lets 127.0.0.1 be bound beside a server on all addresses: it has to be asked first.
    if is_answering(port):
        return False
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def is_answering(port: int) -> bool:
    """Whether a server accepts connections there."""
    with socket.socket() as probe:
        probe.settimeout(1.0)
        return probe.connect_ex((HOST, port)) == 0
