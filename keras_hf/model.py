"""HFModel: what a user calls to compile, train, save and examine a network."""

import contextlib
import functools
import math
import os
import warnings

import keras
import numpy as np
import tensorflow as tf

from keras_hf.callbacks.backup import complete_backups
from keras_hf.callbacks.evidence import EvidenceRegularization
from keras_hf.callbacks.order import in_order
from keras_hf.common import checks, files, keras_private
from keras_hf.common.cluster import is_chief
from keras_hf.common.replaced import replaced
from keras_hf.differentiation.curvature import GaussNewton
from keras_hf.loss_function import LossFunction
from keras_hf.network.fixed_network import Data
from keras_hf.optimizer import HessianFree
from keras_hf.pinn import PINN
from keras_hf.posterior import covariance
from keras_hf.posterior.laplace import laplace
from keras_hf.posterior.likelihood import likelihood_of
from keras_hf.problem.replicas import across_replicas
from keras_hf.solvers.direct import DirectSolver
from keras_hf.solvers.momentum import PreconditionedMomentum
from keras_hf.training import compiled_model, guard, step, workers
from keras_hf.training.advice import Advice
from keras_hf.training.fit_data import FitData, is_arrays, strings_as_tensors, weights_of_classes
from keras_hf.training.product_check import checked_products, report
from keras_hf.training.setup import prepare, traced_structure
from keras_hf.training.solver_choice import exact_solver_pays, has_positions, momentum_pays
from keras_hf.training.train_function import TrainFunction

