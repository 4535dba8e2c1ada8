import keras
import numpy as np
import pytest

from keras_hf.initializers import SparseNormal


def draw(shape, dtype=None, **kwargs):
    return keras.ops.convert_to_numpy(SparseNormal(seed=0, **kwargs)(shape, dtype))


@pytest.mark.parametrize("shape", [(784, 100), (10, 6), (3, 3, 8, 20), (5, 4, 2)])
def test_every_unit_gets_its_number_of_distinct_inputs(shape):
    kernel = draw(shape).reshape(-1, shape[-1])
    assert kernel.shape[0] == np.prod(shape[:-1])
    np.testing.assert_array_equal((kernel != 0).sum(axis=0), min(15, kernel.shape[0]))


def test_weights_are_normal_with_the_given_deviation():
    kernel = draw((400, 4000), num_connections=10, stddev=0.5)
    weights = kernel[kernel != 0]
    # Of 40,000 draws the mean and the deviation have standard errors of 0.0025 and 0.0018.
    assert abs(weights.mean()) < 0.01
    assert abs(weights.std() - 0.5) < 0.008
    assert abs((np.abs(weights) < 0.5).mean() - 0.6827) < 0.01


def test_every_input_is_equally_likely():
    kernel = draw((50, 10_000), num_connections=5)
    # Binomial(10,000, 1/10) has a standard deviation of 30.
    np.testing.assert_allclose((kernel != 0).sum(axis=1), 1000, atol=130)


def test_weights_do_not_depend_on_which_inputs_were_chosen():
    kernel = draw((50, 10_000), num_connections=5)
    position = np.broadcast_to(np.arange(50)[:, None], kernel.shape)
    chosen = kernel != 0
    # A correlation of 50,000 independent pairs has a standard error of 0.0045.
    assert abs(np.corrcoef(kernel[chosen], position[chosen])[0, 1]) < 0.02


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_dtype_is_the_one_asked_for_with_all_its_digits(dtype):
    kernel = SparseNormal(seed=0)((30, 8), dtype)
    assert keras.backend.standardize_dtype(kernel.dtype) == dtype
    weights = keras.ops.convert_to_numpy(kernel[kernel != 0])
    assert weights.shape == (15 * 8,)
    if dtype == "float64":
        assert (weights != weights.astype("float32")).all()


@pytest.mark.parametrize("radius", [0.9, 1.1])
def test_a_square_kernel_has_the_spectral_radius_asked_for(radius):
    kernel = draw((100, 100), spectral_radius=radius)
    assert np.abs(np.linalg.eigvals(kernel)).max() == pytest.approx(radius, rel=1e-5)
    np.testing.assert_array_equal((kernel != 0).sum(axis=0), 15)
    # The same draw, scaled: a standard deviation would not matter.
    plain = draw((100, 100))
    np.testing.assert_allclose(kernel / kernel.max(), plain / plain.max(), atol=1e-6)
    np.testing.assert_allclose(draw((100, 100), stddev=7.0, spectral_radius=radius), kernel, rtol=1e-4, atol=1e-6)


def test_a_kernel_without_eigenvalues_is_no_number_lost():
    # One connection for each of two units: for some seeds both come from the same unit, and one of them may be itself.
    for seed in range(8):
        kernel = SparseNormal(1, seed=seed, spectral_radius=1.1)((2, 2))
        assert np.isfinite(kernel).all()


def test_a_spectral_radius_of_kernels_that_are_not_square_is_refused():
    with pytest.raises(ValueError, match=r"have eigenvalues, of shape `\(units, units\)`. Received: shape=\(10, 30\)"):
        SparseNormal(spectral_radius=1.1)((10, 30))
    with pytest.raises(ValueError, match="`spectral_radius` must be a finite number > 0. Received: spectral_radius=0"):
        SparseNormal(spectral_radius=0)


def test_integer_seed_repeats_no_seed_within_an_instance_only_and_generator_never():
    shape = (40, 5)
    seeded, unseeded = SparseNormal(seed=3), SparseNormal()
    for initializer in (seeded, unseeded):
        np.testing.assert_array_equal(initializer(shape), initializer(shape))
    np.testing.assert_array_equal(seeded(shape), SparseNormal(seed=3)(shape))
    generated = SparseNormal(seed=keras.random.SeedGenerator(3))
    for one, other in ((seeded, SparseNormal(seed=4)), (unseeded, SparseNormal()), (generated, generated)):
        assert np.any(one(shape) != other(shape))


@pytest.mark.parametrize("seed", [7, keras.random.SeedGenerator(7)])
def test_configuration_survives_saving(seed):
    initializer = SparseNormal(num_connections=4, stddev=0.25, seed=seed)
    config = keras.saving.serialize_keras_object(initializer)
    restored = keras.saving.deserialize_keras_object(config)
    assert isinstance(restored, SparseNormal)
    assert restored.get_config() == initializer.get_config()
    np.testing.assert_array_equal(restored((20, 3)), initializer((20, 3)))


def test_layers_can_use_it():
    convolution = keras.layers.Conv2D(4, 3, kernel_initializer=SparseNormal(num_connections=5))
    keras.Sequential([keras.Input((8, 8, 2)), convolution])
    kernel = convolution.kernel.numpy().reshape(18, 4)
    np.testing.assert_array_equal((kernel != 0).sum(axis=0), 5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_connections": 0}, r"`num_connections` must be an integer >= 1.*=0"),
        ({"num_connections": 2.5}, r"`num_connections` must be an integer >= 1.*=2.5"),
        ({"stddev": 0.0}, r"`stddev` must be a finite number > 0.*stddev=0.0"),
        ({"stddev": float("nan")}, r"`stddev` must be a finite number > 0.*stddev=nan"),
        ({"seed": "1"}, r"`seed`"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SparseNormal(**arguments)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_a_shape_without_inputs_is_refused(shape):
    with pytest.raises(ValueError, match=r"at least two axes. Received: shape=\(.*biases"):
        SparseNormal()(shape)
