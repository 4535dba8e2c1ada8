import math

import keras
import numpy as np
import pytest
import tensorflow as tf
from training import fit, normal, small_network

from keras_hf import (
    ConjugateGradient,
    DirectSolver,
    EmpiricalFisher,
    EmpiricalFisherDiagonal,
    ForwardAccumulation,
    GaussNewton,
    GrowingBatch,
    Hessian,
    HessianFree,
    HFModel,
    Identity,
    ResidualTolerance,
    StructuralDamping,
)

# Martens' damping of 45 on a sum over 784 pixels: no float32 number.
MARTENS = 45 / 784


def variables(*dtypes):
    """One variable of shape (3, 2) per dtype."""
    return [keras.Variable(np.ones((3, 2)), dtype=dtype) for dtype in dtypes]


NUMBER_ERRORS = [
    ("damping", [-1.0, -1e-9, math.nan, math.inf, "1", True, [1.0]], "a finite number >= 0"),
    ("curvature_batch_size", [0, -1, 0.5, "all", True], "an integer >= 1 or `None`"),
    ("micro_batch_size", [0, -1, 64.0, "all", False], "an integer >= 1 or `None`"),
    ("seed", ["x", "3", 1.5, True, -1, 2**31, [1]], "an integer .*"),
]


@pytest.mark.parametrize(("name", "values", "rule"), NUMBER_ERRORS)
def test_numbers_out_of_range_are_refused(name, values, rule):
    for value in values:
        with pytest.raises(ValueError, match=f"`{name}` must be {rule}. Received: {name}="):
            HessianFree(**{name: value})


@pytest.mark.parametrize("batch_size", [1, None])
@pytest.mark.parametrize("damping", [0, np.float32(3)])
def test_numbers_at_the_ends_of_their_ranges_are_taken(damping, batch_size):
    arguments = {"damping": damping, "curvature_batch_size": batch_size, "micro_batch_size": batch_size}
    config = HessianFree(**arguments).get_config()
    assert {name: config[name] for name in arguments} == arguments


@pytest.mark.parametrize(
    ("name", "kind", "example"),
    [("curvature", "Curvature", r"GaussNewton\(\)"), ("solver", "Solver", r"ConjugateGradient\(\)")],
)
def test_parts_that_are_no_objects_of_their_kind_are_refused(name, kind, example):
    message = f"`{name}` must be a `{kind}` object, such as `{example}`. Received: {name}="
    for value in ("gauss_newton", GaussNewton, 0.5, Identity(), False):
        with pytest.raises(TypeError, match=message):
            HessianFree(**{name: value})


FIRST_ORDER = {"learning_rate": 0.1, "clipnorm": 1.0, "clipvalue": 1.0, "global_clipnorm": 1.0}
FIRST_ORDER |= {"gradient_accumulation_steps": 4, "momentum": 0.9}


@pytest.mark.parametrize("names", [*([name] for name in FIRST_ORDER), ["learning_rate", "momentum"]], ids=" ".join)
def test_first_order_arguments_are_refused(names):
    received = ", ".join(f"{name}={FIRST_ORDER[name]!r}" for name in names)
    with pytest.raises(ValueError, match=f"none of Keras' first-order arguments.*Received: {received}. Leave them out"):
        HessianFree(**{name: FIRST_ORDER[name] for name in names})


def test_arguments_of_the_solver_are_refused_with_their_place():
    places = {name: name for name in ("preconditioner", "stopping", "warm_start_decay")}
    for name, place in {**places, "max_cg_iterations": "max_iterations"}.items():
        with pytest.raises(ValueError, match=rf"`{name}` is an argument of the solver.*ConjugateGradient\({place}="):
            HessianFree(**{name: 1})


def test_configuration_survives_saving():
    optimizer = HessianFree(
        damping=MARTENS,
        solver=ConjugateGradient(EmpiricalFisherDiagonal(0.6), ResidualTolerance(0.125), 17, 0.5),
        curvature=EmpiricalFisher(ForwardAccumulation()),
        growing_batch=GrowingBatch(initial_size=64),
        curvature_batch_size=300,
        micro_batch_size=64,
        seed=5,
        structural_damping=StructuralDamping(0.3),
        use_ema=True,
        ema_momentum=0.9,
        weight_decay=0.25,
        name="other",
    )
    default = HessianFree(seed=6).get_config()
    assert not [key for key, value in optimizer.get_config().items() if value == default.get(key)]
    for restored in (
        keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(optimizer)),
        keras.optimizers.deserialize(keras.optimizers.serialize(optimizer)),
        HessianFree.from_config(optimizer.get_config()),
    ):
        assert type(restored) is HessianFree
        assert restored.get_config() == optimizer.get_config()
        assert type(restored.curvature) is EmpiricalFisher
        assert type(restored.curvature.linearization) is ForwardAccumulation


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
    optimizer, weights = HessianFree(damping=2.5), variables("float32")
    assert type(optimizer.damping) is float
    assert optimizer.damping == 2.5
    optimizer.build(weights)
    assert isinstance(optimizer.damping, keras.Variable)
    assert optimizer.damping.shape == ()
    assert float(optimizer.damping) == 2.5
    optimizer.damping.assign(7.0)
    # Building again keeps the state.
    optimizer.build(weights)
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
def test_state_has_the_dtype_of_the_weights_but_no_less_than_float32_and_float64_damping_is_exact(dtypes, expected):
    optimizer = HessianFree(damping=MARTENS)
    optimizer.build(variables(*dtypes))
    warm_start = optimizer.state().solver["warm_start"]
    assert optimizer.damping.dtype == expected and warm_start.dtype == expected
    assert warm_start.shape == (6 * len(dtypes),)
    np.testing.assert_array_equal(warm_start, 0)
    assert (float(optimizer.damping.numpy()) == MARTENS) is (expected == "float64")


