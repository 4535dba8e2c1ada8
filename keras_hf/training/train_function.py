"""What `fit` calls for a batch: one compiled update, what must hold before it, and what is looked at after it."""

import math

import keras
import tensorflow as tf

from keras_hf.common import checks
from keras_hf.differentiation.linearization import ForwardAccumulation
from keras_hf.network.fixed_network import Data
from keras_hf.problem.replicas import of_each_replica, on_replicas
from keras_hf.training import guard, step
from keras_hf.training.product_check import first_check


class TrainFunction:
    """Performs `steps_per_execution` updates, each on the next batch of an iterator, and returns the logs of the last one.

    Before the first update, the loss and a product are computed by a program of their own; the loss must be the one that the update finds, and the
    product satisfy its identities. An error leaves every value as it was before that update.

    Args:
        model: `HFModel`, compiled.
    """

    def __init__(self, model):
        self._model = model
        self.is_first_update = True
        self._update = self._compiled(lambda data: _reported(model, data))
        self._check = self._compiled(lambda data: self._opened(data, first_check))
        self._num_nonfinite = self._compiled(_num_nonfinite_cases)
        self._spec, self._traced = None, {}

    def __call__(self, iterator):
        logs = None
        for _ in range(self._model.steps_per_execution):
            try:
                data = next(iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                if logs is None:
                    raise
                break
            logs = self._updated(data, getattr(iterator, "element_spec", None))
        return logs

    def _updated(self, data, spec):
        """Performs one update; `spec` holds the types and shapes of the iterator's batches, `None` where these are not known."""
        model, optimizer = self._model, self._model.optimizer
        # `.numpy()`: `float` does not accept the variables of replicas.
        scale = float(optimizer.curvature_scale.numpy())
        checks.current_damping(float(optimizer.damping.numpy()), is_to_be_found=scale == 0)
        with guard.values_kept_on_error(model.values()):
            setup = model.setup_for(self._of_one_replica(data))
            # An error of double backward shows in the first update; forward accumulation is checked in every update.
            found = None
            if self.is_first_update or isinstance(setup.linearization, ForwardAccumulation):
                with guard.unaltered_arithmetic():
                    found = [float(value) for value in self._run(self._check, data, spec)]
            with guard.unaltered_arithmetic(setup.gains_by_optimized_graphs):
                logs, report = self._run(self._update, data, spec)
            loss = float(report.logs["update_loss"])
            # Where the gradient is not finite, neither need the product be right, and the step is rejected.
            if found is not None and math.isfinite(float(report.logs["gradient_norm"])):
                guard.raise_if_wrong(model.network.name, setup, loss, *found)
            num_nonfinite = 0 if math.isfinite(loss) else int(self._run(self._num_nonfinite, data, spec))
        self.is_first_update = False
        model.after_update(report, num_nonfinite)
        return logs

    def _of_one_replica(self, data):
        """Returns one replica's part of a batch as a `Data` of tensors."""
        strategy = self._model.distribute_strategy
        leaves = keras.tree.map_structure(lambda leaf: strategy.experimental_local_results(leaf)[0], data)
        return Data(*keras.utils.unpack_x_y_sample_weight(leaves)).tensors()

    def _run(self, program, data, spec):
        """Runs a program as traced for batches of `spec`: of a single batch, it would be traced anew for another length."""
        if spec is None or self._model.run_eagerly:
            return program(data)
        if spec != self._spec:
            self._spec, self._traced = spec, {}
        if program not in self._traced:
            self._traced[program] = program.get_concrete_function(spec)
        return self._traced[program](data)

    def _compiled(self, function):
        """Returns `function(data)`, run on every replica, as a program that gives the results of the first."""
        run = on_replicas(self._model.distribute_strategy, function)
        return run if self._model.run_eagerly else tf.function(run, autograph=False, reduce_retracing=True)

    def _opened(self, data, function):
        """Returns `function(objective, setup, optimizer)` with the cases of a batch that an update uses; metrics do not count them."""
        data, optimizer = Data(*keras.utils.unpack_x_y_sample_weight(data)), self._model.optimizer
        setup = self._model.setup_for(data).without_metrics()
        return step.on_update_cases(setup, optimizer, data, lambda objective, *_: function(objective, setup, optimizer))


def _num_nonfinite_cases(data):
    """Returns the number of cases of a batch, over all replicas, with a value that is not finite."""
    number = Data(*keras.utils.unpack_x_y_sample_weight(data)).num_nonfinite_cases()
    return tf.reduce_sum(of_each_replica(number))


def _reported(model, data):
    """Returns the logs of a `train_step`, which a user may override, and the `StepReport` of the update in it."""
    with step.reports() as reports:
        logs = model.train_step(data)
    return logs, reports[-1]