# What a user has who watches the validation loss.
_KEEP_WEIGHTS = keras.callbacks.EarlyStopping, keras.callbacks.ModelCheckpoint


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
    - `compile` without an optimizer uses `HessianFree()`, and `fit` without a damping rule `LevenbergMarquardt()`.
    - The moving statistics of BatchNormalization are those of the cases used, at the weights after the update, instead of averages over updates.

    Logs of an update, in addition to the loss and the metrics, which are of the weights before the update and, as in Keras, means over the epoch so
    far; the progress bar shows some of them, see `fit`. The logs of an epoch hold those of its last update:

    | key | meaning |
    | --- | --- |
    | `update_loss` | the loss of the update's cases before it |
    | `damping` | the damping that the update used |
    | `reduction_ratio` | actual over predicted reduction; minus infinity if the loss rose, NaN if nothing could be measured |
    | `step_size` | the step relative to the solver's candidate; 0 = the step was rejected and the weights are unchanged |
    | `gradient_norm` | norm of the gradient before the update |
    | `num_cases` | number of cases that the update used: those of the batch, or of its growing part |
    | `converged` | 1 if no step lowers the loss by more than rounding: the solver pauses until gradient or damping change |
    | `optimism` | of several batches: the share of the loss that steps gain on their own batch and not on the next; see `DampingCallback` |

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

    and those of `PreconditionedMomentum`:

    | key | meaning |
    | --- | --- |
    | `alpha`, `mu` | coefficients of the preconditioned direction and of the previous step |
    | `negative_curvature` | 1 if a direction has negative curvature |

    A `train_step` or `compute_loss` that the network overrides is not called; override `HFModel.compute_loss` instead.

    Before the first update of a compiled model its loss is computed once more, and a product is compared with its transpose. If they differ by more
    than rounding (a network that is a different function in every call, a second derivative that is wrong in TensorFlow), there is an error, and
    every value stays as it was. Weights with constraints are projected before the first update if they violate them, and in every step that is tried.

    `solver` is the solver in use: the optimizer's, or the one that was chosen for network and data. `last_trace` records how the last update found
    its step, a dict of tensors; `UpdateRecorder` writes it to a file. `save` and `save_weights` keep the file that they replace until the new one is
    complete.

    Args:
        network: `keras.Model`: Sequential, functional or subclassed, built or not.
        name: Name of this model.

    Raises:
        TypeError: If `network` is not a `keras.Model`.
        ValueError: If `network` has no `call`.

    Example:

    >>> network = keras.Sequential([keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])
    >>> model = HFModel(network)
    >>> model.compile(loss="mse")
    >>> x = np.linspace(-1, 1, 64)[:, None]
    >>> history = model.fit(x, np.sin(3 * x), epochs=5, verbose=0)
    """

    # Whether `losses` has what is added in `call` and by regularizers.
    adds_losses = True

    def __init__(self, network, name=None, **kwargs):
        if not isinstance(network, keras.Model) or isinstance(network, HFModel):
            raise TypeError(
                f"`network` must be a `keras.Model`, such as `keras.Sequential([...])`. Received: network={network!r} "
                f"of type {type(network).__name__}."
            )
        if type(network).call is keras.Model.call:
            raise ValueError(
                f"`network` must have a `call`, whose outputs are what its loss needs. Received: {type(network).__name__} without one. Give it a "
                "`call`, and if no Keras loss suits its outputs, override `HFModel.compute_loss`."
            )
        super().__init__(name=name, **kwargs)
        self.network = network
        self._advice, self._setup = Advice(), None
        self.last_trace = None
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
        return self.network.export(*args, **kwargs) if is_chief(self.distribute_strategy) else None

    def save(self, filepath, overwrite=True, zipped=None, **kwargs):
        """Saves the model and the state of training; arguments as `keras.Model.save`. A file is replaced only by a complete one.

        Of several workers the chief alone writes.
        """
        if is_chief(self.distribute_strategy):
            with _saved_file(filepath, overwrite and zipped is not False) as path:
                super().save(path, overwrite, zipped, **kwargs)

    def save_weights(self, filepath, overwrite=True, max_shard_size=None):
        """Saves the weights and the state of training; arguments as `keras.Model.save_weights`. A file is replaced only by a complete one.

        Of several workers the chief alone writes.
        """
        if is_chief(self.distribute_strategy):
            with _saved_file(filepath, overwrite and max_shard_size is None) as path:
                super().save_weights(path, overwrite, max_shard_size)

    def load_weights(self, filepath, skip_mismatch=False, **kwargs):
        """Loads a file of `save_weights`; arguments as `keras.Model.load_weights`. A file that does not fit leaves every value unchanged.

        Raises:
            ValueError: If the weights in the file are not those of this model.
        """
        try:
            with guard.values_kept_on_error(self.values()):
                super().load_weights(filepath, skip_mismatch=skip_mismatch, **kwargs)
        except ValueError as error:
            shapes = [tuple(weight.shape) for weight in self.weights]
            raise ValueError(
                f"{filepath} does not hold the weights of this model, which stays as it was. The file must come from a model of the same layers; "
                f"this one has weights of the shapes {shapes or '(none yet: build it first, by calling it on some cases)'}. "
                "A file of the network alone is loaded by `model.network.load_weights(...)`. "
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
                "`HFModel` cannot train under XLA, whose shapes must not change: micro-batches of a batch differ in size. "
                f"Received: jit_compile={kwargs['jit_compile']!r}. Leave `jit_compile` out: the update is one `tf.function` already."
            )
        kwargs["jit_compile"] = False
        # A scaled loss would scale the damping; CG runs in float32 or float64 and needs no loss scaling.
        kwargs["auto_scale_loss"] = False
        # Keras finds the loss and metrics of an output in a dict by these names.
        self.output_names = getattr(self.network, "output_names", None)
        self._keep_setup(None)
        optimizer.solve_by(None)
        super().compile(optimizer, loss, *args, **kwargs)
        compile_loss = keras_private.compiled_loss(self)
        if compile_loss is not None:
            keras_private.set_losses(compile_loss, keras.tree.map_structure(compiled_model.checked, loss))
        if self.built and self.trainable_variables:
            checks.trainable_weights(self.trainable_variables)
            workers.require_same_job(self.distribute_strategy, self._job)
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

        - `batch_size`: number of cases per batch. Arrays make batches whose sizes differ by at most one case, as many as Keras would make: a smaller
          last one would get the damping of the others. `None` means all of them, or `steps_per_epoch` batches. If one batch holds all cases, an epoch
          makes `steps_per_epoch` updates on it.
        - `shuffle`: the order of cases is drawn from the optimizer's seed and the number of updates, so that a resumed run and all workers have the
          same batches. A batch that holds all cases is permuted once, and not again in every epoch. With False its order is that given; where
          updates use a growing part, its cases are taken from all over the batch.
        - `validation_batch_size`: defaults to 32 if one batch holds all cases.
        - `callbacks`: without a `DampingCallback` among them, `LevenbergMarquardt()` adapts the damping; `ConstantDamping()` keeps it constant. The
          rule is called before the others, so that they save the damping of the next update. A `CallbackList` is used as it is: without a rule in
          it the damping stays.
        - `verbose`: "auto", 1 and 2 show loss, metrics and the numbers by which one steers: `damping`, `reduction_ratio`, `cg_iterations` (or
          `arc_step`, or `mu`). After the ratio stands "(rejected)" where the update changed no weight, "(converged)" where none can, or the step
          size where the step was shortened. Before the first update, which is traced, a line says so, and which solver was taken and why. 3 shows
          all numbers of an update. With several batches in an epoch, loss and metrics are means over it, the others those of the last one. A
          `ProgbarLogger` among the callbacks, or a `CallbackList`, is left as it is.

        Returns:
            A `keras.callbacks.History`.

        Raises:
            ValueError: If the model is not compiled, if there are no cases, if arrays have different numbers of cases, if `batch_size` is not a
                positive integer, or if `steps_per_execution` is more than 1 on several workers.
        """
        keras_private.require_compiled(self, "fit")
        strategy, optimizer = self.distribute_strategy, self.optimizer
        data = FitData(
            x,
            y,
            sample_weight,
            class_weight,
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            shuffle=shuffle,
            validation_data=validation_data,
            validation_split=validation_split,
            validation_batch_size=validation_batch_size,
        )
        workers.require_single_steps(strategy, self.steps_per_execution)
        batches = data.num_cases, batch_size, steps_per_epoch, initial_epoch, epochs
        workers.require_same_job(
            strategy, lambda: {**self._job(), "data": workers.describe((x, y, sample_weight)), "batches": batches}
        )
        if data.num_cases is not None:
            compiled_model.require_targets(self, y)
        verbose = workers.verbose_of(strategy, verbose)
        callbacks, found = in_order(callbacks, verbose, optimizer.finds_decay, is_chief(strategy))
        if any(isinstance(callback, EvidenceRegularization) for callback in found) and not optimizer.finds_decay:
            with strategy.scope():
                optimizer.find_decay()
            self._keep_setup(None)
            self.train_function = None
        self._prepare_for(data)
        self._advice.cases_come_as(data.source)
        setup = self._setup
        grows = setup is not None and setup.growing_batch is not None
        takes_any_number = setup is not None and setup.takes_any_number
        num_replicas = strategy.num_replicas_in_sync
        has_single_steps = self.steps_per_execution == 1
        arguments = data.for_keras(
            optimizer.seed,
            optimizer.iterations,
            grows,
            takes_any_number or num_replicas > 1,
            num_replicas,
            has_single_steps,
        )
        self.make_train_function()
        with complete_backups(found, self, is_chief(strategy)):
            history = super().fit(
                **arguments,
                epochs=epochs,
                # Keras knows no 3.
                verbose=1 if verbose == 3 else verbose,
                callbacks=callbacks,
                initial_epoch=initial_epoch,
                validation_steps=validation_steps,
                validation_freq=validation_freq,
            )
        # The history alone does not tell which epochs its validation losses are of.
        history.params = {**(history.params or {}), "validation_freq": validation_freq}
        if isinstance(self.network, PINN):
            self._advice.spurious_solution(history.history)
        elif not any(isinstance(callback, _KEEP_WEIGHTS) for callback in found):
            self._advice.validation_rose(history.history)
        return history

    def evaluate(self, x=None, y=None, batch_size=None, verbose="auto", *args, **kwargs):
        """Computes loss and metrics; arguments as `keras.Model.evaluate`. Of several workers the chief alone shows the progress bar."""
        verbose = workers.verbose_of(self.distribute_strategy, verbose)
        return super().evaluate(strings_as_tensors(x), y, batch_size, verbose, *args, **kwargs)

    def predict(self, x, batch_size=None, verbose="auto", *args, **kwargs):
        """Computes predictions; arguments as `keras.Model.predict`. Of several workers the chief alone shows the progress bar."""
        verbose = workers.verbose_of(self.distribute_strategy, verbose)
        return super().predict(strings_as_tensors(x), batch_size, verbose, *args, **kwargs)

    def train_on_batch(self, x, y=None, sample_weight=None, class_weight=None, return_dict=False):
        """Performs one update on these cases; arguments as `keras.Model.train_on_batch`.

        Before the first update, the solver is chosen as `fit` chooses it for these cases as one batch.

        Returns:
            As in Keras: the loss, a scalar, or a list of it and the metrics. With `return_dict`, all logs of the update, a dict.
        """
        keras_private.require_compiled(self, "train_on_batch")
        if is_arrays(x):
            checks.equal_lengths(x, y, sample_weight)
        if class_weight is not None:
            sample_weight = weights_of_classes(class_weight, y, sample_weight)
        if is_arrays(x) and self._setup is None:
            data = FitData(
                x,
                y,
                sample_weight,
                **dict.fromkeys(("batch_size", "steps_per_epoch", "validation_data", "validation_split")),
            )
            self._choose_solver_for(data)
        self._expect()
        logs = super().train_on_batch(x, y, sample_weight, return_dict=True)
        if return_dict:
            return logs
        return keras_private.as_keras_returns(self, {name: logs[name] for name in self.get_metrics_result()})

    def check_products(self, x, y=None, sample_weight=None):
        """Checks the products `v -> Gv` on these cases and prints a report.

        It checks adjointness `u'(Jv) = (J'u)'v`, symmetry, linearity, non-negativity (of Gauss-Newton products), agreement with the other
        linearization where that is right, whether two calls of the network agree, and whether the gradient is that of the loss. A failed check comes
        with its cure. Use it for a new kind of layer or loss, before a long run. Cost: about eleven products.

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
        values = self.values() + [variable.value for variable in self.metrics_variables]
        with guard.values_kept(values), guard.unaltered_arithmetic():
            compared, checks_made = checked_products(
                self.setup_for(data), self.optimizer, data, self.distribute_strategy
            )
        print(report(self.network.name, compared.curvature, checks_made))
        return checks_made

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

        return LossFunction(self, data)

    def parameter_covariance(self, x, y=None, sample_weight=None, absolute_sigma=False):
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

        >>> keras.config.set_floatx("float64")
        >>> keras.config.set_dtype_policy("float64")
        >>> x = np.linspace(-1, 1, 64)[:, None]
        >>> y = 2 * x + np.random.default_rng(0).normal(size=x.shape)
        >>> model = HFModel(keras.Sequential([keras.Input((1,)), keras.layers.Dense(1)]))
        >>> model.compile(HessianFree(solver=DirectSolver()), loss="mse")
        >>> history = model.fit(x, y, epochs=5, verbose=0)
        >>> model.parameter_covariance(x, y).matrix.shape
        (2, 2)
        """
        data = self._cases("parameter_covariance", x, y, sample_weight)
        absolute_sigma = checks.flag("absolute_sigma", absolute_sigma)
        return covariance.parameter_covariance(self, LossFunction(self, data), data, absolute_sigma)

    def laplace(self, x, y=None, sample_weight=None, structure="auto", noise=None, prior_precision=None):
        """Returns the distribution of the weights that the data leave open, for predictions with error bars: Laplace's approximation.

        At trained weights, in evaluation mode. The loss is read as a likelihood: squares as normal noise of the variance `noise^2 / sample_weight`,
        cross-entropies as the probabilities of classes. Regularizers L2 are read as the prior. How good it is, and when not to believe it:
        docs/error-bars.md.

        Cost: with n weights, a gradient for each case and output, and (full) about n^3 multiplications; with evidence the eigenvalues of the
        curvature, 10 n^3. Memory: three matrices (n, n). Where there are fewer outputs than weights, their number takes the place of n in both.

        Args:
            x: Inputs, as in `fit`, arrays.
            y: Targets, as in `fit`.
            sample_weight: Weights of the cases, inverse variances of the noise relative to `noise^2`.
            structure: String. "full", the whole matrix, up to 5,000 weights; "kronecker", one Kronecker product a layer (Dense, convolutions and
                others, see `KroneckerFactored`; the weights of other layers count as known); "last_layer", the whole matrix of the last layer with
                weights, the others count as known. "auto" takes the first that there is, in this order, and says which at INFO.
            noise: Float > 0, the standard deviation of a target of unit weight, for squared losses; `None` = found from the residuals, by their sum
                of squares over their number less the number of weights that the data determine.
            prior_precision: Float > 0, the inverse variance of every weight before the data; "evidence" = that which makes the data most probable,
                the weights where they are; `None` = that of the regularizers, or without any by evidence.

        Returns:
            A `Laplace`: `predict(x)`, `sample(n)`, `covariance`, `log_evidence`, `num_effective`, `noise`, `prior_precision`, `save`.

        Raises:
            ValueError: If the model is not compiled or its network not built, if the loss is not MeanSquaredError or a cross-entropy of one output,
                if there is BatchNormalization, if a setting is out of its range or the matrix too large, or if a regularizer other than L2 is to be
                the prior, or data and prior do not determine every weight.

        Example:

        >>> x = np.linspace(-1, 1, 64)[:, None]
        >>> y = np.sin(3 * x) + np.random.default_rng(0).normal(scale=0.1, size=x.shape)
        >>> model = HFModel(keras.Sequential([keras.Input((1,)), keras.layers.Dense(10, "tanh"), keras.layers.Dense(1)]))
        >>> model.compile(loss="mse")
        >>> history = model.fit(x, y, epochs=20, verbose=0)
        >>> mean, std, observation_std, _ = model.laplace(x, y).predict(np.linspace(-2, 2, 5)[:, None])
        >>> bool(std[0, 0] > std[2, 0])  # away from the data, and among them
        True
        """
        keras_private.require_compiled(self, "laplace")
        if not self.network.built:
            raise ValueError(
                "`laplace` is the distribution around trained weights. Received: a network that is not built. Call `fit` first."
            )
        likelihood = likelihood_of(self, "laplace")
        data = self._cases("laplace", x, y, sample_weight)
        return laplace(self, data, likelihood, structure, noise, prior_precision)

    # What Keras calls.

    def make_train_function(self, force=False):
        """Creates `train_function`, a `TrainFunction`."""
        self._check_optimized_weights()
        if self.train_function is None or force:
            self.train_function = TrainFunction(self)

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
        report = step.step(self.setup_for(data), self.optimizer, data)
        keras_private.track_loss(self, report.logs["update_loss"], report.logs["num_cases"])
        # A metric may have the name of one of the update's entries, by which a damping rule goes.
        return {**across_replicas(lambda replicas: self.get_metrics_result()), **report.logs}

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

        x, y, weight = keras.utils.unpack_x_y_sample_weight(keras.tree.map_structure(spec, data_batch))
        checks.batch_has_cases(x)
        # Weights of any number of cases: those that do not fit are refused later, by name.
        weight = keras.tree.map_structure(
            lambda spec: spec and tf.TensorSpec([None, *spec.shape[1:]], spec.dtype), weight
        )
        data_batch = x, y, weight
        # Keras would build the optimizer, too, from weights alone.
        with self.distribute_strategy.scope(), replaced((self, "optimizer", None)):
            keras_private.symbolic_build(self, data_batch)
        self._build_optimizer()

    def _build_optimizer(self):
        """Creates the optimizer's state, for the solver that suits the network."""
        if not self.optimizer.built:
            solver = PreconditionedMomentum(starts_small=has_positions(self)) if momentum_pays(self) else None
            with self.distribute_strategy.scope():
                self.optimizer.build(self.trainable_variables, keras_private.all_layers(self.network), solver)

    @property
    def losses(self):
        """Losses added in `call`, by activity regularizers and by weight regularizers."""
        # An update adds them separately: they are not in the compiled loss of a micro-batch.
        return super().losses if self.adds_losses else []

    # What is prepared before the first update.

    @property
    def solver(self):
        """The solver in use: the optimizer's."""
        return self.optimizer.solver

    @property
    def setup(self):
        """The `setup.Setup` of the last cases; `None` before the first."""
        return self._setup

    def setup_for(self, data):
        """Returns the `setup.Setup` for the types and shapes of a `Data`: the present one, or one that is made now, and kept."""
        setup = self._setup
        if setup is None:
            self._keep_setup(prepare(self, data))
        elif not setup.is_for(self.optimizer, data):
            self._keep_setup(prepare(self, data, setup.most_cases, has_other_cases=setup.has_other_cases))
        return self._setup

    def _keep_setup(self, setup):
        # Not by Keras' assignment, which would save it.
        object.__setattr__(self, "_setup", setup)
        if setup is None:
            return
        structure, solver = setup.structure, setup.solver
        if isinstance(setup.curvature, GaussNewton) and structure.combinations and not structure.has_curvature:
            self._advice.no_curvature()
        optimizer = self.optimizer
        is_asked_for = optimizer.micro_batch_size is not None or optimizer.curvature_batch_size is not None
        # An overridden `compute_loss` is one number on purpose.
        if "unknown" in structure.combinations and (is_asked_for or not compiled_model.overrides_compute_loss(self)):
            self._advice.unknown_combination()
        # Not of recurrent networks, which have loops: what they gain by exact steps, they gain in float32, too.
        if solver.uses_all_cases and not structure.nesting_ops and not optimizer.chooses_solver:
            dtypes = {weight.dtype for weight in setup.task.weights}
            self._advice.float_types_of_exact_solver(dtypes | {keras.config.floatx()})

    def _expect(self, most_cases=None, has_other_cases=True):
        """Forgets what is traced for fewer cases than may come, at most `most_cases`, or for batches of the same cases where they differ."""
        setup = self._setup
        if setup is None:
            return
        if not setup.serves(most_cases):
            self._keep_setup(None)
            self.train_function = None
        elif has_other_cases > setup.has_other_cases or self.train_function is None:
            # The other way round a trace serves: the same cases gain what they gained.
            self._keep_setup(setup._replace(has_other_cases=has_other_cases))
            self.train_function = None

    def _prepare_for(self, fit_data):
        """Chooses the solver for a `FitData`, and prepares for it if the number of cases is known."""
        few, trace = self._choose_solver_for(fit_data)
        has_other_cases = not fit_data.is_one_batch
        self._expect(fit_data.most_cases, has_other_cases)
        if few is not None and self._setup is None:
            self._keep_setup(prepare(self, few, fit_data.most_cases, trace(), has_other_cases))

    def _choose_solver_for(self, fit_data):
        """Chooses the solver for a `FitData`; returns the types of its cases, or `None`, and a function that traces the network for them."""
        few = None if fit_data.num_cases is None else fit_data.specs()
        if few is not None:
            compiled_model.require_numbers(self, few)
            self._maybe_symbolic_build(data_batch=tuple(few))
        trace = functools.cache(lambda: traced_structure(compiled_model.task_of(self), few))
        if few is not None and self._setup is not None and self._setup.is_for(self.optimizer, few):
            trace = lambda structure=self._setup.structure: structure  # noqa: E731
        self.choose_solver(few if fit_data.is_one_batch else None, fit_data.num_cases, trace)
        return few, trace

    def choose_solver(self, few, num_cases, trace=None):
        """Takes the exact solver, or goes back from it, where the optimizer leaves that open.

        Args:
            few: `Data` of a few cases, if all of them come as one batch; else `None`.
            num_cases: Integer, the number of all cases.
            trace: See `solver_choice.exact_solver_pays`.
        """
        optimizer = self.optimizer
        if not optimizer.chooses_solver:
            return
        pays = few is not None and self.distribute_strategy.num_replicas_in_sync == 1
        pays = pays and exact_solver_pays(self, few, num_cases, trace)
        if pays != isinstance(self.solver, DirectSolver):
            optimizer.solve_by(DirectSolver() if pays else None)
            self._keep_setup(None)
            self.train_function = None

    def _cases(self, method, x, y, sample_weight):
        """Returns arrays as `Data` and builds the model; `method` is the name of the calling method, for errors."""
        keras_private.require_compiled(self, method)
        checks.no_batches(method, x)
        checks.num_cases(x, y, sample_weight)
        compiled_model.require_targets(self, y)
        data = Data(x, y, sample_weight).tensors()
        self._maybe_symbolic_build(data_batch=tuple(data))
        checks.weights_as_compiled(method, self._changed_weights())
        return data

    # Values and advice.

    def values(self):
        """Returns the list of `tf.Variable`s of the weights and the optimizer."""
        # Keras creates the attribute in `compile`.
        optimizer = getattr(self, "optimizer", None)
        return [variable.value for variable in (*self.variables, *(optimizer.variables if optimizer else ()))]

    def _job(self):
        """What all of several workers must have alike before data come: a dict; see `workers.require_same_job`."""
        return {
            "weights": [(tuple(weight.shape), weight.dtype) for weight in self.trainable_variables],
            # Drawn on each; the chief's is taken.
            "optimizer": {**self.optimizer.get_config(), "seed": None},
            "loss": keras.tree.map_structure(workers.name_of, self.loss),
        }

    def _check_optimized_weights(self):
        """Warns if the trainable weights have changed since `compile`, which fixes them, as in Keras; raises if they are another model's."""
        if self.optimizer.built:
            optimized = keras_private.optimized_weights(self.optimizer)
            own = {id(weight) for weight in self.weights}
            if not all(id(weight) in own for weight in optimized):
                checks.weights_of_optimizer(optimized, self.trainable_variables)
            self._advice.changed_weights(self._changed_weights())

    def _changed_weights(self):
        """Returns the paths of weights that are trainable now but were not at `compile`, or were and are not now."""
        if not self.optimizer.built:
            return []
        optimized = keras_private.optimized_weights(self.optimizer)
        known, now = ({id(v): v.path for v in weights} for weights in (optimized, self.trainable_variables))
        return [path for key, path in {**known, **now}.items() if (key in known) != (key in now)]

    def after_update(self, report, num_nonfinite):
        """Keeps how the step of a `StepReport` was found, and warns of what a user can change; `num_nonfinite` counts cases with such numbers."""
        self.last_trace = report.trace
        optimizer, solver, logs = self.optimizer, self.solver, report.logs
        growing_batch, advice = self._setup.growing_batch, self._advice
        if not solver.uses_all_cases:
            advice.small_batch(logs, growing_batch.initial_size if growing_batch else math.inf)
        if "optimism" in logs:
            advice.noise_is_fitted(float(logs["optimism"]))
        if solver.tells_convexity and isinstance(optimizer.curvature, GaussNewton):
            # Errors add up in the sums of a product: negative curvature of 2.3 epsilons was measured with a convex loss under BatchNormalization.
            rounding = 10 * self._setup.structure.epsilon * float(optimizer.curvature_scale.numpy())
            advice.negative_curvature(logs, rounding)
        advice.no_progress(logs, num_nonfinite, int(optimizer.iterations.numpy()), self.compute_dtype)


@contextlib.contextmanager
def _saved_file(filepath, overwrite):
    """Context that gives the path to save to: one beside `filepath`, or that itself where Keras must ask first or writes no file here."""
    path = os.fspath(filepath) if isinstance(filepath, (str, os.PathLike)) else ""
    if not overwrite or not path.endswith((".keras", ".h5", ".hdf5")) or "://" in path or os.path.isdir(path):
        yield filepath
        return
    with files.replacing(path) as new:
        yield str(new)
