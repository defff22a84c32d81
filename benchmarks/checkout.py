"""Where the checkout is. Every benchmark imports this first, so that it finds `tinyvit` without an installation."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def environment():
    """Return the environment for another Python, in which it finds `tinyvit` in the checkout as well."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
