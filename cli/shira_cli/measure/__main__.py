"""``python -m shira_cli.measure``."""

from __future__ import annotations

import sys

from shira_cli.measure import main

if __name__ == "__main__":
    sys.exit(main())
