"""Files that are replaced only by complete ones: whoever is cut short while writing leaves the old file as it was."""

import contextlib
import os
import pathlib


@contextlib.contextmanager
def replacing(path):
    """Gives the path to write a new file to, in the same folder, which replaces that at `path` when the block is left without an error.

    Args:
        path: String or `os.PathLike`.
    """
    path = pathlib.Path(path)
    # The end of a name is what Keras and NumPy tell kinds of files by.
    new = path.with_name(f"new-{os.getpid()}-{path.name}")
    try:
        yield new
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
