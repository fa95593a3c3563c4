"""How gunicorn serves the API; `order-service api` passes the two addresses."""

from typing import Any

wsgi_app = "order_service.cli:wsgi()"
workers = 2
worker_class = "gthread"
threads = 8
timeout = 30
graceful_timeout = 30
# It would be opened under $HOME, which a read-only container does not have.
control_socket_disable = True


def child_exit(_server: Any, worker: Any) -> None:
    """Drop the gauges of a worker that is gone."""
    # Not before: at its import prometheus_client looks for the directory that `--env` names.
    from prometheus_client import multiprocess  # noqa: PLC0415

    multiprocess.mark_process_dead(worker.pid)
