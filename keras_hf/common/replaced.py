"""Temporary replacement of attributes: the only way in which this package changes what a layer or a loss does."""

import contextlib

_ABSENT = object()


@contextlib.contextmanager
def replaced(*replacements):
    """Sets attributes while it is open, and puts back exactly what was there: an instance's own value, or none where the class had it.

    Args:
        *replacements: Tuples of an object, the attribute's name, and the value.
    """
    with contextlib.ExitStack() as stack:
        for owner, name, value in replacements:
            stack.callback(_restore, owner, name, vars(owner).get(name, _ABSENT), getattr(owner, name))
            # object's: Keras' own would track what is set.
            object.__setattr__(owner, name, value)
        yield


def _restore(owner, name, own, value):
    if own is not _ABSENT:
        object.__setattr__(owner, name, own)
    elif name in vars(owner):
        object.__delattr__(owner, name)
    else:  # a property, which keeps its value elsewhere
        object.__setattr__(owner, name, value)
