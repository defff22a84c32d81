"""The path of the checkout. Every benchmark imports this first, and so finds `tinyvit` without an installation."""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def environment():
    """Return the environment for another Python process, which then also finds `tinyvit` in the checkout."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
