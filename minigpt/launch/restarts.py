"""Whether a stage that ended is started again, and when. No I/O: the clock is the caller's."""

EARLY = 10.0  # seconds: a stage that ends sooner, or before it serves, may have a reason that will not go away
TRIES = 3  # such ends in a row until it is given up
DELAYS = (0.0, 0.5, 1.0)  # seconds until each of the restarts in a row


class Restarts:
    """The decisions on one stage, which serves when this is made, at the time `now`."""

    def __init__(self, now: float) -> None:
        self._since: float | None = now  # when it began to serve
        self._early = 0  # ends in a row
        self._row = 0  # restarts since it last served for long

    def ready(self, now: float) -> None:
        """It serves again."""
        self._since = now

    def ended(self, now: float) -> float | None:
        """It ended, or could not be started. Returns in how many seconds to start it again; None: never."""
        if self._since is not None and now - self._since >= EARLY:
            self._early = self._row = 0
        else:
            self._early += 1
        self._since = None
        if self._early == TRIES:
            return None
        self._row += 1
        return DELAYS[self._row - 1]
