"""``python -m shira_cli``."""

import sys

from shira_cli.main import main

if __name__ == "__main__":
    sys.exit(main())
