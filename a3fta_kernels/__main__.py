"""`python -m a3fta_kernels` is the command `a3fta`."""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