def test_state_that_is_saved_is_damping_warm_start_counter_and_what_parts_remember():
    optimizer = HessianFree()
    optimizer.build(variables("float32"))
    # Keras' learning rate is not trained but saved. It reads as one.
    assert float(optimizer.learning_rate) == 1.0
    assert {variable.name for variable in optimizer.variables} == {
        *("iteration", "learning_rate", "seed", "statistics_cases"),
        *("damping", "scale"),
        *("last_step", "optimism_reduction", "optimism_total", "optimism_weight", "optimism_gained"),
        *("convergence_count", "convergence_losses", "convergence_gradient_norm", "convergence_damping"),
        *("solver_warm_start", "solver_preconditioner_others", "solver_preconditioner_made_at"),
        *("growing_batch_size", "growing_batch_start", "growing_batch_misses"),
    }


def test_a_file_without_the_losses_of_convergence_is_read():
    saved, again = HessianFree(damping=MARTENS), HessianFree()
    for optimizer in (saved, again):
        optimizer.build(variables("float64"))
    saved.assign_state(saved.state()._replace(last_step=tf.range(6, dtype=tf.float64)))
    values = [variable.numpy() for variable in saved.variables if variable.name != "convergence_losses"]
    again.load_own_variables({str(i): value for i, value in enumerate(values)})
    for one, other in zip(saved.variables, again.variables, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_file_without_a_weight_decay_is_skipped_with_a_warning_where_there_is_one():
    saved, again = HessianFree(damping=MARTENS), HessianFree(weight_decay=0.1)
    store = {}
    for optimizer in (saved, again):
        optimizer.build(variables("float64"))
    saved.save_own_variables(store)
    before = [variable.numpy() for variable in again.variables]
    with pytest.warns(UserWarning, match="Skipping variable loading"):
        again.load_own_variables(store)
    np.testing.assert_equal([variable.numpy() for variable in again.variables], before)


def test_a_seed_is_drawn_once_and_saved():
    drawn = HessianFree()
    assert HessianFree.from_config(drawn.get_config()).seed == drawn.seed
    assert len({HessianFree().seed for _ in range(3)}) == 3
    keras.utils.set_random_seed(7)
    first = HessianFree().seed
    keras.utils.set_random_seed(7)
    assert HessianFree().seed == first
    assert HessianFree(seed=0).seed == 0


REFUSAL = r"`HessianFree` trains a model through `keras_hf.HFModel`.*Wrap the model: `HFModel\(model\).compile\("


def test_gradients_alone_are_refused():
    optimizer, weights = HessianFree(), variables("float32")
    with pytest.raises(ValueError, match=REFUSAL):
        optimizer.apply_gradients([(tf.ones((3, 2)), weights[0])])
    with pytest.raises(ValueError, match=REFUSAL):
        optimizer.apply([tf.ones((3, 2))], weights)
    np.testing.assert_array_equal(weights[0], 1)


def test_a_plain_keras_model_is_refused_in_fit():
    model = small_network()
    model.compile(optimizer=HessianFree(), loss="mse")
    with pytest.raises(ValueError, match=REFUSAL):
        model.fit(np.ones((4, 2)), np.ones((4, 1)), verbose=0)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", keras.optimizers.SGD(0.1), HessianFree, {"class_name": "SGD"}])
def test_hf_model_refuses_another_optimizer(optimizer):
    message = r"`HFModel` trains with `keras_hf.HessianFree`. Received: optimizer=.*Compile `model.network`"
    with pytest.raises(ValueError, match=message):
        HFModel(small_network()).compile(optimizer=optimizer, loss="mse")


def test_hf_model_compiles_with_hessian_free_by_default():
    model = HFModel(small_network())
    model.compile(loss="mse")
    assert type(model.optimizer) is HessianFree
    # The network is built, so that its optimizer can be: what `load_model` needs.
    assert np.isnan(float(model.optimizer.damping))


def test_an_optimizer_of_other_weights_is_refused_at_compile():
    optimizer = HessianFree()
    HFModel(small_network(units=3)).compile(optimizer, "mse")
    unbuilt = keras.Sequential([keras.layers.Dense(3)])
    for other in (small_network(units=3), small_network(units=5), unbuilt):
        with pytest.raises(ValueError, match="no others. Received: an optimizer built for 4 weights.*from_config"):
            HFModel(other).compile(optimizer, "mse")
    HFModel(small_network(units=3)).compile(HessianFree.from_config(optimizer.get_config()), "mse")


@pytest.mark.slow
def test_an_optimizer_of_two_models_without_weights_yet_belongs_to_the_first_that_trains():
    optimizer = HessianFree(solver=ConjugateGradient(Identity()), growing_batch=None)
    layers = [[keras.layers.Dense(units, "tanh"), keras.layers.Dense(1)] for units in (3, 5)]
    first, second = (HFModel(keras.Sequential(each)) for each in layers)
    first.compile(optimizer, "mse")
    second.compile(optimizer, "mse")
    x = normal(30, 2, dtype="float32")
    losses = fit(first, x, x[:, :1], epochs=2)["loss"]
    assert losses[-1] < losses[0]
    for train in (lambda: fit(second, x, x[:, :1]), lambda: second.train_on_batch(x, x[:, :1])):
        with pytest.raises(ValueError, match="built for 4 weights.*a model with 4 trainable weights.*from_config"):
            train()


def test_an_optimizer_may_be_compiled_again_into_a_model_of_its_weights(tmp_path):
    network = small_network()
    optimizer, model = HessianFree(), HFModel(network)
    model.compile(optimizer, "mse")
    optimizer.damping.assign(0.25)
    model.compile(optimizer, "mse")
    assert float(model.optimizer.damping) == 0.25
    model.save(tmp_path / "a.keras")
    assert float(keras.models.load_model(tmp_path / "a.keras").optimizer.damping) == 0.25
    assert keras.models.clone_model(model).optimizer is not optimizer
    network.layers[0].trainable = False
    message = "optimizer built for 4 weights.*a model with 2 trainable weights.*`layer.trainable` has changed"
    with pytest.raises(ValueError, match=message):
        model.compile(optimizer, "mse")
    model.compile(HessianFree(), "mse")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("solver", DirectSolver()),
        ("curvature", Hessian()),
        ("growing_batch", None),
        ("structural_damping", StructuralDamping()),
        ("curvature_batch_size", 10),
        ("micro_batch_size", 10),
    ],
)
def test_settings_that_updates_are_traced_for_are_fixed(name, value):
    optimizer = HessianFree()
    before = getattr(optimizer, name)
    with pytest.raises(
        AttributeError, match=f"`{name}` is fixed.*Received: {name}=.*another `HessianFree\\({name}=...\\)`"
    ):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) is before


