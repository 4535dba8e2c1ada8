"""Checks of what a user hands in: the rule, what came, the cure. Imports nothing of the package."""

import math
import numbers


def finite(name, value, minimum=None, maximum=None):
    """Returns `value` as a float, or raises if it is no finite number in [minimum, maximum]."""
    bounds = ""
    if minimum is not None and maximum is not None:
        bounds = f" in [{minimum}, {maximum}]"
    elif minimum is not None:
        bounds = f" >= {minimum}"
    legal = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    legal = legal and (minimum is None or value >= minimum) and (maximum is None or value <= maximum)
    if not legal:
        raise ValueError(f"`{name}` must be a finite number{bounds}. Received: {name}={value!r}.")
    return float(value)


def positive(name, value):
    """Returns `value` as a float, or raises if it is no finite number > 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not (math.isfinite(value) and value > 0):
        raise ValueError(f"`{name}` must be a finite number > 0. Received: {name}={value!r}.")
    return float(value)


def integer(name, value, minimum, maximum):
    """Returns `value` as an int, or raises if it is no integer in [minimum, maximum]."""
    if not _is_integer(value) or not minimum <= value <= maximum:
        raise ValueError(f"`{name}` must be an integer in [{minimum}, {maximum}]. Received: {name}={value!r}.")
    return int(value)


def count(name, value, optional=False):
    """Returns `value` as an int, or raises if it is no integer >= 1 (nor `None`, where `optional`)."""
    if optional and value is None:
        return None
    if not _is_integer(value) or value < 1:
        alternative = " or `None`" if optional else ""
        raise ValueError(f"`{name}` must be an integer >= 1{alternative}. Received: {name}={value!r}.")
    return int(value)


def _is_integer(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def part(name, value, base, example):
    """Returns `value`, or raises if it is no instance of `base`: parts are objects, not names of objects."""
    if not isinstance(value, base):
        raise TypeError(
            f"`{name}` must be a `{base.__name__}` object, such as `{example}`. Received: {name}={value!r}."
        )
    return value
