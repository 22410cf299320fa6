# SPDX-License-Identifier: Apache-2.0
"""Work that goes on in a thread of its own, beside what the caller does."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def beside(work: Callable[[threading.Event], None], name: str, patience: float | None = None) -> Generator[None]:
    """Run `work` for as long as the context lasts.

    Args:
        work: is given an event that is set when the context is over; `over.wait(seconds)` is how it pauses.
        patience: seconds to wait for its end then, None until it has ended.
    """
    over = threading.Event()
    thread = threading.Thread(target=work, args=(over,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(patience)
