"""What the package can do, as programs: run them as modules, from the root of the repository.

TensorFlow's messages at the start are kept off the screen.
"""

import contextlib
import importlib.util
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # Read once, when TensorFlow is imported.


@contextlib.contextmanager
def _without_stderr():
    """Discards what is written to stderr, also by C++."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


# Other libraries, in environments without TensorFlow, write their tables by `examples.tables`.
if importlib.util.find_spec("tensorflow"):
    with _without_stderr():  # what TensorFlow writes before it has read the level
        import tensorflow  # noqa: F401
