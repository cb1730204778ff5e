"""`patrol-prune plan | run | tune | audit | export | report | demo`.

Exit codes: 0 done, 2 something in the call is wrong (one message says what), 130 interrupted, by
Ctrl-C or by the signal that schedulers end a job with.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command with these arguments, the process's own by default; the exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, while they load
    try:
        with _ended_as_interrupted():
            from patrol_prune.commands import execute

            return execute(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        sys.stderr.write(
            "\nInterrupted. What was finished is kept; the same command goes on from there.\n"
        )
        return 130


@contextlib.contextmanager
def _ended_as_interrupted() -> Iterator[None]:
    """SIGTERM is taken as Ctrl-C is, unless something else handles it already."""
    mine = (threading.current_thread() is threading.main_thread()
            and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL)
    if mine:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
