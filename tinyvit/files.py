"""Write files so that a reader finds either the old file or the new one."""

import os
from pathlib import Path


def write_atomically(path, content):
    """Replace a file as a whole.

    The content is written to a temporary file in the same folder and flushed to the disk. Then the temporary file
    is renamed. So a reader finds the old file or the new one, even if the program is killed. A file must have only
    one writer at a time.

    Parameters
    ----------
    path : path-like
        The file to write. Its folder must exist.
    content : bytes or str
        The new content. Text is encoded as UTF-8.

    Raises
    ------
    OSError
        If the file cannot be written. The old file is unchanged.
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
