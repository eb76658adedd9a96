"""When the next request may be sent: so many a minute, and not before the endpoint has said it will take one."""

import email.utils
import threading
import time
from collections.abc import Callable


class Pace:
    """Requests of all threads, evenly spaced.

    Args:
        per_minute: requests in a minute, at most; 0: as fast as they come.
        clock, sleep: of time.
        stopped: says when nobody is to wait any longer.
    """

    def __init__(
        self,
        per_minute: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
        stopped: Callable[[], bool] = lambda: False,
    ):
        self._gap = 60.0 / per_minute if per_minute else 0.0
        self._clock, self._sleep, self._stopped, self._lock = clock, sleep, stopped, threading.Lock()
        self._next = self._closed_until = clock()

    def wait(self) -> None:
        """Return when this thread may send a request."""
        with self._lock:
            turn = max(self._clock(), self._next, self._closed_until)
            self._next = turn + self._gap
        while (left := max(turn, self._closed_until) - self._clock()) > 0 and not self._stopped():
            self._sleep(left)

    def close_for(self, seconds: float) -> None:
        """No thread sends anything for so long."""
        with self._lock:
            self._closed_until = max(self._closed_until, self._clock() + seconds)


def retry_after(value: str | None, now: Callable[[], float] = time.time) -> float | None:
    """Seconds that a Retry-After header asks to wait: a number of seconds or a date; None where it says neither.

    Source: RFC 9110, section 10.2.3.
    """
    if value is None:
        return None
    try:
        return max(0.0, float(value.strip()))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - now())
    except (TypeError, ValueError):
        return None
