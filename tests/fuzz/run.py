"""Runs one program: its outcome, and a script that reproduces it."""

import ast
import contextlib
import inspect
import traceback
import types
import warnings
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

import keras_hf
from fuzz import layers, oracles, properties

PACKAGE = str(Path(keras_hf.__file__).parent)
HEAD = """\
import contextlib
import copy
import pickle
import tempfile
import types
import warnings

import keras
import numpy as np
import tensorflow as tf

import keras_hf

L = keras.layers
warnings.simplefilter("ignore")
devices = [tf.config.LogicalDeviceConfiguration()] * 2
tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], devices)
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
    names = {"contextlib": contextlib, "types": types, "keras": keras, "np": np, "tf": tf, "keras_hf": keras_hf}
    names |= {"L": keras.layers, **vars(layers)}
    refused, check = "", properties.PROPERTIES["loss_gradient_and_product"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exec(compile(program.source, "program", "exec"), names)
            p = names["make"]()
            if not np.isfinite(oracles.loss_of(p.network, p.x, p.y, p.sample_weight)):
                return Outcome("invalid")
        except Exception as error:
            if _is_ours(error):
                return Outcome("refused", _without_numbers(error))
            if not any(frame.filename.startswith(PACKAGE) for frame in traceback.extract_tb(error.__traceback__)):
                return Outcome("invalid", _without_numbers(error))
            return _failed(program, check, error)
        for check in [properties.PROPERTIES[name] for name in checks or program.checks]:
            try:
                check(p, names["make"])
            except Exception as error:
                if _is_ours(error):
                    refused = refused or f"{check.__name__}: {_without_numbers(error)}"
                elif isinstance(error, AssertionError) or _trains_in_keras(names["make"]()):
                    return _failed(program, check, error)
                else:
                    return Outcome("invalid", _without_numbers(error))
    return Outcome("refused", refused) if refused else Outcome("ok")


def _failed(program, check, error):
    text = "".join(traceback.format_exception(error)[-3:])
    signature = f"{check.__name__}: {type(error).__name__}: {_without_numbers(error)}"
    return Outcome("failed", signature, script_of(program, check) + _commented(text))


def _trains_in_keras(p):
    """Whether Keras trains the network by Adam."""
    try:
        with p.scope():
            p.network.compile("adam", p.loss)
        p.network.fit(p.x, p.y, batch_size=p.N, verbose=0)
    except Exception:
        return False
    return True


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
    """A script that runs by itself: what is used of layers, oracles and properties, the program, the property."""
    parts = {}
    for module in (layers, oracles, properties):
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                parts[node.name] = ast.unparse(node)
    used, grown = {check.__name__}, True
    while grown:
        text = program.source + "".join(parts[name] for name in used)
        more = {name for name in parts if f"{name}(" in text} - used
        used, grown = used | more, bool(more)
    return "\n\n".join(
        [HEAD, *(parts[name] for name in parts if name in used), program.source, f"{check.__name__}(make(), make)\n"]
    )
