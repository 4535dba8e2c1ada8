"""The examples in the docstrings of public names run, and print what they say."""

import doctest
import inspect
import operator
import re
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_hf
from examples.precision import precision
from keras_hf import deepxde, pinn, plots

REFERENCE = sorted(Path(__file__).parents[1].joinpath("docs", "api").glob("*.md"))
# The names of the reference, as attributes of keras_hf.
NAMES = [
    name
    for path in REFERENCE
    for name in re.findall(r"^::: keras_hf\.(\S+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
]
# What a reader of the examples has imported.
GLOBALS = {**vars(keras_hf), **vars(pinn), "keras": keras, "np": np, "tf": tf}


# The examples of public names and of their methods, by docstring.
EXAMPLES = [
    test
    for name in NAMES
    for test in doctest.DocTestFinder().find(operator.attrgetter(name)(keras_hf), name, globs=GLOBALS)
    if test.examples
]


def test_every_public_name_is_in_the_reference():
    exported = {name for name, value in vars(keras_hf).items() if name[0] != "_" and not inspect.ismodule(value)}
    beside = {
        f"{module.__name__.rpartition('.')[-1]}.{name}"
        for module in (deepxde, pinn, plots)
        for name, value in vars(module).items()
        if name[0] != "_" and getattr(value, "__module__", None) == module.__name__
    }
    assert len(NAMES) == len(set(NAMES))
    assert sorted((exported | beside) - set(NAMES)) == []


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_examples_run_as_printed(example, capsys):
    # The types of Keras that an example sets end with it.
    with precision("float32"), np.printoptions(precision=8, suppress=False, linewidth=75):
        found = doctest.DocTestRunner().run(example)
    assert not found.failed, capsys.readouterr().out
