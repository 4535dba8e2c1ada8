"""The examples in the docstrings of public names run, and print what they say."""

import doctest
import operator

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_hf
from docs.api import SECTIONS
from keras_hf import pinn

NAMES = [name for names in SECTIONS.values() for name in names]
# What a reader of the examples has imported.
GLOBALS = {**vars(keras_hf), **vars(pinn), "keras": keras, "np": np, "tf": tf}


# The examples of public names and of their methods, by docstring.
EXAMPLES = [
    test
    for name in NAMES
    for test in doctest.DocTestFinder().find(operator.attrgetter(name)(keras_hf), name, globs=GLOBALS)
    if test.examples
]


@pytest.fixture(autouse=True)
def types_restored():
    """Undoes an example's change of Keras' types."""
    before = keras.config.floatx(), keras.config.dtype_policy()
    yield
    keras.config.set_floatx(before[0])
    keras.config.set_dtype_policy(before[1])


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda test: test.name)
def test_examples_run_as_printed(example, capsys):
    with np.printoptions(precision=8, suppress=False, linewidth=75):
        found = doctest.DocTestRunner().run(example)
    assert not found.failed, capsys.readouterr().out
