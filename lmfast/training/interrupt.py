"""Ctrl-C and SIGTERM as a wish that a loop can look at between two steps."""

from __future__ import annotations

import signal
import threading
from typing import Any


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is noted, the second acts as it did before.

    Attributes:
        signal: number of the one that came, 0 before.

    Schedulers send SIGTERM some time before they kill, torchrun sends it on Ctrl-C. Only the main
    thread can catch signals; in any other this does nothing.

    Example:
        >>> import os
        >>> import os, signal
        >>> with StopRequest() as stop:
        ...     os.kill(os.getpid(), signal.SIGTERM)
        ...     stop.signal == signal.SIGTERM
        True
    """

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        self.signal = 0
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.getsignal(number) or signal.SIG_DFL
                signal.signal(number, self._note)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: Any) -> None:
        self.signal = number
        signal.signal(number, self._previous[number])
