import math

import keras
import numpy as np
import pytest
import tensorflow as tf

from keras_hf import (
    ConjugateGradient,
    DoubleBackward,
    EmpiricalFisher,
    EmpiricalFisherDiagonal,
    ForwardAccumulation,
    GaussNewton,
    GrowingBatch,
    Hessian,
    HessianFree,
    HFModel,
    Identity,
    LevenbergMarquardt,
    RelativeProgress,
    ResidualTolerance,
    StructuralDamping,
)

# Martens' damping of 45 on a sum over 784 pixels: no float32 number.
MARTENS = 45 / 784


def variables(*dtypes):
    """One variable of shape (3, 2) per dtype."""
    return [keras.Variable(np.ones((3, 2)), dtype=dtype) for dtype in dtypes]


def tiny_network():
    return keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])


NUMBER_ERRORS = [
    ("damping", [-1.0, -1e-9, math.nan, math.inf, "1", True, [1.0]], "a finite number >= 0"),
    ("curvature_batch_size", [0, -1, 0.5, "all", True], "an integer >= 1 or `None`"),
    ("micro_batch_size", [0, -1, 64.0, "all", False], "an integer >= 1 or `None`"),
]


@pytest.mark.parametrize(
    ("name", "value", "rule"), [(name, value, rule) for name, values, rule in NUMBER_ERRORS for value in values]
)
def test_numbers_out_of_range_are_refused(name, value, rule):
    with pytest.raises(ValueError, match=f"`{name}` must be {rule}. Received: {name}="):
        HessianFree(**{name: value})


@pytest.mark.parametrize(
    "arguments",
    [
        {"damping": 0},
        {"damping": np.float32(3)},
        {"curvature_batch_size": 1, "micro_batch_size": 1},
        {"curvature_batch_size": None, "micro_batch_size": None},
    ],
)
def test_numbers_at_the_ends_of_their_ranges_are_taken(arguments):
    config = HessianFree(**arguments).get_config()
    assert {name: config[name] for name in arguments} == arguments


@pytest.mark.parametrize(
    ("name", "kind", "example"),
    [
        ("curvature", "Curvature", r"GaussNewton\(\)"),
        ("solver", "Solver", r"ConjugateGradient\(\)"),
    ],
)
def test_parts_that_are_no_objects_of_their_kind_are_refused(name, kind, example):
    for value in ("gauss_newton", GaussNewton, 0.5, Identity(), False):
        with pytest.raises(
            TypeError, match=f"`{name}` must be a `{kind}` object, such as `{example}`. Received: {name}="
        ):
            HessianFree(**{name: value})


@pytest.mark.parametrize(
    "arguments",
    [
        {"learning_rate": 0.1},
        {"clipnorm": 1.0},
        {"clipvalue": 1.0},
        {"global_clipnorm": 1.0},
        {"weight_decay": 1e-5},
        {"gradient_accumulation_steps": 4},
        {"momentum": 0.9},
        {"learning_rate": 0.1, "weight_decay": 0.0},
    ],
)
def test_first_order_arguments_are_refused(arguments):
    received = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    with pytest.raises(ValueError, match=f"none of Keras' first-order arguments.*Received: {received}. Leave them out"):
        HessianFree(**arguments)


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("preconditioner", "preconditioner"),
        ("stopping", "stopping"),
        ("max_cg_iterations", "max_iterations"),
        ("warm_start_decay", "warm_start_decay"),
    ],
)
def test_arguments_of_the_solver_are_refused_with_their_place(name, place):
    with pytest.raises(ValueError, match=rf"`{name}` is an argument of the solver.*ConjugateGradient\({place}="):
        HessianFree(**{name: 1})


def test_configuration_survives_saving():
    optimizer = HessianFree(
        damping=MARTENS,
        solver=ConjugateGradient(
            preconditioner=EmpiricalFisherDiagonal(0.6),
            stopping=ResidualTolerance(0.125),
            max_iterations=17,
            warm_start_decay=0.5,
        ),
        curvature=EmpiricalFisher(ForwardAccumulation()),
        growing_batch=GrowingBatch(initial_size=64),
        curvature_batch_size=300,
        micro_batch_size=64,
        seed=5,
        structural_damping=StructuralDamping(0.3),
        use_ema=True,
        ema_momentum=0.9,
        name="other",
    )
    default = HessianFree(seed=6).get_config()
    assert not [key for key, value in optimizer.get_config().items() if value == default[key]]
    for restored in (
        keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer)),
        keras.optimizers.deserialize(keras.optimizers.serialize(optimizer)),
        HessianFree.from_config(optimizer.get_config()),
    ):
        assert type(restored) is HessianFree
        assert restored.get_config() == optimizer.get_config()
        assert type(restored.curvature) is EmpiricalFisher
        assert type(restored.curvature.linearization) is ForwardAccumulation


