"""HFModel: the interface to Keras. Unpacks the batch, owns the weights, fills the logs."""

import contextlib
import functools
import math
import os
import warnings

import keras
import numpy as np
import tensorflow as tf

from keras_hf import arrays, compiled_model, covariance, guard
from keras_hf.advice import Advice
from keras_hf.common import checks, files, keras_private
from keras_hf.common.part import if_finite
from keras_hf.common.replaced import replaced
from keras_hf.common.vectors import vector_dtype
from keras_hf.damping import DampingCallback
from keras_hf.optimizer import HessianFree
from keras_hf.pinn import PINN
from keras_hf.problem import batching
from keras_hf.problem.curvature import EmpiricalFisher, GaussNewton
from keras_hf.problem.fixed_network import Data, FixedNetwork
from keras_hf.problem.linearization import ForwardAccumulation
from keras_hf.problem.local_objective import LocalCases
from keras_hf.problem.loss_function import LossFunction
from keras_hf.problem.objective import Objective
from keras_hf.problem.replicas import across_replicas, of_each_replica, replica_number
from keras_hf.problem.structure import second_derivatives_explained
from keras_hf.product_check import judged, other_linearization, product_errors
from keras_hf.solvers.direct import DirectSolver
from keras_hf.update import hf_update


@keras.saving.register_keras_serializable("keras_hf")
class HFModel(keras.Model):
    """Trains a Keras model by Hessian-free optimization.

    One batch of `fit` is one update. `network` stays an ordinary Keras model that shares its weights with this one. `fit`, `evaluate`, `predict`,
    `compile` and callbacks work as in Keras, with these exceptions, where Keras' default would be a trap:

    - `fit` on arrays without `batch_size` takes all training cases as one batch; validation keeps batches of 32.
    - An update uses a part of its batch, which grows, unless `HessianFree(growing_batch=None)`, and except with `DirectSolver`; loss and metrics in
      the logs are of the cases used.
    - A batch of all cases has a fixed order, permuted once by the optimizer's seed (`shuffle=True`) or as given, so that curvature chunks do not
      change.
    - `compile` without an optimizer uses `HessianFree()`.
    - The moving statistics of BatchNormalization are those of the cases used, at the weights after the update, instead of averages over updates.

    Logs of an update, in addition to the loss (before the update, Keras' running mean) and the metrics (before the update):

    | key | meaning |
    | --- | --- |
    | `damping` | the damping that the update used |
    | `reduction_ratio` | actual over predicted reduction; minus infinity if the loss rose, NaN if nothing could be measured |
    | `step_size` | the step relative to the solver's candidate; 0 = the step was rejected and the weights are unchanged |
    | `gradient_norm` | norm of the gradient before the update |
    | `num_cases` | number of cases that the update used: those of the batch, or of its growing part |
    | `converged` | 1 if no step lowers the loss by more than rounding: the solver pauses until gradient or damping change |

    The solver adds its own entries; those of `ConjugateGradient` are:

    | key | meaning |
    | --- | --- |
    | `cg_iterations` | CG iterations run |
    | `cg_step` | number of the iterate taken |
    | `cg_stop` | why CG stopped: a `CGStop` |
    | `negative_curvature` | 1 if CG met negative curvature |

    and those of `DirectSolver`:

    | key | meaning |
    | --- | --- |
    | `arc_step` | the place on the arc at which the step was taken: 1 = its end |
    | `acceleration` | norm of the geodesic acceleration over that of the step |

    A `train_step` or `compute_loss` that the network overrides is not called; override `HFModel.compute_loss` instead.

    The first update of a compiled model computes its loss twice and its step's curvature in two ways. If they differ by more than rounding (a network
    that is a different function in every call, a second derivative that is wrong in TensorFlow), the update raises an error and leaves every value
    unchanged. Weights with constraints are projected before the first update if they violate them, and in every step that is tried.

    `last_trace` records how the last update found its step, a dict of tensors; `UpdateRecorder` writes it to a file. `save` and `save_weights` keep
    the file that they replace until the new one is complete.

    Args:
        network: `keras.Model`: Sequential, functional or subclassed, built or not.
        name: Name of this model.

    Raises:
        TypeError: If `network` is not a `keras.Model`.

    Example:

    >>> network = keras.Sequential([keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])
    >>> model = HFModel(network)
    >>> model.compile(optimizer=HessianFree(damping=0.1), loss="mse")
    >>> x = np.linspace(-1, 1, 64)[:, None]
    >>> history = model.fit(x, np.sin(3 * x), epochs=5, callbacks=[LevenbergMarquardt()], verbose=0)
    """

    def __init__(self, network, name=None, **kwargs):
        if not isinstance(network, keras.Model) or isinstance(network, HFModel):
            raise TypeError(
                f"`network` must be a `keras.Model`, such as `keras.Sequential([...])`. Received: network={network!r} "
                f"of type {type(network).__name__}."
            )
        super().__init__(name=name, **kwargs)
        self.network = network
        self._choice = None  # the `compiled_model.Choice` of the last trace
        self._advice = Advice()
        # The largest number of cases of a batch: in the running `fit`, if known; and the number that the traced update supports.
        self._most_cases, self._most_cases_traced = None, math.inf
        self.last_trace = None
        # What was chosen where the optimizer leaves the choice of the solver to the model; `None` = the optimizer's.
        self._chosen_solver = None
        if network.built:
            self.built = True
        for method in ("train_step", "compute_loss"):
            if getattr(type(network), method) is not getattr(keras.Model, method):
                warnings.warn(
                    f"`HFModel` does not call the `{method}` that {type(network).__name__} overrides. Override `HFModel.compute_loss` instead.",
                    stacklevel=2,
                )

    # The network as a Keras model.

    def call(self, inputs, training=None, mask=None):
        """Calls the network."""
        arguments = {}
        if keras_private.takes_training(self.network):
            arguments["training"] = training
        # Of several inputs Keras hands over a mask for each, `None` where there is none.
        if any(leaf is not None for leaf in keras.tree.flatten(mask)):
            arguments["mask"] = mask
        return self.network(inputs, **arguments)

    def summary(self, *args, **kwargs):
        """Shows the network's layers; arguments as `keras.Model.summary`."""
        self.network.summary(*args, **kwargs)

    def export(self, *args, **kwargs):
        """Exports the network alone, as `keras.Model.export` does: serving needs neither this package nor the optimizer."""
        return self.network.export(*args, **kwargs)

    def save(self, filepath, overwrite=True, zipped=None, **kwargs):
        """Saves the model and the state of training; arguments as `keras.Model.save`. A file is replaced only by a complete one."""
        with _saved_file(filepath, overwrite) as path:
            super().save(path, overwrite, zipped, **kwargs)

    def save_weights(self, filepath, overwrite=True, max_shard_size=None):
        """Saves the weights and the state of training; arguments as `keras.Model.save_weights`. A file is replaced only by a complete one."""
        with _saved_file(filepath, overwrite and max_shard_size is None) as path:
            super().save_weights(path, overwrite, max_shard_size)

    def load_weights(self, filepath, skip_mismatch=False, **kwargs):
        """Loads a file of `save_weights`; arguments as `keras.Model.load_weights`. A file that does not fit leaves every value unchanged.

        Raises:
            ValueError: If the weights in the file are not those of this model.
        """
        try:
            with guard.values_kept_on_error(self._values()):
                super().load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)
        except ValueError as error:
            shapes = [tuple(weight.shape) for weight in self.weights]
            raise ValueError(
                f"{filepath} does not hold the weights of this model, which stays as it was. The file must come from a model of the same layers; "
                f"this one has weights of the shapes {shapes or '(none yet: build it first, by calling it on some cases)'}. "
                f"Received from Keras: {error}"
            ) from error

    def get_config(self):
        """Returns the constructor's arguments as a dict."""
        return {"network": keras.saving.serialize_keras_object(self.network), "name": self.name}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Creates the model from the result of `get_config`."""
        network = keras.saving.deserialize_keras_object(config["network"], custom_objects)
        return cls(network, name=config["name"])

    # Training, the methods that a user calls.

    def compile(self, optimizer=None, loss=None, *args, **kwargs):
        """Configures training; arguments as `keras.Model.compile`.

        Args:
            optimizer: A `HessianFree`. Defaults to `HessianFree()`.
            loss: As in Keras. It should have a second derivative.
            *args: As in Keras.
            **kwargs: As in Keras.

        Raises:
            ValueError: If the optimizer is not a `HessianFree` or was built for other weights, if `jit_compile` is true, or if a trainable weight is
                not a real floating-point number.
        """
        optimizer = HessianFree() if optimizer is None else optimizer
        if not isinstance(optimizer, HessianFree):
            raise ValueError(
                f"`HFModel` trains with `keras_hf.HessianFree`. Received: optimizer={optimizer!r}. "
                "Compile `model.network` to train with another optimizer."
            )
        if optimizer.built:
            checks.weights_of_optimizer(keras_private.optimized_weights(optimizer), self.trainable_variables)
        for leaf in keras.tree.flatten(loss):
            name = compiled_model.loss_name(leaf)
            checks.loss_has_second_derivative(name)
            if isinstance(optimizer.curvature, GaussNewton):
                self._advice.loss_of_gauss_newton(name)
        if kwargs.get("jit_compile", "auto") not in ("auto", False):
            raise ValueError(
                "`HFModel` cannot train under XLA, whose shapes must not change: pieces of a batch differ in size. "
                f"Received: jit_compile={kwargs['jit_compile']!r}. Leave `jit_compile` out: the update is one `tf.function` already."
            )
        kwargs["jit_compile"] = False
        # A scaled loss would scale the damping; CG runs in float32 or float64 and needs no loss scaling.
        kwargs["auto_scale_loss"] = False
        # Keras finds the loss and metrics of an output in a dict by these names.
        self.output_names = getattr(self.network, "output_names", None)
        self._keep("_chosen_solver", None)
        super().compile(optimizer, loss, *args, **kwargs)
        self._hand_layers_to_optimizer()
        compile_loss = keras_private.compiled_loss(self)
        if compile_loss is not None:
            keras_private.set_losses(compile_loss, keras.tree.map_structure(compiled_model.checked, loss))
        if self.built and self.trainable_variables:
            checks.trainable_weights(self.trainable_variables)
            self._build_optimizer()

    def compile_from_config(self, config):
        """Compiles as the saved model was compiled, and creates the optimizer's variables, so that their values can be loaded."""
        self.compile(**keras.saving.deserialize_keras_object(config))

    def fit(
        self,
        x=None,
        y=None,
        batch_size=None,
        epochs=1,
        verbose="auto",
        callbacks=None,
        validation_split=0.0,
        validation_data=None,
        shuffle=True,
        class_weight=None,
        sample_weight=None,
        initial_epoch=0,
        steps_per_epoch=None,
        validation_steps=None,
        validation_batch_size=None,
        validation_freq=1,
    ):
        """Trains the network. Arguments are those of `keras.Model.fit`, except for these.

        - `batch_size`: number of cases per batch; for arrays, `None` means all of them, or as many as make `steps_per_epoch` batches. If one batch
          holds all cases, an epoch makes `steps_per_epoch` updates on it.
        - `shuffle`: a batch that holds all cases is permuted once, by the optimizer's seed, and not again in every epoch.
        - `validation_batch_size`: defaults to 32 if one batch holds all cases.
        - `callbacks`: include a `DampingCallback`, such as `LevenbergMarquardt()`. It is called before the others, so that they save the damping of
          the next update.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            ValueError: If the model is not compiled, if there are no cases, if arrays have different numbers of cases, or if `batch_size` is not a
                positive integer.
        """
        keras_private.require_compiled(self, "fit")
        if x is None:
            raise ValueError(
                "`fit` needs cases. Received: x=None. Hand over arrays, a `tf.data.Dataset`, a generator or a `PyDataset`."
            )
        found = keras.tree.flatten(getattr(callbacks, "callbacks", callbacks))
        if not any(isinstance(callback, DampingCallback) for callback in found):
            self._advice.no_damping_rule()
        if isinstance(callbacks, (list, tuple)):
            callbacks = sorted(callbacks, key=lambda callback: not isinstance(callback, DampingCallback))
        source = "dataset" if isinstance(x, tf.data.Dataset) else "batches"
        most_cases = None
        if arrays.is_arrays(x):
            source = "arrays"
            batch_size = checks.count("batch_size", batch_size, optional=True)
            num_cases = checks.num_cases(x, y, sample_weight)
            compiled_model.require_targets(self, y)
            if validation_split and validation_data is None:
                # As in Keras, the last cases are for validation.
                num_cases = checks.split(num_cases, validation_split)
            if batch_size is None:
                batch_size = max(1, math.ceil(num_cases / (steps_per_epoch or 1)))
            most_cases = min(batch_size, num_cases)
            if batch_size >= num_cases:
                validation_batch_size = validation_batch_size or 32
                source = None
                seed, shuffle = self.optimizer.seed if shuffle else None, False
                if validation_split and validation_data is None:
                    x, y, sample_weight, validation_data = arrays.split((x, y, sample_weight), num_cases)
                    validation_split = 0.0
                times, steps_per_epoch = steps_per_epoch or 1, steps_per_epoch or 1
                if self.distribute_strategy.num_replicas_in_sync == self.steps_per_execution == 1:
                    times = None
                else:
                    # Otherwise the last execution of an epoch would run into the next epoch.
                    steps_per_epoch = None
                # The growing part changes its length anyway.
                few = keras.tree.map_structure(lambda leaf: None if leaf is None else leaf[:1], (x, y, sample_weight))
                self._choose_solver(few, num_cases)
                is_of_any_length = self._growing_batch is not None
                x = arrays.repeated(x, y, sample_weight, seed, times, is_of_any_length)
                y = sample_weight = batch_size = None
        elif isinstance(x, tf.data.Dataset):
            shuffle = False  # Keras ignores True and warns about its own default.
        if source is not None:
            self._choose_solver(None, 0)
        self._advice.cases_come_as(source)
        with self._batches_of_at_most(most_cases):
            history = super().fit(
                x,
                y,
                batch_size,
                epochs=epochs,
                verbose=verbose,
                callbacks=callbacks,
                validation_split=validation_split,
                validation_data=validation_data,
                shuffle=shuffle,
                class_weight=class_weight,
                sample_weight=sample_weight,
                initial_epoch=initial_epoch,
                steps_per_epoch=steps_per_epoch,
                validation_steps=validation_steps,
                validation_batch_size=validation_batch_size,
                validation_freq=validation_freq,
            )
        if isinstance(self.network, PINN):
            self._advice.spurious_solution(history.history)
        return history

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
                with guard.unaltered_arithmetic(), guard.xla_explained(self.network.name, lambda: self._choice):
                    logs = dict(step(iterator))
                trace = logs.pop("trace", None)
                num_nonfinite = int(logs.pop("num_nonfinite_cases", 0))
                errors = [float(logs.pop(key, 0.0)) for key in ("product_error", "repeat_error")]
                guard.raise_if_wrong(self.network.name, self._choice, float(logs["loss"]), *errors)
            self._is_first_update.assign(False)
            self._keep("last_trace", trace)
            self._advise_after_update(logs, num_nonfinite)
            return logs

        with self.distribute_strategy.scope():
            self._keep("_is_first_update", tf.Variable(True, trainable=False))

        self.train_function = train_function

    def train_on_batch(self, x, y=None, sample_weight=None, class_weight=None, return_dict=False):
        """Performs one update on these cases; arguments as `keras.Model.train_on_batch`."""
        keras_private.require_compiled(self, "train_on_batch")
        if arrays.is_arrays(x):
            checks.equal_lengths(x, y, sample_weight)
        return super().train_on_batch(x, y, sample_weight, class_weight, return_dict)

    def train_step(self, data):
        """Performs one update; see the class. Keras calls it in replica context."""
        data = Data(*keras.utils.unpack_x_y_sample_weight(data))
        lengths_are_equal = checks.equal_lengths(data.x, data.y, data.sample_weight)
        unseen, update = None, self._update
        if self._growing_batch is not None:
            counts = of_each_replica(data.num_cases)
            update = functools.partial(update, num_cases=tf.reduce_sum(counts))
            selection = self._growing_batch.select(self.optimizer.state().growing_batch, counts, replica_number())
            with tf.control_dependencies(lengths_are_equal):
                data, unseen = data.take(selection.used), data.take(selection.unseen)
        logs = self._with_objective(data, update, self._most_cases, unseen)
        keras_private.track_loss(self, logs["loss"], logs["num_cases"])
        metrics = across_replicas(lambda replicas: self.get_metrics_result())
        return {**logs, **metrics}

    @contextlib.contextmanager
    def _batches_of_at_most(self, num_cases):
        """Context in which a batch has at most `num_cases`: an update traced in it may not need to support several pieces."""
        self._most_cases = num_cases
        try:
            yield
        finally:
            self._most_cases = None

    def check_products(self, x, y=None, sample_weight=None):
        """Checks the products `v -> Gv` on these cases and prints a report.

        It checks adjointness `u'(Jv) = (J'u)'v`, symmetry, linearity, non-negativity (of Gauss-Newton products), agreement with the other
        linearization where that is right, and whether two calls of the network agree. A failed check comes with its cure. Use it for a new kind of
        layer or loss, before a long run. Cost: about ten products.

        Args:
            x: Inputs, as in `fit`, arrays; a few hundred cases are enough.
            y: Targets, as in `fit`.
            sample_weight: Weights of the cases, as in `fit`.

        Returns:
            List of `ProductCheck`s: `name`, `error` (relative), `tolerance`, `holds`, `remark`.

        Raises:
            ValueError: If the model is not compiled, or if the products cannot be formed; the message names the layer and the cure.
        """
        data = self._cases("check_products", x, y, sample_weight)
        remarks = {
            "determinism": "draw random numbers from a `keras.random.SeedGenerator`; let nothing depend on how often `call` ran",
            "negativity": "the loss is not convex in what it is cut at: see `negative_curvature` in the logs",
            "adjointness": "TensorFlow has a wrong second derivative of an operation; see docs/support.md",
        }
        if not isinstance(self.optimizer.curvature, (GaussNewton, EmpiricalFisher)):
            remarks["adjointness"] = "this curvature is not made of J"
            remarks["negativity"] = "expected: a Hessian is indefinite away from a minimum"

        def errors(objective, structure):
            curvature = self._choice.curvature
            if curvature.linearization is None:
                remarks["other_way"] = "this curvature is made without one"
                return product_errors(objective, curvature, None), objective.rounding
            try:
                other = curvature.by(other_linearization(curvature.linearization).fitted_to(structure))
            except ValueError:
                remarks["other_way"] = "forward accumulation would be wrong for this network"
                other = None
            return product_errors(objective, curvature, other), objective.rounding

        @tf.function(autograph=False)
        def compute():
            return self.distribute_strategy.run(lambda: self._with_objective(data, errors))

        values = self._values() + [variable.value for variable in self.metrics_variables]
        explained = guard.xla_explained(self.network.name, lambda: self._choice)
        with guard.values_kept(values), guard.unaltered_arithmetic(), explained:
            found, rounding = tf.nest.map_structure(
                lambda value: float(self.distribute_strategy.experimental_local_results(value)[0]), compute()
            )
        report = judged(found, rounding, remarks)
        parts = [
            type(part).__name__ for part in (self.optimizer.curvature, self._choice.linearization) if part is not None
        ]
        print(f"Products for '{self.network.name}', {', '.join(parts)}:")
        for check in report:
            print(f"  {check}")
        return report

    def objective(self, x, y=None, sample_weight=None):
        """Returns the loss that `fit` minimises, on these cases, as functions of one flat vector of all trainable weights, for SciPy and the like.

        Args:
            x: Inputs, as in `fit`, arrays.
            y: Targets, as in `fit`.
            sample_weight: Weights of the cases, as in `fit`.

        Returns:
            A `LossFunction`: `weights`, `loss_at(w)`, `loss_and_gradient(w)`, `product(w, v)` and `assign(w)`; for squared losses also
            `residuals(w)` and `jacobian(w)`.

        Raises:
            ValueError: If the model is not compiled, if `x`, `y` and `sample_weight` are not arrays of the same number of cases, or if the loss needs
                targets and there are none.
        """
        data = self._cases("objective", x, y, sample_weight)

        @contextlib.contextmanager
        def guarded():
            with guard.unaltered_arithmetic(), guard.xla_explained(self.network.name, lambda: self._choice):
                yield

        variables = [variable.value for variable in self.trainable_variables]
        return LossFunction(data, variables, self._task, self.optimizer, self.distribute_strategy, guarded)

    def parameter_covariance(self, x, y, sample_weight=None, absolute_sigma=False):
        """Returns the covariance of the trained weights, as `scipy.optimize.curve_fit` does: `pcov` and the standard errors.

        For least squares ("mse"), at the minimum of the loss on these cases. With J the Jacobian of the outputs, W the sample weights, r the
        differences of outputs and targets, and M of them where the weight is not 0,

            matrix = (J'WJ)^-1 r'Wr / (M - n)

        the covariance of estimates from other noise of the same size, where the model is linear within a few standard errors. Weights that the data
        do not determine have an infinite covariance, with a warning. Use float64.

        Cost: the Jacobian, and `rows n^2` multiplications.

        Args:
            x: Inputs, as in `fit`, arrays.
            y: Targets, as in `fit`.
            sample_weight: Weights of the cases, proportional to `1 / sigma^2`, sigma being the standard deviation of a target.
            absolute_sigma: Whether sample weights are `1 / sigma^2`, and not only proportional to it: then `matrix = (J'WJ)^-1`.

        Returns:
            A `ParameterCovariance`: `matrix` and `standard_errors`.

        Raises:
            ValueError: As `LossFunction.residuals`; if a weight has a regularizer, if there are more than 5,000 trainable weights, or if
                `absolute_sigma` is not a bool or the loss does not tell sigma.

        Example:

        >>> x = np.linspace(-1, 1, 64)[:, None]
        >>> y = 2 * x + np.random.default_rng(0).normal(size=x.shape)
        >>> model = HFModel(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]))
        >>> model.compile(HessianFree(solver=DirectSolver()), loss="mse")
        >>> history = model.fit(x, y, epochs=9, callbacks=[LevenbergMarquardt()], verbose=0)
        >>> model.parameter_covariance(x, y).matrix.shape
        (2, 2)
        """
        absolute_sigma = checks.flag("absolute_sigma", absolute_sigma)
        f, variables = self.objective(x, y, sample_weight), self.trainable_variables
        w = f.weights
        covariance.require_few_weights(len(w))
        if regularized := [variable.path for variable in variables if variable.regularizer is not None]:
            raise ValueError(
                "`parameter_covariance` is that of least squares without regularizers, which bias the weights. "
                f"Received: regularizers of {', '.join(regularized)}. Leave them out."
            )
        residuals, jacobian = f.residuals(w), f.jacobian(w)
        is_empty = (residuals == 0) & ~jacobian.any(axis=1)
        num_residuals, variance = len(residuals), None
        if is_empty.any() or absolute_sigma:
            # Of outputs that exceed their targets by 1: what multiplies differences in the rows.
            targets = keras.tree.map_structure(lambda output: output - 1, self.predict(x, verbose=0))
            roots = self.objective(x, targets, sample_weight).residuals(w)
            num_residuals = np.count_nonzero(roots)
            if absolute_sigma:
                variance = covariance.residual_scale(roots, sample_weight)
        dtype = vector_dtype([variable.value for variable in variables]).as_numpy_dtype
        matrix = covariance.covariance(w, jacobian, residuals, variance, num_residuals, dtype)
        return covariance.ParameterCovariance(matrix, covariance.by_weight(np.diag(matrix), variables))

    def _cases(self, method, x, y, sample_weight):
        """Returns arrays as `Data` and builds the model; `method` is the name of the calling method, for errors."""
        keras_private.require_compiled(self, method)
        checks.num_cases(x, y, sample_weight)
        compiled_model.require_targets(self, y)
        return self._built_for(x, y, sample_weight)

    def _built_for(self, x, y, sample_weight):
        """Returns the `Data` of arrays, and makes the network's weights where they are not made yet."""
        to_tensor = lambda leaf: None if leaf is None else tf.convert_to_tensor(leaf)  # noqa: E731
        data = Data(*keras.tree.map_structure(to_tensor, (x, y, sample_weight)))
        self._maybe_symbolic_build(data_batch=tuple(data))
        return data

    def _values(self):
        """Returns the list of `tf.Variable`s of the weights and the optimizer."""
        # Keras creates the attribute in `compile`.
        optimizer = getattr(self, "optimizer", None)
        return [variable.value for variable in (*self.variables, *(optimizer.variables if optimizer else ()))]

    # What an update needs from Keras.

    # True only inside `_whole_loss`.
    _regularizers_apart = False

    @property
    def losses(self):
        """Losses added in `call`, by activity regularizers and by weight regularizers."""
        # An update adds them separately: they are not in the compiled loss of a piece.
        return [] if self._regularizers_apart else super().losses

    def _whole_loss(self, data, y_pred):
        """Returns the result of an overridden `compute_loss`, without the regularizers and the added losses."""
        with replaced((self, "_regularizers_apart", True)):
            return keras_private.call_compute_loss(self, data.x, data.y, y_pred, data.sample_weight)

    def _with_objective(self, data, function, most_cases=None, unseen=None):
        """Calls `function(objective, structure)` with the objective of the next update, once for all replicas.

        Args:
            data: `Data`, the cases of the objective.
            function: Callable; where there are unseen cases, their objective is its third argument.
            most_cases: Integer, an upper bound of the number of cases, where only that is known.
            unseen: `Data`, cases that the update does not use, or `None`.
        """
        optimizer = self.optimizer
        task, structure = self._task(data)
        chunk_size = optimizer.curvature_batch_size
        piece_size = optimizer.micro_batch_size or structure.default_piece_size(data, chunk_size)
        if "unknown" in structure.combinations:
            piece_size, chunk_size = None, None
        bounds = [bound for bound in (chunk_size, data.static_num_cases, most_cases) if bound is not None]
        # Unknown if the size of pieces depends on lengths at run time: products are then traced for several pieces.
        one_piece = piece_size is None or (not tf.is_tensor(piece_size) and bool(bounds) and piece_size >= min(bounds))
        structure = structure._replace(chunk_is_one_piece=one_piece)
        if one_piece and piece_size is not None and most_cases is not None and piece_size < (chunk_size or math.inf):
            # Another `fit` may use more cases.
            self._most_cases_traced = piece_size
        update_number = tf.cast(optimizer.iterations.value, tf.int32)
        share = None
        if chunk_size is not None:
            share = batching.share(chunk_size, of_each_replica(data.num_cases), replica_number())
        seed = tf.convert_to_tensor(optimizer.seed)
        pieces = batching.divide(data.num_cases, share, piece_size, update_number, seed)
        fixed = FixedNetwork(task, structure, update_number)
        cases = [LocalCases(fixed, data, pieces)]
        if unseen is not None:
            pieces = batching.divide(unseen.num_cases, None, piece_size, update_number, seed)
            cases.append(LocalCases(fixed, unseen, pieces))

        def across(replicas, cases, *others):
            objective = Objective(replicas, cases, fixed, chunk_is_batch=chunk_size is None)
            return function(objective, structure, *[Objective(replicas, o, fixed, True) for o in others])

        with second_derivatives_explained(structure.layer_of_op):
            return across_replicas(across, *cases)

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
            optimizer.curvature,
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

    def _task(self, data):
        """Returns the `Task` and its `Structure`, and keeps the `Choice` made by the trace."""
        task = compiled_model.task_of(self, self._whole_loss)
        optimizer, replicas = self.optimizer, self.distribute_strategy.num_replicas_in_sync
        curvature = optimizer.curvature
        structure, choice = compiled_model.trace(task, data, curvature, self.solver, replicas, self.network.name)
        self._keep("_choice", choice)
        if isinstance(curvature, GaussNewton) and structure.combinations and not structure.has_curvature:
            self._advice.no_curvature()
        if "unknown" in structure.combinations:
            self._advice.unknown_combination()
        return task, structure

    def _keep(self, name, value):
        """Sets an attribute without Keras' tracking, so that it is not saved."""
        object.__setattr__(self, name, value)

    def _update_logs(self, objective, result):
        floating = {
            "loss": result.loss,
            "damping": result.damping,
            "reduction_ratio": result.reduction_ratio,
            "step_size": result.step_size,
            "gradient_norm": result.gradient_norm,
            # For `train_function`, which removes them, as it removes the trace.
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

    def _apply(self, objective, structure, result):
        """Assigns weights and states; a rejected step leaves them bit-equal."""
        accepted = result.step_size > 0
        for variable, old, new in zip(
            self.trainable_variables, objective.start(), objective.candidate(result.step), strict=True
        ):
            variable.value.assign(tf.where(accepted, new, old))
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
        kept = {name: if_finite(getattr(after, name), getattr(before, name)) for name in ("solver", "curvature")}
        self.optimizer.assign_state(after._replace(statistics_cases=tf.where(accepted, next_cases, num_before), **kept))
        self.optimizer.iterations.value.assign_add(1)

    def _build_optimizer(self):
        with self.distribute_strategy.scope():
            self.optimizer.build(self.trainable_variables)

    def _hand_layers_to_optimizer(self):
        # Before each call that may build the optimizer: until it is built, it may be compiled into several models.
        self.optimizer.find_layers = lambda: keras_private.all_layers(self.network)

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

    # Advice to the user.

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

    def _advise_after_update(self, logs, num_nonfinite):
        optimizer, growing_batch = self.optimizer, self._growing_batch
        if not self.solver.uses_all_cases:
            self._advice.small_batch(logs, growing_batch.initial_size if growing_batch else None)
        if isinstance(optimizer.curvature, GaussNewton):
            # Errors add up in the sums of a product: negative curvature of 2.3 epsilons was measured with a convex loss under BatchNormalization.
            rounding = 10 * self._choice.epsilon * float(optimizer.curvature_scale.numpy())
            self._advice.negative_curvature(logs, rounding)
        self._advice.no_progress(logs, num_nonfinite, int(optimizer.iterations.numpy()), self.compute_dtype)


@contextlib.contextmanager
def _saved_file(filepath, overwrite):
    """Context that gives the path to save to: `filepath` itself if no file exists, or if Keras must ask before it overwrites one."""
    if not overwrite or not isinstance(filepath, (str, os.PathLike)) or not os.path.isfile(filepath):
        yield filepath
        return
    with files.replacing(filepath) as path:
        yield str(path)
