"""Writing a file so that a reader finds either the old one or the new one."""

import os
from pathlib import Path


def write_atomically(path, content):
    """Replace the file at `path` by `content`, bytes or text (UTF-8), all at once.

    The bytes go to a neighbouring file first and to the disk. Then that file takes the name. So a reader finds the
    old file or the new one, even if the program is killed. The next write replaces a neighbour that a kill left
    behind, so a file needs one writer at a time. Raises `OSError` as the system does, leaving the old file.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.part")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
