"""The path of the checkout. Every benchmark imports this first, and so finds `tinyvit` without an installation."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))


def environment():
    """Return the environment for another Python process, which then also finds `tinyvit` in the checkout."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


def copy_to(folder):
    """Copy the files of the checkout to a folder, except those that git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        raise SystemExit(f"{ROOT} is not a git checkout, so its own files are unknown: run this in a clone")
    for file in filter(None, listed.stdout.split("\0")):
        if (ROOT / file).is_file():  # git also lists files that were just deleted
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / file, folder / file)
