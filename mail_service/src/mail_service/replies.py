"""How a dialogue with the relay ended, and how far it had come."""

import re
from dataclasses import dataclass
from enum import Enum, auto

# The relay ends the connection with it.
CLOSING = 421
ENHANCED_CODE = re.compile(r"\b([245])\.(\d{1,3})\.(\d{1,3})\b")


class Stage(Enum):
    """How far the dialogue was when the reply came, or failed to; STOPPED is our own doing."""

    CONNECT = "connect"
    MAIL = "MAIL"
    RCPT = "RCPT"
    DATA = "DATA"
    STOPPED = "stopped"
    FINAL_DOT = "final dot"


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of a dialogue; a code of None means that no reply came."""

    stage: Stage
    code: int | None
    text: str

    @property
    def enhanced_code(self) -> str | None:
        """The RFC 3463 code in the text, if there is one."""
        found = ENHANCED_CODE.search(self.text)
        return found.group() if found else None

    def __str__(self) -> str:
        return f"{self.stage.value}: {self.code or 'no reply'} {self.text}".rstrip()


class Bearing(Enum):
    """What an answer says of the relay, whatever becomes of the mail."""

    SERVES = auto()
    TROUBLE = auto()
    CROWDED = auto()
    BROKEN_LINK = auto()
    NOTHING = auto()
