"""Files that are either the old ones or the new ones, never something in between."""

import os
import secrets
from pathlib import Path


def write_atomically(path, content):
    """Replace the file at `path` by `content`, bytes or text (UTF-8), all at once.

    The bytes go to a neighbouring file first and to the disk, and then take the name: whoever reads, and whatever
    is killed when, finds the old file or the new one. Raises `OSError` as the system does, leaving the old one.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
