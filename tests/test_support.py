"""What docs/support.md promises: for every layer and loss of Keras a right Gauss-Newton product, or an error that says why there is none."""

import contextlib
import inspect
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from oracles import cut_at, first_derivative, loss_at, loss_hessian, prepare
from problems import flat
from support import ALIKE, ALL_ROWS, DOCS, LOSSES, RIGHT, ROWS, TYPICAL, document, measure

from examples.precision import precision

# Typical rows in one way each, in turn.
QUICK = [(name, ways[i % len(ways)]) for i, name in enumerate(TYPICAL) for ways in [list(ROWS[name].cells)]]
# Of every kind of operation one: products, convolutions, pools, attention, recurrence, statistics, indices.
DIFFERENCED = [
    *("Dense", "Conv2D, groups", "MaxPooling2D, same, overlapping", "MultiHeadAttention", "GRU"),
    *("LayerNormalization", "Embedding", "SpectralNormalization"),
]


def check(row, ways):
    with pytest.warns(UserWarning, match=row.warning) if row.warning else contextlib.nullcontext():
        found, is_indefinite = measure(row, ways)
    assert {way: cell for way, (cell, _) in found.items()} == {way: row.cells[way] for way in ways}, found
    return is_indefinite


@pytest.mark.parametrize("name,way", QUICK)
def test_product_is_right_or_refused(name, way):
    check(ROWS[name], [way])


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_product_is_right_or_refused_in_every_way(name):
    row = ROWS[name]
    assert check(row, list(row.cells)) == row.is_indefinite


@pytest.mark.parametrize("module,base", [(keras.layers, keras.layers.Layer), (keras.losses, keras.losses.Loss)])
def test_every_class_of_keras_has_a_row(module, base):
    classes = {value for value in vars(module).values() if inspect.isclass(value) and issubclass(value, base)}
    without = DOCS.read_text().split("\n## Without a row\n")[1]
    names = {row.covers for row in ALL_ROWS} | set(re.findall(r"^\| (\w+) \|", without, re.MULTILINE))
    assert classes <= {getattr(module, name, None) for name in names}


def test_rows_have_names_of_their_own_and_those_that_are_alike_are_in_the_docs():
    assert len(ROWS) == len(ALL_ROWS)
    assert {name for name in ALIKE if not re.search(rf"\b{re.escape(name)}\b", DOCS.read_text())} == set()


def central_differences(function, x, width=1e-6):
    """The derivative of a function of an array, both flat."""
    steps = [width * step.reshape(x.shape) for step in np.eye(x.size)]
    return np.stack([(function(x + step) - function(x - step)) / (2 * width) for step in steps], 1)


@pytest.mark.parametrize("name", DIFFERENCED)
def test_jacobian_of_the_oracle_is_that_of_central_differences(name):
    row = ROWS[name]
    with precision(row.floatx):
        model, data = prepare(row)
        exact, found = first_derivative(row, model, data), []
        compute = tf.function(lambda: flat(cut_at(row, model, data)), autograph=False)
        for variable in model.trainable_variables:
            value = variable.numpy()

            def cut(value, variable=variable):
                variable.assign(value)
                return compute().numpy()

            found.append(central_differences(cut, value))
            variable.assign(value)
    # Steps of 1e-6 leave errors of 1e-12 by curvature and 1e-10 by rounding.
    np.testing.assert_allclose(np.concatenate(found, 1), exact, rtol=0, atol=1e-8 * np.abs(exact).max())


# Not of losses that differ from one of these by a factor or by their targets alone.
@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        row.name
        for row in LOSSES
        if RIGHT in row.cells.values() and not re.search(r"smoothing|, (sum|mean)\w*(, weighted)?$", row.name)
    ],
)
def test_loss_hessian_of_the_oracle_is_that_of_central_differences(name):
    row = ROWS[name]
    with precision(row.floatx):
        model, data = prepare(row)
        exact = loss_hessian(row, model, data)
        loss, cut = loss_at(row, model, data)

        @tf.function(autograph=False)
        def gradient(value):
            with tf.GradientTape() as tape:
                tape.watch(value)
                y = loss(value)
            return tf.reshape(tape.gradient(y, value), [-1])

        found = central_differences(lambda value: gradient(tf.constant(value)).numpy(), cut.numpy())
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-8 * np.abs(exact).max())


def test_docs_are_what_the_table_says():
    text = DOCS.read_text()
    versions = re.search(r"Keras (\S+), TensorFlow (\S+), CPUs", text).groups()
    if versions != (keras.__version__, tf.__version__):
        pytest.skip(f"docs/support.md is of Keras {versions[0]} and TensorFlow {versions[1]}")
    assert text == document(text)
