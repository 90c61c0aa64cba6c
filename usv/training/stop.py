"""Ends that a run is asked for: Ctrl-C, and the SIGTERM and SIGHUP of schedulers, spot machines and closed terminals. The step is
finished, everything saved, and the process leaves."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


@dataclass
class Stop:
    """The signal that asked for an end, if one has."""

    number: int | None = None

    @property
    def asked(self) -> bool:
        return self.number is not None

    @property
    def status(self) -> int:
        """What the process returns: of a run that was ended from outside what shells say of it, so that a scheduler takes it for unfinished."""
        return 0 if self.number in (None, signal.SIGINT) else 128 + self.number


@contextmanager
def stopping(stop: Stop) -> Iterator[None]:
    """Notes the signals in `stop` instead of dying of them. A hang-up that is ignored (nohup) stays so."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN or number != getattr(signal, "SIGHUP", None):
            signal.signal(number, lambda number, _frame: setattr(stop, "number", number))
    try:
        yield
    finally:
        for number, handler in before.items():
            if handler is not None:  # of one set outside Python there is nothing to put back
                signal.signal(number, handler)
