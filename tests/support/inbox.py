"""What the inbox of the compose file has, read as Mailpit shows it; its stand-in shows the same."""

import re
from collections import Counter
from dataclasses import dataclass

import httpx

PAGE = 500
TIMEOUT_SECONDS = 10.0
MESSAGE_ID = re.compile(r"order-confirmation\.(?P<order_id>.+?)(?:\+[^@]+)?@")


@dataclass(frozen=True)
class Inbox:
    """The inbox at this address."""

    url: str

    def copies(self) -> Counter[str]:
        """Count the mails of each order, told by their Message-IDs."""
        counts: Counter[str] = Counter()
        start, total = 0, 1
        while start < total:
            answer = httpx.get(
                f"{self.url}/api/v1/messages",
                params={"start": start, "limit": PAGE},
                timeout=TIMEOUT_SECONDS,
            )
            page = answer.raise_for_status().json()
            total = page["total"]
            for message in page["messages"]:
                found = MESSAGE_ID.match(message["MessageID"])
                if found:
                    counts[found["order_id"]] += 1
            start += PAGE
        return counts
