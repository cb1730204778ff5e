"""`patrol-prune plan | run | tune | audit | report | demo`.

Exit codes: 0 done, 2 something in the call is wrong (one message says what), 130 interrupted.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command with these arguments, the process's own by default; the exit code."""
    warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, while they load
    try:
        from patrol_prune.commands import execute

        return execute(sys.argv[1:] if arguments is None else arguments)
    except KeyboardInterrupt:
        sys.stderr.write(
            "\nInterrupted. What was finished is kept; the same command goes on from there.\n"
        )
        return 130
