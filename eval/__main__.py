"""`python -m attnres.eval ...`, and so `accelerate launch -m attnres.eval ...`: the same as `attnres eval ...`."""

from __future__ import annotations

import sys

from ..cli import main

if __name__ == "__main__":
    sys.argv.insert(1, "eval")
    main()
