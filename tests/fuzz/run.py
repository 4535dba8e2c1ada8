"""Runs one program: its outcome, and a script that reproduces it."""

import ast
import inspect
import traceback
import warnings
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import keras_hf
from fuzz import oracles, properties

PACKAGE = str(Path(keras_hf.__file__).parent)
HEAD = """\
import contextlib
import warnings

import keras
import numpy as np
import tensorflow as tf

import keras_hf

L = keras.layers
warnings.simplefilter("ignore")
keras.config.set_floatx("float64")
keras.config.set_dtype_policy("float64")
"""


class Outcome(NamedTuple):
    """What came of a program.

    Attributes:
        kind: String: "ok", "refused" (by an error of the package), "failed", or "invalid" where Keras cannot train the network, either.
        signature: String, the property and the error without its numbers.
        script: String, what reproduces it.
    """

    kind: str
    signature: str = ""
    script: str = ""


def outcome_of(program, checks=None):
    """Builds a program and checks its properties in turn, up to the first that fails."""
    names = {"keras": keras, "np": np, "tf": tf, "keras_hf": keras_hf, "L": keras.layers}
    refused = ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exec(compile(program.source, "program", "exec"), names)
            one = {
                "network": names["network"],
                "x": names["x"],
                "y": names["y"],
                "sample_weight": names["sample_weight"],
            }
            if not np.isfinite(oracles.loss_of(**one)):
                return Outcome("invalid")
        except Exception as error:
            if _is_ours(error):
                return Outcome("refused", _without_numbers(error))
            return Outcome("invalid", _without_numbers(error))
        for check in checks or properties.holds_for(program):
            arguments = ["model", "network", "top", "cut", "x", "y", "sample_weight"]
            names["cut"] = program.cut
            try:
                check(*(names[argument] for argument in arguments))
            except Exception as error:
                if _is_ours(error):
                    refused = refused or f"{check.__name__}: {_without_numbers(error)}"
                    continue
                text = "".join(traceback.format_exception(error)[-3:])
                signature = f"{check.__name__}: {type(error).__name__}: {_without_numbers(error)}"
                return Outcome("failed", signature, script_of(program, check) + _commented(text))
    return Outcome("refused", refused) if refused else Outcome("ok")


def _is_ours(error):
    """Whether an error is a refusal of the package, by name; that its own products are wrong is none."""
    frames = traceback.extract_tb(error.__traceback__)
    named = isinstance(error, (ValueError, TypeError)) and "are wrong" not in str(error)
    return named and frames[-1].filename.startswith(PACKAGE) and "`" in str(error)


def _without_numbers(error):
    return "".join("#" if letter.isdigit() else letter for letter in str(error))[:140].replace("\n", " ")


def _commented(text):
    return "\n" + "".join(f"# {line}\n" for line in text.splitlines())


def script_of(program, check):
    """A script that runs by itself: what is used of the oracles, the program, the property."""
    called = f"{check.__name__}(model, network, top, cut, x, y, sample_weight)\n"
    body = f"{inspect.getsource(check)}\n\n{program.source}\ncut = {program.cut!r}\n{called}"
    found = ast.parse(inspect.getsource(oracles)).body
    parts = {node.name: ast.unparse(node) for node in found if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    used, grown = set(), True
    while grown:
        text = body + "".join(parts[name] for name in used)
        more = {name for name in parts if f"{name}(" in text} - used
        used, grown = used | more, bool(more)
    return "\n\n".join([HEAD, *(parts[name] for name in parts if name in used), body])
