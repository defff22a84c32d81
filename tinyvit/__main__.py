"""`python -m tinyvit` is the command `tinyvit`."""

import sys

from tinyvit.commands import main

if __name__ == "__main__":
    sys.exit(main())
