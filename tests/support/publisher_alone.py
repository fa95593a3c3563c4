"""The relay's publisher without its read-back; runs in the order service's environment."""

import contextlib
import signal
import threading

from order_service.kafka import Publisher, Topic
from order_service.models import make_engine
from order_service.relay import Relay
from order_service.settings import Settings

stop = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: stop.set())
settings = Settings.from_environment()
Relay(
    engine=make_engine(settings.database_url),
    topic=Topic(settings.kafka),
    publisher=Publisher(settings.kafka, stop),
    companion=contextlib.nullcontext,
    stop=stop,
).run()
