"""`python -m attnres.training ...`, and so `accelerate launch -m attnres.training ...`: the same as `attnres ...`."""

from __future__ import annotations

from ..cli import main

if __name__ == "__main__":
    main()