@pytest.mark.parametrize("preconditioner", [Identity(), EmpiricalFisherDiagonal(0.6)])
@pytest.mark.parametrize("stopping", [RelativeProgress(1e-3), ResidualTolerance(), ResidualTolerance(0.1)])
@pytest.mark.parametrize("curvature", [GaussNewton(), GaussNewton(ForwardAccumulation()), Hessian(DoubleBackward())])
def test_every_combination_of_parts_survives_saving(curvature, stopping, preconditioner):
    optimizer = HessianFree(
        solver=ConjugateGradient(stopping=stopping, preconditioner=preconditioner), curvature=curvature
    )
    restored = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer))
    assert restored.get_config() == optimizer.get_config()


def test_a_part_of_the_users_own_survives_saving():
    class Twice(EmpiricalFisherDiagonal):
        pass

    config = keras.saving.serialize_keras_object(HessianFree(solver=ConjugateGradient(preconditioner=Twice(0.5))))
    restored = keras.saving.deserialize_keras_object(config, custom_objects={"Twice": Twice})
    assert type(restored.solver.preconditioner) is Twice
    assert restored.solver.preconditioner.exponent == 0.5


def test_a_configuration_is_made_of_plain_values():
    # What `model.save` writes as JSON.
    config = HessianFree(damping=np.float32(0.5), curvature_batch_size=np.int64(9), seed=np.int64(3)).get_config()
    assert {type(config[name]) for name in ("damping", "curvature_batch_size", "seed")} == {float, int}


def test_parts_are_not_shared_between_optimizers():
    assert HessianFree().curvature is not HessianFree().curvature


def test_damping_is_the_number_given_before_build_and_a_variable_after():
    optimizer = HessianFree(damping=2.5)
    assert type(optimizer.damping) is float
    assert optimizer.damping == 2.5
    optimizer.build(variables("float32"))
    assert isinstance(optimizer.damping, keras.Variable)
    assert optimizer.damping.shape == ()
    assert float(optimizer.damping) == 2.5
    optimizer.damping.assign(7.0)
    assert float(optimizer.damping) == 7.0
    assert optimizer.get_config()["damping"] == 2.5


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        (["float32"], "float32"),
        (["float64"], "float64"),
        (["float32", "float64"], "float64"),
        (["bfloat16"], "float32"),
        (["float16", "float32"], "float32"),
    ],
)
def test_state_has_the_dtype_of_the_weights_but_no_less_than_float32(dtypes, expected):
    optimizer = HessianFree()
    optimizer.build(variables(*dtypes))
    warm_start = optimizer.state().solver["warm_start"]
    assert optimizer.damping.dtype == expected and warm_start.dtype == expected
    assert warm_start.shape == (6 * len(dtypes),)
    np.testing.assert_array_equal(warm_start, 0)


def test_float64_damping_is_exact():
    optimizer = HessianFree(damping=MARTENS)
    optimizer.build(variables("float64"))
    assert float(optimizer.damping.numpy()) == MARTENS
    assert float(np.float32(MARTENS)) != MARTENS


def test_building_again_keeps_the_state():
    optimizer = HessianFree(damping=2.0)
    weights = variables("float32")
    optimizer.build(weights)
    optimizer.damping.assign(5.0)
    optimizer.build(weights)
    assert float(optimizer.damping) == 5.0


def test_state_that_is_saved_is_damping_warm_start_counter_and_what_parts_remember():
    optimizer = HessianFree()
    optimizer.build(variables("float32"))
    # Keras' learning rate is not trained but saved.
    assert {variable.name for variable in optimizer.variables} == {
        "iteration",
        "learning_rate",
        "damping",
        "scale",
        "loss",
        "least_loss",
        "convergence_count",
        "convergence_gradient_norm",
        "convergence_damping",
        "seed",
        "statistics_cases",
        "solver_warm_start",
        "solver_preconditioner_others",
        "solver_preconditioner_made_at",
        "growing_batch_size",
        "growing_batch_start",
        "growing_batch_misses",
    }


def test_learning_rate_reads_as_one():
    optimizer = HessianFree()
    optimizer.build(variables("float32"))
    assert float(optimizer.learning_rate) == 1.0


