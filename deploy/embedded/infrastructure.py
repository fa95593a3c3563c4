"""What both services stand on: the broker, a database each, and the inbox."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from deploy.embedded.inbox import inbox_part
from deploy.embedded.kafka import kafka_part
from deploy.embedded.ports import HOST, Ports
from deploy.embedded.postgres import Database, database_part
from deploy.embedded.stack import Stack

PARTS = ("kafka", "order-db", "mail-db", "inbox")


@dataclass(frozen=True, kw_only=True)
class Addresses:
    """Where the infrastructure answers."""

    kafka_bootstrap_servers: str
    order_database_url: str
    mail_database_url: str
    smtp_host: str
    smtp_port: int
    inbox_url: str

    def environment(self, parts: Collection[str] = PARTS) -> dict[str, str]:
        """Return the addresses of these parts as environment variables."""
        variables = {
            "kafka": {"KAFKA_BOOTSTRAP_SERVERS": self.kafka_bootstrap_servers},
            "order-db": {"ORDER_DATABASE_URL": self.order_database_url},
            "mail-db": {"MAIL_DATABASE_URL": self.mail_database_url},
            "inbox": {
                "SMTP_HOST": self.smtp_host,
                "SMTP_PORT": str(self.smtp_port),
                "INBOX_URL": self.inbox_url,
            },
        }
        return {key: text for part in parts for key, text in variables[part].items()}


def add_infrastructure(
    stack: Stack,
    ports: Ports,
    names: Collection[str] = PARTS,
    *,
    broker_settings: Mapping[str, str] | None = None,
) -> Addresses:
    """Add the named parts to the stack and say where each of them will answer."""
    state = stack.state
    order_database = Database(state, "order-db", "order_service", ports.choose(5433))
    mail_database = Database(state, "mail-db", "mail_service", ports.choose(5434))
    kafka_port, controller_port = ports.choose(9092), ports.choose(9093)
    smtp_port, inbox_port = ports.choose(1025), ports.choose(8025)
    parts = {
        "kafka": kafka_part(
            state, port=kafka_port, controller_port=controller_port, settings=broker_settings
        ),
        "order-db": database_part(order_database),
        "mail-db": database_part(mail_database),
        "inbox": inbox_part(state, smtp_port=smtp_port, http_port=inbox_port),
    }
    for name in names:
        stack.add(parts[name])
    return Addresses(
        kafka_bootstrap_servers=f"{HOST}:{kafka_port}",
        order_database_url=order_database.url,
        mail_database_url=mail_database.url,
        smtp_host=HOST,
        smtp_port=smtp_port,
        inbox_url=f"http://{HOST}:{inbox_port}",
    )
