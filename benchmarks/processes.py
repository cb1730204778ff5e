"""Work in a process of its own that may die or take too long without taking anything with it."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from typing import Any


def within(limit: float, work: Callable[[], Iterable[Any]]) -> tuple[list[Any], str]:
    """What `work()` yields in a forked process that is killed after `limit` seconds.

    Returns:
        (the items that came in time, why no more came: "" if `work` ended by itself).
    """
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(theirs, work))
    process.start()
    theirs.close()
    items: list[Any] = []
    end = time.monotonic() + limit
    try:
        while ours.poll(max(0.0, end - time.monotonic())):
            kind, value = ours.recv()
            if kind == "end":
                return items, value
            items.append(value)
        return items, f"stopped after {limit:.0f} s"
    except EOFError:
        return items, "its process died"
    finally:
        process.kill()
        process.join()


def _answer(to: Connection, work: Callable[[], Iterable[Any]]) -> None:
    try:
        for item in work():
            to.send(("item", item))
        to.send(("end", ""))
    except Exception as error:  # a benchmark over strangers' models
        to.send(("end", told(error)))


def told(error: Exception) -> str:
    """An error in one line: its type and the first line of its message."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"