def test_a_seed_is_drawn_once_and_saved():
    drawn = HessianFree()
    assert HessianFree.from_config(drawn.get_config()).seed == drawn.seed
    assert len({HessianFree().seed for _ in range(3)}) == 3
    keras.utils.set_random_seed(7)
    first = HessianFree().seed
    keras.utils.set_random_seed(7)
    assert HessianFree().seed == first
    assert HessianFree(seed=0).seed == 0


@pytest.mark.parametrize("seed", ["x", "3", 1.5, True, -1, 2**31, [1]])
def test_seeds_that_are_no_int32_counts_are_refused(seed):
    with pytest.raises(ValueError, match="`seed` must be an integer .*Received: seed="):
        HessianFree(seed=seed)


REFUSAL = r"`HessianFree` trains a model through `keras_hf.HFModel`.*Wrap the model: `HFModel\(model\).compile\("


def test_gradients_alone_are_refused():
    optimizer, weights = HessianFree(), variables("float32")
    with pytest.raises(ValueError, match=REFUSAL):
        optimizer.apply_gradients([(tf.ones((3, 2)), weights[0])])
    with pytest.raises(ValueError, match=REFUSAL):
        optimizer.apply([tf.ones((3, 2))], weights)
    np.testing.assert_array_equal(weights[0], 1)


def test_a_plain_keras_model_is_refused_in_fit():
    model = tiny_network()
    model.compile(optimizer=HessianFree(), loss="mse")
    with pytest.raises(ValueError, match=REFUSAL):
        model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", keras.optimizers.SGD(0.1), HessianFree, {"class_name": "SGD"}])
def test_hf_model_refuses_another_optimizer(optimizer):
    message = r"`HFModel` trains with `keras_hf.HessianFree`. Received: optimizer=.*Compile `model.network`"
    with pytest.raises(ValueError, match=message):
        HFModel(tiny_network()).compile(optimizer=optimizer, loss="mse")


def test_hf_model_compiles_with_hessian_free_by_default():
    model = HFModel(tiny_network())
    model.compile(loss="mse")
    assert type(model.optimizer) is HessianFree
    # The network is built, so that its optimizer can be: what `load_model` needs.
    assert np.isnan(float(model.optimizer.damping))


def test_an_optimizer_of_other_weights_is_refused_at_compile():
    def made(units):
        return HFModel(keras.Sequential([keras.Input((2,)), keras.layers.Dense(units, "tanh"), keras.layers.Dense(1)]))

    optimizer = HessianFree()
    made(3).compile(optimizer, "mse")
    unbuilt = HFModel(keras.Sequential([keras.layers.Dense(3)]))
    for other in (made(3), made(5), unbuilt):
        with pytest.raises(
            ValueError, match=r"can train no others. Received: an optimizer built for 4 weights.*from_config"
        ):
            other.compile(optimizer, "mse")
    made(3).compile(HessianFree.from_config(optimizer.get_config()), "mse")


@pytest.mark.slow
def test_an_optimizer_of_two_models_without_weights_yet_belongs_to_the_first_that_trains():
    def made(units):
        return HFModel(keras.Sequential([keras.layers.Dense(units, "tanh"), keras.layers.Dense(1)]))

    optimizer, first, second = HessianFree(), made(3), made(5)
    first.compile(optimizer, "mse")
    second.compile(optimizer, "mse")
    x, rule = np.random.default_rng(0).normal(size=(30, 2)).astype("float32"), LevenbergMarquardt()
    losses = first.fit(x, x[:, :1], epochs=5, callbacks=[rule], verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    for train in (
        lambda: second.fit(x, x[:, :1], callbacks=[rule], verbose=0),
        lambda: second.train_on_batch(x, x[:, :1]),
    ):
        with pytest.raises(ValueError, match="built for 4 weights.*a model with 4 trainable weights.*from_config"):
            train()


def test_an_optimizer_may_be_compiled_again_into_a_model_of_its_weights(tmp_path):
    network = keras.Sequential([keras.Input((2,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    optimizer, model = HessianFree(), HFModel(network)
    model.compile(optimizer, "mse")
    optimizer.damping.assign(0.25)
    model.compile(optimizer, "mse")
    assert float(model.optimizer.damping) == 0.25
    model.save(tmp_path / "a.keras")
    assert float(keras.models.load_model(tmp_path / "a.keras").optimizer.damping) == 0.25
    assert keras.models.clone_model(model).optimizer is not optimizer
    network.layers[0].trainable = False
    with pytest.raises(
        ValueError,
        match="optimizer built for 4 weights.*a model with 2 trainable weights.*`layer.trainable` has changed",
    ):
        model.compile(optimizer, "mse")
    model.compile(HessianFree(), "mse")
