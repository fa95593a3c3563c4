"""What is in the inbox, read over its HTTP API."""

from dataclasses import dataclass

import httpx

TIMEOUT_SECONDS = 5.0


@dataclass(frozen=True)
class Mailbox:
    """The inbox at this address."""

    url: str

    def text_of(self, order_id: str) -> str | None:
        """Return the text part of an order's mail, or None when there is none yet."""
        answer = httpx.get(f"{self.url}/api/messages/", timeout=TIMEOUT_SECONDS)
        for message in answer.raise_for_status().json()["data"]:
            if f"X-Order-Id: {order_id}\n" in message["source"]:
                plain = f"{self.url}/api/messages/{message['id']}.plain"
                return httpx.get(plain, timeout=TIMEOUT_SECONDS).raise_for_status().text
        return None
