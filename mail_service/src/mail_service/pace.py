"""When the next mail may go: the breaker and its ramp; pure, the caller brings the clock."""

from mail_service.replies import Bearing

# A relay that breaks off one dialogue may mean that mail; one that breaks off these means us.
MOST_BROKEN_LINKS = 10
# A relay that is just back gets one mail at a time in the first second, two in the next, four…
RAMP_SECONDS = 1.0
MOST_DOUBLINGS = 10
# One that turned a connection away is asked for one more after so long.
GROWTH_SECONDS = 10.0


class Pace:
    """How many mails may be claimed at once; seconds are of any one monotonic clock.

    A relay that turns a connection away while it serves others gets fewer at once.

    closed ──trouble──▶ open ──probe due──▶ one mail ──trouble──▶ open
       ▲                                       │
       └───────ramp◀──────the relay serves─────┘
    """

    def __init__(self, *, most: int, probe_seconds: float) -> None:
        self.capacity = most
        self._probe_seconds = probe_seconds
        # How often it was said that what is claimed and not begun must not begin.
        self.recalls = 0
        self._probe_at: float | None = None
        self._closed_at = float("-inf")
        self._served_at = float("-inf")
        self._broken_links = 0
        self._most = most
        self._crowded_at = float("-inf")

    @property
    def is_open(self) -> bool:
        """Whether the relay is left alone."""
        return self._probe_at is not None

    def allowance(self, *, under_way: int, now: float) -> int:
        """Return how many more mails may be claimed."""
        if self._probe_at is not None:
            return 1 if now >= self._probe_at else 0
        ramped_seconds = min(now - self._closed_at, MOST_DOUBLINGS * RAMP_SECONDS)
        limit = 1 << int(ramped_seconds // RAMP_SECONDS)
        return max(0, min(self._bearable(now), limit) - under_way)

    def began(self, count: int, *, now: float) -> None:
        """Note that mails were claimed; while open this was the probe, and the next one waits."""
        if self._probe_at is not None and count:
            self._probe_at = now + self._probe_seconds

    def note(self, bearing: Bearing, *, under_way: int, now: float) -> None:
        """Learn from an answer that came with so many mails under way, its own among them."""
        match bearing:
            case Bearing.TROUBLE:
                self._open(now)
            case Bearing.CROWDED:
                self._note_crowd(under_way, now)
            case Bearing.BROKEN_LINK:
                self._broken_links += 1
                if self._broken_links >= MOST_BROKEN_LINKS:
                    self._open(now)
            case Bearing.SERVES:
                self._broken_links = 0
                self._served_at = now
                if self._probe_at is not None:
                    self._probe_at, self._closed_at = None, now
            case Bearing.NOTHING:
                pass

    def _open(self, now: float) -> None:
        self._probe_at = now + self._probe_seconds
        self.recalls += 1

    def _note_crowd(self, under_way: int, now: float) -> None:
        bearable = min(self._bearable(now), under_way)
        is_serving = not self.is_open and now - self._served_at < self._probe_seconds
        if bearable <= 1 or not is_serving:
            self._open(now)
        else:
            self._most, self._crowded_at = bearable - 1, now
            self.recalls += 1

    def _bearable(self, now: float) -> int:
        grown = min(now - self._crowded_at, self.capacity * GROWTH_SECONDS) // GROWTH_SECONDS
        return min(self.capacity, self._most + int(grown))
