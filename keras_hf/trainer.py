"""HFTrainer: one Hessian-free update as the train step of a Keras model."""

import contextlib
import functools
import math

import keras
import numpy as np
import tensorflow as tf

from keras_hf import compiled_model, guard
from keras_hf.advice import Advice
from keras_hf.common import checks, keras_private
from keras_hf.common.part import if_finite
from keras_hf.common.replaced import replaced
from keras_hf.problem import batching
from keras_hf.problem.curvature import GaussNewton
from keras_hf.problem.fixed_network import Data, FixedNetwork
from keras_hf.problem.linearization import ForwardAccumulation
from keras_hf.problem.local_objective import LocalCases
from keras_hf.problem.objective import Objective
from keras_hf.problem.places import Places
from keras_hf.problem.replicas import across_replicas, of_each_replica, replica_number
from keras_hf.problem.structure import second_derivatives_explained
from keras_hf.solvers.direct import DirectSolver
from keras_hf.solvers.momentum import PreconditionedMomentum
from keras_hf.update import hf_update


class HFTrainer(keras.Model):
    """A Keras model whose train step is one Hessian-free update. `HFModel` adds what a user calls.

    Args:
        network: `keras.Model`, the network that is trained.
        name: Name of this model.
        **kwargs: As `keras.Model`.
    """

    # True only inside `_whole_loss`.
    _regularizers_apart = False

    def __init__(self, network, name=None, **kwargs):
        super().__init__(name=name, **kwargs)
        self.network = network
        self._choice = None  # the `compiled_model.Choice` of the last trace
        self._advice = Advice()
        # The largest number of cases of a batch: in the running `fit`, if known; and the number that the traced update supports.
        self._most_cases, self._most_cases_traced = None, math.inf
        # The number of updates before a `fit` that goes on from no other; `BackupAndRestore` brings back another number.
        self._begins_at = None
        self.last_trace = None
        # What was chosen where the optimizer leaves the choice of the solver to the model; `None` = the optimizer's.
        self._chosen_solver = None

    # What Keras calls.

    def make_train_function(self, force=False):
        """Creates `train_function` as Keras does; a step that raises an error leaves every value unchanged."""
        self._check_optimized_weights()
        is_right = (self._most_cases or math.inf) <= self._most_cases_traced
        if self.train_function is not None and is_right and not force:
            return
        self._most_cases_traced = math.inf
        super().make_train_function(force=True)
        step = self.train_function

        def train_function(iterator):
            # `.numpy()`: `float` does not accept the variables of replicas.
            checks.current_damping(
                float(self.optimizer.damping.numpy()),
                is_to_be_found=float(self.optimizer.curvature_scale.numpy()) == 0,
            )
            with guard.values_kept_on_error(self._values(), but=guard.END_OF_DATA):
                if self._begins_at is not None:
                    if self._begins_at == int(self.optimizer.iterations.numpy()):
                        self.optimizer.forget_least_loss()
                    self._keep("_begins_at", None)
                explained = guard.xla_explained(self.network.name, lambda: self._choice)
                with guard.unaltered_arithmetic(), explained, keras_private.results_of_first_replica():
                    logs = dict(step(iterator))
                trace = logs.pop("trace", None)
                num_nonfinite = int(logs.pop("num_nonfinite_cases", 0))
                reduction, *errors = [
                    float(logs.pop(key, 0.0)) for key in ("reduction", "product_error", "repeat_error")
                ]
                guard.raise_if_wrong(self.network.name, self._choice, float(logs["loss"]), *errors)
            self._is_first_update.assign(False)
            self._keep("last_trace", trace)
            self._advise_after_update(logs, num_nonfinite, reduction)
            return logs

        with self.distribute_strategy.scope():
            self._keep("_is_first_update", tf.Variable(True, trainable=False))

        self.train_function = train_function

    def make_test_function(self, force=False):
        """Creates `test_function` as Keras does."""
        if self.test_function is not None and not force:
            return
        super().make_test_function(force=True)
        step = self.test_function

        def test_function(iterator):
            with keras_private.results_of_first_replica():
                return step(iterator)

        self.test_function = test_function

    def test_step(self, data):
        """Evaluates one batch; the metrics are those of all replicas."""
        super().test_step(data)
        return across_replicas(lambda replicas: self.get_metrics_result())

    def train_step(self, data):
        """Performs one update; see the class. Keras calls it in replica context."""
        data = Data(*keras.utils.unpack_x_y_sample_weight(data))
        lengths_are_equal = checks.equal_lengths(data.x, data.y, data.sample_weight)
        cases, unseen, update = Places.of_batch(of_each_replica(data.num_cases), replica_number()), None, self._update
        if self._growing_batch is not None:
            update = functools.partial(update, num_cases=cases.num_cases)
            selection = self._growing_batch.select(self.optimizer.state().growing_batch, cases.counts, cases.replica)
            cases, unseen = selection
            unseen = unseen.first(batching.chunk_of(self.solver.chunk_share, unseen.num_cases))
            with tf.control_dependencies(lengths_are_equal):
                data, unseen_data = data.take(cases.indices()), data.take(unseen.indices())
            unseen = unseen_data, unseen
        logs = self._with_objective(data, update, self._most_cases, cases, unseen)
        keras_private.track_loss(self, logs["loss"], logs["num_cases"])
        metrics = across_replicas(lambda replicas: self.get_metrics_result())
        return {**logs, **metrics}

    def _build_optimizer(self):
        with self.distribute_strategy.scope():
            self.optimizer.build(self.trainable_variables)

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        # Keras builds from the first batch only under a strategy. Without it the first fit would trace twice, and a network without an input shape
        # would have no weights when the optimizer asks for them.
        if iterator is not None:
            data_batch = keras_private.batch_spec(iterator)

        def spec(leaf):
            if leaf is None or isinstance(leaf, type(tf.type_spec_from_value(None))):
                return None
            leaf = keras_private.spec_of_first_replica(leaf)
            return (
                leaf if isinstance(leaf, tf.TensorSpec) else tf.TensorSpec(np.shape(leaf), getattr(leaf, "dtype", None))
            )

        data_batch = keras.tree.map_structure(spec, data_batch)
        self._hand_layers_to_optimizer()
        with self.distribute_strategy.scope():
            keras_private.symbolic_build(self, data_batch)

    def _hand_layers_to_optimizer(self):
        # Before each call that may build the optimizer: until it is built, it may be compiled into several models.
        self.optimizer.find_layers = lambda: keras_private.all_layers(self.network)
        self.optimizer.choose_solver = lambda: PreconditionedMomentum() if compiled_model.momentum_pays(self) else None

    @property
    def losses(self):
        """Losses added in `call`, by activity regularizers and by weight regularizers."""
        # An update adds them separately: they are not in the compiled loss of a piece.
        return [] if self._regularizers_apart else super().losses

    # The choice of the solver.

    @property
    def solver(self):
        """The solver in use: the optimizer's, or the one that was chosen for the network and the data."""
        return self._chosen_solver or self.optimizer.solver

    @property
    def _growing_batch(self):
        """The growing batch in use, `None` where every update uses all cases."""
        return None if self.solver.uses_all_cases else self.optimizer.growing_batch

    def _choose_solver(self, few, num_cases):
        """Chooses the solver where the optimizer leaves that to the model.

        Args:
            few: `(x, y, sample_weight)` of a few cases, if all of them come as one batch; else `None`.
            num_cases: Integer, the number of all cases.
        """
        if not self.optimizer.chooses_solver:
            return
        chosen = None
        if few is not None and self.distribute_strategy.num_replicas_in_sync == 1:
            data = self._built_for(*few)
            chosen = DirectSolver() if compiled_model.exact_solver_pays(self, data, num_cases) else None
        if (chosen is None) != (self._chosen_solver is None):
            self.train_function = None
            self._keep("_chosen_solver", chosen)

    # One update: from a batch to its objective, to new weights and logs.

    def _with_objective(self, data, function, most_cases=None, cases=None, unseen=None):
        """Calls `function(objective, structure)` with the objective of the next update, once for all replicas.

        Args:
            data: `Data`, the cases of the objective.
            function: Callable; where there are unseen cases, their objective is its third argument.
            most_cases: Integer, an upper bound of the number of cases, where only that is known.
            cases: `places.Places`, which cases of the batch these are; `None` = all.
            unseen: `Data` and `Places` of cases that the update does not use, or `None`.
        """
        optimizer = self.optimizer
        task, structure, _ = self._task(data)
        chunk_size, chunk_share = optimizer.curvature_batch_size, self.solver.chunk_share
        piece_size = optimizer.micro_batch_size or structure.default_piece_size(data, chunk_size)
        if "unknown" in structure.combinations:
            piece_size, chunk_size, chunk_share = None, None, 1.0
        bounds = [bound for bound in (chunk_size, data.static_num_cases, most_cases) if bound is not None]
        # Unknown if the size of pieces depends on lengths at run time: products are then traced for several pieces.
        one_piece = piece_size is None or (not tf.is_tensor(piece_size) and bool(bounds) and piece_size >= min(bounds))
        structure = structure._replace(chunk_is_one_piece=one_piece)
        if one_piece and piece_size is not None and most_cases is not None and piece_size < (chunk_size or math.inf):
            # Another `fit` may use more cases.
            self._most_cases_traced = piece_size
        if self.solver.uses_all_cases and most_cases is not None:
            # Replicas have room for so many rows.
            self._most_cases_traced = most_cases
        update_number = tf.cast(optimizer.iterations.value, tf.int32)
        if cases is None:
            cases = Places.of_batch(of_each_replica(data.num_cases), replica_number())
        if chunk_size is None and chunk_share < 1:
            chunk_size = batching.chunk_of(chunk_share, cases.num_cases)
        seed = tf.convert_to_tensor(optimizer.seed)
        pieces = batching.divide(cases, chunk_size, piece_size, update_number, seed)
        fixed = FixedNetwork(task, structure, update_number)
        local = [LocalCases(fixed, data, pieces)]
        if unseen is not None:
            data, run = unseen
            local.append(LocalCases(fixed, data, batching.divide(run, None, piece_size, update_number, seed)))

        def across(replicas, cases, *others):
            objective = Objective(replicas, cases, fixed, most_cases)
            return function(objective, structure, *[Objective(replicas, o, fixed) for o in others])

        with second_derivatives_explained(structure.layer_of_op):
            return across_replicas(across, *local)

    def _task(self, data):
        """Returns the `Task`, its `Structure` and the `Choice` made by the trace, which is kept, too."""
        task = compiled_model.task_of(self, self._whole_loss)
        optimizer, replicas = self.optimizer, self.distribute_strategy.num_replicas_in_sync
        curvature = optimizer.curvature
        structure, choice = compiled_model.trace(task, data, curvature, self.solver, replicas, self.network.name)
        self._keep("_choice", choice)
        if isinstance(curvature, GaussNewton) and structure.combinations and not structure.has_curvature:
            self._advice.no_curvature()
        if "unknown" in structure.combinations:
            self._advice.unknown_combination()
        # Not of recurrent networks, which have loops: what they gain by exact steps, they gain in float32, too.
        if isinstance(self.solver, DirectSolver) and not structure.nesting_ops:
            self._advice.exact_solver_in_float32(
                {variable.dtype for variable in task.weights} | {keras.config.floatx()}
            )
        return task, structure, choice

    def _whole_loss(self, data, y_pred):
        """Returns the result of an overridden `compute_loss`, without the regularizers and the added losses."""
        with replaced((self, "_regularizers_apart", True)):
            return keras_private.call_compute_loss(self, data.x, data.y, y_pred, data.sample_weight)

    def _update(self, objective, structure, unseen=None, num_cases=None):
        """Computes one update on a batch of `num_cases`, applies it and returns its logs."""
        optimizer = self.optimizer

        def trial(step):
            before = unseen.loss_at(tf.zeros_like(step))
            return batching.Trial(
                tf.cast(unseen.totals.num_cases, tf.int32), before, *unseen.loss_and_variation_at(step)
            )

        result = hf_update(
            objective,
            self._choice.curvature,
            self.solver,
            optimizer.state(),
            unseen=None if unseen is None else trial,
            # An error of double backward shows in the first update; forward accumulation is checked in every update.
            check=tf.convert_to_tensor(self._is_first_update)
            | isinstance(self._choice.linearization, ForwardAccumulation),
        )
        logs = self._update_logs(objective, result)
        if unseen is not None:
            grown = optimizer.growing_batch.next_state(
                result.state.growing_batch,
                tf.cast(objective.totals.num_cases, tf.int32),
                result.actual_reduction,
                result.unseen,
                num_cases,
                tf.stack([tf.convert_to_tensor(optimizer.seed), objective.update_number]),
            )
            result = result._replace(state=result.state._replace(growing_batch=grown))
        self._apply(objective, structure, result)
        return logs

    def _apply(self, objective, structure, result):
        """Assigns weights and states; a rejected step leaves them bit-equal."""
        accepted = result.step_size > 0
        for variable, old, new in zip(
            self.trainable_variables, objective.start(), objective.new_weights(result.step), strict=True
        ):
            variable.value.assign(tf.where(accepted, new, old))
        keras_private.average_weights(self.optimizer)
        num_cases, num_before = objective.totals.num_cases, result.state.statistics_cases
        before = [tf.convert_to_tensor(state.value) for state in structure.states]
        states = tf.cond(accepted, lambda: objective.next_states(result.network_states, num_before), lambda: before)
        for state, new in zip(structure.states, states, strict=True):
            state.value.assign(new)
        # Halved after every update: old cases say less and less about new ones.
        next_cases = tf.maximum(num_cases, num_before / 2)
        # Kept after a rejected step too, since it describes the unchanged weights. Values that are not finite are not: they would outlast the cases
        # that caused them.
        before, after = self.optimizer.state(), result.state
        kept = {
            name: if_finite(getattr(after, name), getattr(before, name), objective.agreed)
            for name in ("solver", "curvature")
        }
        self.optimizer.assign_state(after._replace(statistics_cases=tf.where(accepted, next_cases, num_before), **kept))
        self.optimizer.iterations.value.assign_add(1)

    def _update_logs(self, objective, result):
        floating = {
            "loss": result.loss,
            "damping": result.damping,
            "reduction_ratio": result.reduction_ratio,
            "step_size": result.step_size,
            "gradient_norm": result.gradient_norm,
            # For `train_function`, which removes them, as it removes the trace.
            "reduction": result.actual_reduction,
            "product_error": result.product_error,
            "repeat_error": result.repeat_error,
        }
        whole = {
            "num_cases": objective.totals.num_cases,
            "converged": result.state.convergence.has_converged,
            "num_nonfinite_cases": tf.cond(
                tf.math.is_finite(result.loss), lambda: tf.constant(0), objective.num_nonfinite_cases
            ),
        }
        return {
            **{k: tf.convert_to_tensor(v) for k, v in floating.items()},
            **{k: tf.cast(v, tf.int32) for k, v in whole.items()},
            **result.logs,
            "trace": result.trace,
        }

    # Values and advice.

    def _values(self):
        """Returns the list of `tf.Variable`s of the weights and the optimizer."""
        # Keras creates the attribute in `compile`.
        optimizer = getattr(self, "optimizer", None)
        return [variable.value for variable in (*self.variables, *(optimizer.variables if optimizer else ()))]

    def _built_for(self, x, y, sample_weight):
        """Returns the `Data` of arrays, and makes the network's weights where they are not made yet."""
        to_tensor = lambda leaf: None if leaf is None else tf.convert_to_tensor(leaf)  # noqa: E731
        data = Data(*keras.tree.map_structure(to_tensor, (x, y, sample_weight)))
        self._maybe_symbolic_build(data_batch=tuple(data))
        return data

    @contextlib.contextmanager
    def _batches_of_at_most(self, num_cases):
        """Context in which a batch has at most `num_cases`: an update traced in it may not need to support several pieces."""
        self._most_cases = num_cases
        try:
            yield
        finally:
            self._most_cases = None

    def _keep(self, name, value):
        """Sets an attribute without Keras' tracking, so that it is not saved."""
        object.__setattr__(self, name, value)

    def _check_optimized_weights(self):
        """Warns if the trainable weights have changed since `compile`, which fixes them, as in Keras; raises if they are another model's."""
        if self.optimizer.built:
            optimized = keras_private.optimized_weights(self.optimizer)
            own = {id(weight) for weight in self.weights}
            if not all(id(weight) in own for weight in optimized):
                checks.weights_of_optimizer(optimized, self.trainable_variables)
            known, now = ({id(v): v.path for v in weights} for weights in (optimized, self.trainable_variables))
            self._advice.changed_weights(
                [path for key, path in {**known, **now}.items() if (key in known) != (key in now)]
            )

    def _advise_after_update(self, logs, num_nonfinite, reduction):
        optimizer, growing_batch = self.optimizer, self._growing_batch
        if not self.solver.uses_all_cases:
            # A growing batch that starts small does so on purpose.
            starts_with = growing_batch.initial_size if growing_batch else math.inf
            self._advice.small_batch(logs, min(self.solver.fewest_cases, starts_with))
        if not self.solver.judges_by_chunk:
            # Not of small updates, each of which may gain little that lasts.
            self._advice.batches_disagree(float(optimizer.loss_and_least[0].numpy()), reduction)
        if isinstance(optimizer.curvature, GaussNewton):
            # Errors add up in the sums of a product: negative curvature of 2.3 epsilons was measured with a convex loss under BatchNormalization.
            rounding = 10 * self._choice.epsilon * float(optimizer.curvature_scale.numpy())
            self._advice.negative_curvature(logs, rounding)
        self._advice.no_progress(logs, num_nonfinite, int(optimizer.iterations.numpy()), self.compute_dtype)
