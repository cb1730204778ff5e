"""`python -m patrol_prune` is the same as `patrol-prune`."""

import sys

from patrol_prune.cli import main

if __name__ == "__main__":
    sys.exit(main())