def test_the_damping_is_assigned_before_and_after_the_optimizer_is_built():
    optimizer = HessianFree(damping=3.0)
    optimizer.damping = 2.0
    assert optimizer.damping == 2.0 and optimizer.get_config()["damping"] == 2.0
    optimizer.build(variables("float64"))
    assert float(optimizer.damping) == 2.0
    optimizer.damping = MARTENS
    assert float(optimizer.damping) == MARTENS
    with pytest.raises(ValueError, match="damping.*a finite number >= 0"):
        HessianFree().damping = -1.0


def test_a_weight_decay_is_assigned_where_there_is_one():
    optimizer = HessianFree(weight_decay=0.1)
    optimizer.weight_decay = 0.2
    assert optimizer.weight_decay == 0.2
    optimizer.build(variables("float64"))
    assert float(optimizer.weight_decay) == 0.2
    optimizer.weight_decay = 0.3
    assert float(optimizer.weight_decay) == 0.3
    for without in (HessianFree(), HessianFree(weight_decay="evidence")):
        with pytest.raises(
            AttributeError, match="made with a number. Received: weight_decay=0.2 where it was made with .*Compile"
        ):
            without.weight_decay = 0.2


def test_the_average_of_few_updates_is_as_good_as_the_last_weights():
    """Of exact steps on a line: that of Keras, which keeps the first weights, would lose what updates win."""
    x = np.linspace(-1, 1, 16)[:, None]
    model = HFModel(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]))
    model.compile(HessianFree(damping=0.1, use_ema=True), loss="mse")
    before = model.evaluate(x, 3 * x + 1, verbose=0)
    model.fit(x, 3 * x + 1, epochs=8, verbose=0)
    assert model.evaluate(x, 3 * x + 1, verbose=0) < 1e-3 * before
