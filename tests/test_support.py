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
from support import ALL_ROWS, DOCS, LOSSES, RIGHT, ROWS, document, measure

from examples.precision import precision

# Classes that do what another one does, but for the function of an entry or the way entries are put together.
ALIKE = {
    *("Average", "Concatenate", "Minimum", "Multiply", "Subtract"),
    *("ELU", "LeakyReLU", "Flatten", "Permute", "RepeatVector", "CenterCrop", "Cropping2D"),
    *("AlphaDropout", "GaussianNoise", "SpatialDropout2D"),
    *("AdaptiveMaxPooling2D", "GlobalAveragePooling2D", "GlobalMaxPooling2D", "DepthwiseConv2D", "GroupQueryAttention"),
    *("CategoricalHinge", "Hinge", "LogCosh", "MeanAbsolutePercentageError", "MeanSquaredLogarithmicError", "Tversky"),
}
# The first row of every other class, in one way each, in turn, so that all ways are seen; of what comes in one to three dimensions the second. What
# takes seconds waits for the whole table.
FIRST = {row.covers: row for row in reversed(ALL_ROWS) if not re.search("[13]D", row.name)}
QUICK = [
    (row.name, list(row.cells)[i % len(row.cells)])
    for i, row in enumerate(row for covers, row in FIRST.items() if not row.is_slow and covers not in ALIKE)
]
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
        cells, came, is_indefinite = measure(row, ways)
    assert cells == {way: row.cells[way] for way in ways}, came
    return is_indefinite


def test_classes_alike_have_rows():
    assert FIRST.keys() > {name for name in ALIKE if hasattr(keras.layers, name) or hasattr(keras.losses, name)}


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


def test_rows_have_names_of_their_own():
    assert len(ROWS) == len(ALL_ROWS)


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
        for variable in model.trainable_variables:
            value = variable.numpy()

            def cut(value, variable=variable):
                variable.assign(value)
                return flat(cut_at(row, model, data)).numpy()

            found.append(central_differences(cut, value))
            variable.assign(value)
    # Steps of 1e-6 leave errors of 1e-12 by curvature and 1e-10 by rounding.
    np.testing.assert_allclose(np.concatenate(found, 1), exact, rtol=0, atol=1e-8 * np.abs(exact).max())


@pytest.mark.slow
@pytest.mark.parametrize("name", [row.name for row in LOSSES if RIGHT in row.cells.values()])
def test_loss_hessian_of_the_oracle_is_that_of_central_differences(name):
    row = ROWS[name]
    with precision(row.floatx):
        model, data = prepare(row)
        exact = loss_hessian(row, model, data)
        loss, cut = loss_at(row, model, data)

        def gradient(value):
            with tf.GradientTape() as tape:
                tape.watch(value := tf.constant(value))
                y = loss(value)
            return tape.gradient(y, value).numpy().ravel()

        found = central_differences(gradient, cut.numpy())
    np.testing.assert_allclose(found, exact, rtol=0, atol=1e-8 * np.abs(exact).max())


def test_docs_are_what_the_table_says():
    text = DOCS.read_text()
    versions = re.search(r"Keras (\S+), TensorFlow (\S+), CPUs", text).groups()
    if versions != (keras.__version__, tf.__version__):
        pytest.skip(f"docs/support.md is of Keras {versions[0]} and TensorFlow {versions[1]}")
    assert text == document(text)
