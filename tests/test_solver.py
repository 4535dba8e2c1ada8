"""What every solver promises: a path that descends, a zero step at rest, settings that survive saving, a memory that is handed on."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from problems import compiled, inputs, make_model, model_data, objective_function, update_state, with_objective
from training import fit, normal

from examples.baselines import LastIterate, WholeStep
from keras_hf import (
    ConjugateGradient,
    DirectSolver,
    DoubleBackward,
    EmpiricalFisherDiagonal,
    GaussNewton,
    HessianFree,
    Identity,
    LevenbergMarquardt,
    PreconditionedMomentum,
)
from keras_hf.common.vectors import SeparateRows
from keras_hf.differentiation.curvature import Curvature
from keras_hf.method.update import hf_update
from keras_hf.solvers.solver import LocalModel
from keras_hf.solvers.stopping import StoppingRule

# A new solver stands here, with a damping that it starts well from.
SOLVERS = {
    "ConjugateGradient": (ConjugateGradient(EmpiricalFisherDiagonal(), max_iterations=12), 0.3),
    "LastIterate": (LastIterate(Identity(), max_iterations=12), 0.3),
    "WholeStep": (WholeStep(Identity(), max_iterations=12), 3.0),
    "DirectSolver": (DirectSolver(order=1), 0.3),
    "PreconditionedMomentum": (PreconditionedMomentum(EmpiricalFisherDiagonal(), 0.5), 0.3),
}
over_solvers = pytest.mark.parametrize("solver, damping", SOLVERS.values(), ids=SOLVERS)


def problem():
    model = make_model()
    return model, model_data(model, inputs(), np.sin(3 * np.repeat(inputs()[:, :1], 3, 1)))


@over_solvers
def test_configuration_survives_saving(solver, damping):
    kind = type(solver)
    restored = keras.saving.deserialize_keras_object(
        keras.saving.serialize_keras_object(solver), custom_objects={kind.__name__: kind}
    )
    assert type(restored) is kind and restored.get_config() == solver.get_config()


@pytest.mark.slow
@pytest.mark.usefixtures("float64")
@over_solvers
def test_an_update_lowers_the_loss_and_hands_on_a_state_of_the_same_form(solver, damping):
    model, data = problem()
    state = with_objective(model, data, lambda objective: update_state(objective, solver, damping, scale=1.0))

    def compute(objective, state):
        result = hf_update(objective, GaussNewton(DoubleBackward()), solver, state)
        return result, objective.loss_at(result.step)

    of_state = objective_function(model, compute)
    first, loss_after = of_state(data, state)
    second, _ = of_state(data, first.state)
    assert first.step_size > 0 and loss_after < first.loss
    for result in (first, second):
        tf.nest.assert_same_structure(state, result.state)
        for before, after in zip(tf.nest.flatten(state), tf.nest.flatten(result.state), strict=True):
            assert before.shape == after.shape and before.dtype == after.dtype
    # The objective did not move: nor does what is predicted of it depend on anything but the state.
    assert second.loss == first.loss
    # That of the ratio, unless the solver knows what it predicts, and what the solver needs.
    assert first.trace["num_products"] + first.trace.get("num_forward_derivatives", 0) >= 1
    assert all(np.ndim(value) == 0 for value in first.logs.values())


@pytest.mark.usefixtures("float64")
@over_solvers
def test_at_rest_the_step_is_zero(solver, damping):
    model, data = problem()

    def compute(objective):
        local = LocalModel(
            objective,
            lambda: solver.linearize(objective, GaussNewton(DoubleBackward())),
            tf.zeros([objective.num_weights], tf.float64),
        )
        path = solver.solve(local, tf.constant(damping, tf.float64), solver.initial_state(objective.variables, []))
        candidates = path.candidates.matrix() if isinstance(path.candidates, SeparateRows) else path.candidates
        return candidates, path.num_products

    candidates, num_products = with_objective(model, data, compute)
    assert candidates.shape[0] >= 1 and not candidates.numpy().any()
    assert num_products <= 1


class CountingRule(StoppingRule):
    """Stops after as many iterations as updates were made, plus three."""

    def initial_state(self, variables, layers):
        return {"updates": tf.constant(0)}

    def prepared(self, state):
        rule = CountingRule()
        rule.limit = 3 + state["updates"]
        return rule

    def next_state(self, state, result):
        return {"updates": state["updates"] + 1}

    def should_stop(self, iteration, value_at, residual_norm, b_norm):
        return iteration >= self.limit


class CountingCurvature(Curvature):
    """Gauss-Newton times the number of updates made, plus one."""

    def initial_state(self, variables, layers):
        return {"updates": tf.constant(0.0, tf.float64)}

    def prepared(self, objective, state):
        curvature = self.by(self.linearization)
        curvature.factor = state["updates"] + 1
        return curvature, {"updates": state["updates"] + 1}

    def linearize(self, micro_batch):
        product = GaussNewton(self.linearization).linearize(micro_batch)
        return lambda v: [self.factor * image for image in product(v)]


def test_the_states_of_stopping_rule_and_curvature_are_handed_on(float64):
    solver = ConjugateGradient(EmpiricalFisherDiagonal(), CountingRule(), warm_start_decay=0.0)
    optimizer = HessianFree(0.3, solver, CountingCurvature(), growing_batch=None, seed=0)
    layers = [keras.layers.Dense(4, "tanh"), keras.layers.Dense(3)]
    model = compiled(keras.Sequential([keras.Input((2,)), *layers]), optimizer=optimizer)
    x, rule = normal(300, 2), LevenbergMarquardt(low=-9, high=9)
    history = fit(model, x, np.sin(3 * np.repeat(x[:, :1], 3, 1)), epochs=3, callbacks=[rule])
    assert history["cg_iterations"] == [3, 4, 5]
    state = model.optimizer.state()
    assert state.curvature["updates"] == 3 and state.solver["stopping"]["updates"] == 3
