"""`python -m tinyvit` is the command `tinyvit`."""

import sys

from tinyvit.commands import main

sys.exit(main())
