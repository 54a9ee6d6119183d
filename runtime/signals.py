"""A run ends at a whole step when it is asked to stop."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


@contextmanager
def interrupted_by_terminate() -> Iterator[None]:
    """SIGTERM as SIGINT, which raises KeyboardInterrupt: whatever ends a process, nothing half made stays. Only the main thread can listen."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    old = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


@contextmanager
def stop_signals(told: Callable[[], None]) -> Iterator[threading.Event]:
    """Set the event at the first SIGINT or SIGTERM and call `told`; a second SIGINT interrupts at once. Only the main thread can listen."""
    stopping = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if stopping.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not stopping.is_set():
            stopping.set()
            with suppress(Exception, SystemExit):  # whoever reads may have been stopped by the same signal, which ends rich
                told()

    old = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopping
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
