"""What docs/support.md promises: for every layer and loss of Keras a right Gauss-Newton product, or an error that says why there is none."""

import contextlib
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
from support import (
    ALL_ROWS,
    DOCS,
    LOSSES,
    OUTSIDE,
    RIGHT,
    ROWS,
    by_the_table,
    classes,
    document,
    first_derivative,
    loss_at,
    loss_hessian,
    measure,
    numerical_derivative,
    precision,
    prepare,
)

# The first row of every class, in one way each, in turn, so that all ways are seen; of what comes in one to three dimensions the second. What takes
# seconds waits for the whole table.
FIRST = {row.covers: row for row in reversed(ALL_ROWS) if not re.search("[13]D", row.name)}.values()
QUICK = [(row.name, row.ways[i % len(row.ways)]) for i, row in enumerate(row for row in FIRST if not row.is_slow)]
# Of every kind of operation one: products, convolutions, pools, attention, recurrence, statistics, indices.
DIFFERENCED = [
    "Dense",
    "Conv2D, groups",
    "MaxPooling2D, same, overlapping",
    "MultiHeadAttention",
    "GRU",
    "LayerNormalization",
    "Embedding",
]


def check(row, ways):
    with pytest.warns(UserWarning, match=row.warning) if row.warning else contextlib.nullcontext():
        measured = measure(row, ways)
    assert measured.outcomes == {way: row.outcomes[way] for way in ways}, measured.remarks
    return measured


@pytest.mark.parametrize("name,way", QUICK)
def test_product_is_right_or_refused(name, way):
    check(ROWS[name], [way])


@pytest.mark.slow
@pytest.mark.parametrize("name", ROWS)
def test_product_is_right_or_refused_in_every_way(name):
    row = ROWS[name]
    assert check(row, row.ways).is_indefinite == row.is_indefinite


@pytest.mark.parametrize("module,base", [(keras.layers, keras.layers.Layer), (keras.losses, keras.losses.Loss)])
def test_every_class_of_keras_has_a_row(module, base):
    assert set(classes(module, base)) <= {row.covers for row in ALL_ROWS} | set(OUTSIDE)


def test_rows_have_names_of_their_own():
    assert len(ROWS) == len(ALL_ROWS)


@pytest.mark.parametrize("name", DIFFERENCED)
def test_jacobian_of_the_oracle_is_that_of_central_differences(name):
    row = ROWS[name]
    with precision(row.dtype):
        model, data = prepare(row)
        exact = first_derivative(row, model, data)
        found = numerical_derivative(row, model, data)
    # Steps of 1e-6 leave errors of 1e-12 by curvature and 1e-10 by rounding.
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-8 * np.abs(exact).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", [row.name for row in LOSSES if RIGHT in row.outcomes.values()])
def test_loss_hessian_of_the_oracle_is_that_of_central_differences(name):
    row = ROWS[name]
    with precision(row.dtype):
        model, data = prepare(row)
        exact = loss_hessian(row, model, data)
        found = numerical_hessian(*loss_at(row, model, data))
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-8 * np.abs(exact).max())


def numerical_hessian(loss, cut):
    """The second derivative by central differences of the first."""

    def gradient(change):
        with tf.GradientTape() as tape:
            tape.watch(moved := cut + tf.reshape(change, cut.shape))
            value = loss(moved)
        return tf.reshape(tape.gradient(value, moved), [-1])

    steps = 1e-6 * tf.eye(tf.size(cut), dtype=cut.dtype)
    return np.stack([(gradient(step) - gradient(-step)) / 2e-6 for step in steps])


def test_docs_are_what_the_table_says():
    text = DOCS.read_text()
    versions = re.search(r"Keras (\S+), TensorFlow (\S+), CPUs", text).groups()
    if versions != (keras.__version__, tf.__version__):
        pytest.skip(f"docs/support.md is of Keras {versions[0]} and TensorFlow {versions[1]}")
    assert text == document(by_the_table())
