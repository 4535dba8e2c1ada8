"""What flat vectors promise: packed and unpacked they are the same weights, and inner products see what CG must see."""

import numpy as np
import pytest
import tensorflow as tf

from keras_hf.common.vectors import (
    SeparateRows,
    assign,
    dot,
    gram,
    inner_product,
    num_rows,
    num_weights,
    pack,
    row_gram,
    unpack,
    unpack_rows,
    vector_dtype,
)

# None, one, and around the 256 products that are summed in their own dtype.
SIZES = [0, 1, 255, 256, 257, 512, 1000]


def weights(*dtypes):
    return [tf.Variable(tf.cast(tf.reshape(tf.range(6.0), [3, 2]) + i, dtype)) for i, dtype in enumerate(dtypes)]


def test_unpacking_what_was_packed_gives_the_tensors_back():
    variables = weights(tf.float32, tf.float64, tf.float16)
    vector = pack(variables, vector_dtype(variables))
    assert vector.shape == (18,) == (num_weights(variables),) and vector.dtype == tf.float64
    for part, variable in zip(unpack(vector, variables), variables, strict=True):
        assert part.dtype == variable.dtype
        np.testing.assert_array_equal(part, variable)


@pytest.mark.parametrize("num_rows", [1, 3])
def test_unpacking_rows_is_unpacking_each(num_rows):
    variables = weights(tf.float32, tf.float64)
    rows = tf.reshape(tf.range(12.0 * num_rows, dtype=tf.float64), [num_rows, 12])
    together = unpack_rows(rows, variables)
    assert [part.dtype for part in together] == [tf.float32, tf.float64]
    for i, row in enumerate(rows):
        for part, alone in zip(together, unpack(row, variables), strict=True):
            assert part.shape == (num_rows, 3, 2)
            np.testing.assert_array_equal(part[i], alone)


@pytest.mark.parametrize("dtypes", [["float32"], ["float16", "bfloat16"], ["float32", "float64"]])
def test_vectors_are_of_float64_where_a_weight_is_and_of_float32_else(dtypes):
    assert vector_dtype(weights(*dtypes)) == (tf.float64 if "float64" in dtypes else tf.float32)


def test_assign_gives_each_variable_its_value():
    variables = weights(tf.float32, tf.float64)
    assign(variables, unpack(tf.ones([12]), variables))
    for variable in variables:
        np.testing.assert_array_equal(variable, np.ones((3, 2)))


def test_inner_product_of_lists_is_that_of_the_vectors():
    a, b = weights(tf.float32, tf.float64), weights(tf.float64, tf.float32)
    assert inner_product(a, b).numpy() == pack(a, tf.float64).numpy() @ pack(b, tf.float64).numpy()
    assert inner_product([], []).numpy() == 0.0


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length_is_known", [True, False])
def test_dot_equals_that_of_numpy(size, length_is_known):
    a, b = np.random.default_rng(size).normal(size=(2, size))
    spec = tf.TensorSpec([size if length_is_known else None], tf.float64)
    total = tf.function(dot, input_signature=[spec, spec])(a, b)
    assert total.dtype == tf.float64 and total.shape == ()
    assert total.numpy() == pytest.approx(a @ b, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_dot_of_whole_numbers_is_exact(size, dtype):
    # Every product and every sum of 256 of them is below 2^24: float32 holds it.
    a, b = np.random.default_rng(size).integers(-200, 201, size=(2, size))
    assert dot(tf.constant(a, dtype), tf.constant(b, dtype)).numpy() == a @ b


def test_dot_sums_blocks_of_float32_in_float64():
    # 1 + 4095 * 2^-25 exactly, but for the 255 that share the block of the 1; a float32 sum that meets the 1 first would stay at 1.
    tiny = tf.fill([4095], tf.constant(2.0**-25))
    total = dot(tf.concat([[1.0], tiny], 0), tf.ones([4096]))
    assert total.dtype == tf.float64
    assert 1 + (4095 - 255) * 2.0**-25 <= total.numpy() <= 1 + 4095 * 2.0**-25


@pytest.mark.parametrize("size", [100, 1000, 100_000])
def test_dot_sees_relative_changes_of_a_millionth_in_float32(size):
    a = np.random.default_rng(size).normal(size=size).astype("float32")
    b = a.copy()
    # One entry more that is a millionth of the sum: what CG may win in ten iterations at the end.
    b[size // 2] += np.float32(1e-6 * (a @ a) / a[size // 2])
    expected = b.astype("float64") @ a.astype("float64") - a.astype("float64") @ a.astype("float64")
    # Roundings that both sums have in common cancel.
    assert float(dot(a, b) - dot(a, a)) == pytest.approx(expected, rel=0.05)


@pytest.mark.parametrize("mode", [lambda f: f, tf.function(autograph=False)], ids=["eager", "compiled"])
@pytest.mark.parametrize("place", [0, 255, 256, 299])
def test_dot_passes_on_what_is_not_finite(place, mode):
    def total(*values):
        a = np.ones(300, "float32")
        a[[place, place - 1][: len(values)]] = values
        return mode(dot)(tf.constant(a), tf.ones([300])).numpy()

    assert np.isnan(total(np.nan))
    assert total(np.inf) == np.inf
    assert total(-np.inf) == -np.inf
    assert np.isnan(total(np.inf, -np.inf))


def test_gram_matrices_of_columns_and_of_rows_are_the_products():
    matrix = np.random.default_rng(0).normal(size=(20, 7))
    for found in (gram(tf.constant(matrix)), row_gram(tf.constant(matrix.T))):
        np.testing.assert_allclose(found, matrix.T @ matrix, atol=1e-13)


@pytest.mark.filterwarnings("error")
def test_gram_matrices_of_what_is_not_finite_are_not_finite_without_a_warning():
    matrix = tf.constant([[np.inf, 0.0, 1e300], [1.0, -np.inf, 1e300]], "float64")
    with np.errstate(all="raise"):
        assert not np.isfinite(gram(matrix)).all() and not np.isfinite(row_gram(matrix)).all()


def test_rows_are_those_of_their_matrix():
    array = tf.TensorArray(tf.float64, 3, clear_after_read=False).unstack(
        tf.constant([[1.0, 2], [3, 4], [5, 6]], "float64")
    )
    rows = SeparateRows(array, tf.constant([2, 0]))
    matrix = [[5.0, 6], [1, 2]]
    np.testing.assert_array_equal(rows.matrix(), matrix)
    np.testing.assert_array_equal([rows[0], rows[-1]], matrix)
    np.testing.assert_array_equal(rows[-1:].matrix(), matrix[-1:])
    assert num_rows(rows) == num_rows(rows.matrix()) == 2
