"""Run the command `tinyvit` as `python -m tinyvit`."""

import sys

from tinyvit.commands import main

if __name__ == "__main__":
    sys.exit(main())
