"""``python -m shira_cli.convert``."""

import sys

from shira_cli.convert import main

if __name__ == "__main__":
    sys.exit(main())
