"""HFModel: the Keras room. Unpacks the batch, owns the weights, fills the logs."""

import warnings

import keras
import numpy as np
import tensorflow as tf

from keras_hf import batching
from keras_hf.cg import CGStop
from keras_hf.damping import DampingCallback
from keras_hf.denominator import denominator_of, recorded_ranks
from keras_hf.objective import Data, LocalObjective, Objective, Task
from keras_hf.optimizer import HessianFree
from keras_hf.replicas import across_replicas, replica_share
from keras_hf.structure import trace_structure
from keras_hf.update import hf_update

# Below this many cases an update's curvature is mostly noise.
_SMALL_BATCH = 256
_NO_CURVATURE = {
    "mean_absolute_error": "keras.losses.Huber() or LogCosh()",
    "mean_absolute_percentage_error": "keras.losses.MeanSquaredLogarithmicError()",
    "hinge": "keras.losses.SquaredHinge()",
    "categorical_hinge": "keras.losses.CategoricalCrossentropy()",
}


@keras.saving.register_keras_serializable("keras_hf")
class HFModel(keras.Model):
    """Trains a Keras model by Hessian-free optimization.

    One batch of `fit` is one update. `network` stays an ordinary Keras model whose weights this one shares; what `fit`, `evaluate`, `predict`,
    `compile` and callbacks mean is what they mean in Keras, with these exceptions, each because Keras' default would be a trap:

    - `fit` on arrays without `batch_size` takes all training cases as one batch; validation keeps batches of 32.
    - A batch of all cases has a fixed order, permuted once by the optimizer's seed (`shuffle=True`) or as given: curvature chunks stay the same.
    - `compile` without an optimizer means `HessianFree()`.

    Logs of an update, beside the loss (before the update, Keras' running mean) and the metrics (before the update):

    | key | meaning |
    | --- | --- |
    | `damping` | the damping that the update used |
    | `reduction_ratio` | actual over predicted reduction; minus infinity where the loss rose, NaN where the gradient is zero |
    | `cg_iterations` | CG iterations run |
    | `cg_step` | number of the chosen iterate |
    | `cg_stop` | why CG stopped: a `CGStop` |
    | `negative_curvature` | 1 if CG met negative curvature |
    | `step_size` | of the line search; 0 = the step was rejected and the weights are as before |
    | `gradient_norm` | norm of the gradient before the update |
    | `num_cases` | cases in the batch |

    A `train_step` or `compute_loss` that the network overrides is not called; override `HFModel.compute_loss` instead.

    Args:
        network: `keras.Model`: Sequential, functional or subclassed, built or not.
        name: Name of this model.

    Raises:
        TypeError: If `network` is no `keras.Model`.

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
        self._regularizers_apart = False
        self._warned = set()
        self._batch_may_be_small = True
        if network.built:
            self.built = True
        for method in ("train_step", "compute_loss"):
            if getattr(type(network), method) is not getattr(keras.Model, method):
                warnings.warn(
                    f"`HFModel` does not call the `{method}` that {type(network).__name__} overrides. Override `HFModel.compute_loss` instead.",
                    stacklevel=2,
                )

    # The network, as a Keras model sees it.

    def call(self, inputs, training=None, mask=None):
        """Calls the network."""
        arguments = {}
        if self.network._call_has_training_arg:
            arguments["training"] = training
        if mask is not None:
            arguments["mask"] = mask
        return self.network(inputs, **arguments)

    def summary(self, *args, **kwargs):
        """Shows the network's layers; arguments as `keras.Model.summary`."""
        self.network.summary(*args, **kwargs)

    def export(self, *args, **kwargs):
        """Exports the network alone, as `keras.Model.export` does: what is served needs neither this package nor the optimizer."""
        return self.network.export(*args, **kwargs)

    def get_config(self):
        """Returns the constructor's arguments as a dict."""
        return {"network": keras.saving.serialize_keras_object(self.network), "name": self.name}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        """Makes the model from what `get_config` returned."""
        network = keras.saving.deserialize_keras_object(config["network"], custom_objects)
        return cls(network, name=config["name"])

    # Training, as a Keras user calls it.

    def compile(self, optimizer=None, loss=None, *args, **kwargs):
        """Configures training; arguments as `keras.Model.compile`.

        Args:
            optimizer: A `HessianFree`. Defaults to `HessianFree()`.
            loss: As in Keras. It should have a second derivative.
            *args: As in Keras.
            **kwargs: As in Keras.

        Raises:
            ValueError: If the optimizer is no `HessianFree`, or if `jit_compile` is true.
        """
        optimizer = HessianFree() if optimizer is None else optimizer
        if not isinstance(optimizer, HessianFree):
            raise ValueError(
                f"`HFModel` trains with `keras_hf.HessianFree`. Received: optimizer={optimizer!r}. "
                "Compile `model.network` to train with another optimizer."
            )
        for leaf in keras.tree.flatten(loss):
            self._warn_without_curvature(leaf)
        if kwargs.get("jit_compile", "auto") not in ("auto", False):
            raise ValueError(
                "`HFModel` cannot train under XLA, whose shapes must not change: pieces of a batch differ in size. "
                f"Received: jit_compile={kwargs['jit_compile']!r}. Leave `jit_compile` out: the update is one `tf.function` already."
            )
        kwargs["jit_compile"] = False
        # A scaled loss would scale the damping; CG, in float32 or more, needs none.
        kwargs["auto_scale_loss"] = False
        super().compile(optimizer, loss, *args, **kwargs)
        if self.built and self.trainable_variables:
            self._build_optimizer()

    def compile_from_config(self, config):
        """Compiles as the model that was saved, and makes the optimizer's variables, so that their values can be loaded."""
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
        """Trains the network. Arguments mean what they mean in `keras.Model.fit`, but for these.

        - `batch_size`: cases of an update's gradient; for arrays, `None` means all of them.
        - `shuffle`: a batch that holds all cases is permuted once, by the optimizer's seed, and not anew in every epoch.
        - `validation_batch_size`: 32 where `None` and one batch holds all cases.
        - `callbacks`: among them belongs a `DampingCallback`, such as `LevenbergMarquardt()`.

        Returns:
            A `keras.callbacks.History`.
        """
        self._warn_without_damping_rule(callbacks)
        self._batch_may_be_small = True
        if _is_arrays(x):
            num_cases = len(next(leaf for leaf in keras.tree.flatten(x) if leaf is not None))
            if validation_split and validation_data is None:
                num_cases = int(
                    num_cases * (1 - validation_split)
                )  # as Keras splits: the last cases are for validation
            batch_size = num_cases if batch_size is None else batch_size
            if batch_size >= num_cases:
                validation_batch_size = validation_batch_size or 32
                self._batch_may_be_small = False
                if shuffle:
                    order = np.random.default_rng(self.optimizer.seed).permutation(num_cases)
                    x, y, sample_weight = _in_order((x, y, sample_weight), order)
                    shuffle = False
        elif isinstance(x, tf.data.Dataset):
            shuffle = False  # Keras ignores True, and warns of its own default.
        return super().fit(
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

    def make_train_function(self, force=False):
        """Makes `train_function` as Keras does; a step that raises leaves every value as it was before."""
        if self.train_function is not None and not force:
            return
        super().make_train_function(force)
        step = self.train_function

        def train_function(iterator):
            variables = [variable.value for variable in [*self.variables, *self.optimizer.variables]]
            before = [variable.read_value() for variable in variables]
            try:
                logs = step(iterator)
            except (StopIteration, tf.errors.OutOfRangeError):
                raise
            except BaseException:
                for variable, value in zip(variables, before, strict=True):
                    variable.assign(value)
                raise
            self._warn_about_small_batch(logs)
            return logs

        self.train_function = train_function

    def train_step(self, data):
        """Makes one update; see the class. Called by Keras, in replica context."""
        data = Data(*keras.utils.unpack_x_y_sample_weight(data))
        logs = self._with_objective(data, self._update)
        self._loss_tracker.update_state(logs["loss"], sample_weight=logs["num_cases"])
        metrics = across_replicas(lambda replicas: self.get_metrics_result())
        return {**logs, **metrics}

    # What an update needs of Keras.

    @property
    def losses(self):
        """Losses added in `call`, by activity regularizers and by weight regularizers."""
        # An update takes them apart: they have no part in the loss of a piece.
        return [] if self._regularizers_apart else super().losses

    def _with_objective(self, data, function):
        """Calls `function(objective, structure)` with the objective of the next update on these cases, once for all replicas."""
        optimizer = self.optimizer
        task, structure = self._task(data)
        chunk_size = optimizer.curvature_batch_size
        piece_size = optimizer.micro_batch_size or min(structure.default_piece_size, chunk_size or 2**30)
        if task.denominator.kind == "unknown":
            piece_size, chunk_size = None, None
        most_cases = chunk_size or data.static_num_cases
        one_piece = piece_size is None or (most_cases is not None and piece_size >= most_cases)
        structure = structure._replace(chunk_is_one_piece=one_piece)
        update_number = tf.cast(optimizer.iterations.value, tf.int32)
        share = None if chunk_size is None else replica_share(chunk_size)
        pieces = batching.divide(data.num_cases, share, piece_size, update_number, optimizer.seed)
        part = LocalObjective(task, structure, data, pieces, update_number)

        def across(replicas, parts):
            return function(Objective(replicas, parts, task, chunk_is_batch=chunk_size is None), structure)

        return across_replicas(across, part)

    def _update(self, objective, structure):
        """Computes one update, applies it and returns its logs."""
        optimizer = self.optimizer
        result = hf_update(
            objective,
            tf.convert_to_tensor(optimizer.damping.value),
            tf.convert_to_tensor(optimizer.warm_start.value),
            optimizer.curvature,
            optimizer.preconditioner,
            optimizer.stopping,
            optimizer.max_cg_iterations,
            optimizer.warm_start_decay,
        )
        logs = self._update_logs(objective, result)
        self._apply(objective, structure, result)
        return logs

    def _task(self, data):
        """Returns the `Task` and its `Structure`."""
        trainable = self.trainable_variables
        if not trainable:
            raise ValueError(
                "`HFModel` needs at least one trainable weight. Received: a network with none; set `layer.trainable = True`."
            )
        states = [generator.state for layer in self.network._flatten_layers() for generator in layer._seed_generators]
        seeds = {id(state) for state in states}
        task = Task(
            network=lambda x: self(x, training=True),
            loss=self._piece_loss if self._has_loss() else None,
            denominator=None,
            regularizers=[
                (variable.value, variable.regularizer) for variable in trainable if variable.regularizer is not None
            ],
            update_metrics=self._update_metrics,
            variables=[variable.value for variable in trainable],
            states=[variable for variable in self.non_trainable_variables if id(variable) not in seeds],
            seeds=states,
            layers=self.network._flatten_layers(),
        )
        flat_losses = [] if self._compile_loss is None else [entry.loss for entry in self._compile_loss._flat_losses]
        with recorded_ranks(flat_losses) as ranks:
            structure = trace_structure(task, data)
        self.optimizer.curvature.linearization.check(structure.op_types)
        denominator = denominator_of(self.loss, structure.is_masked, data.sample_weight is not None, ranks)
        if task.loss is not None and not structure.has_curvature:
            self._warn(
                "curvature",
                "The loss has no second derivative in the network's outputs: every product is zero and the update a scaled gradient step. "
                "Use a smooth loss.",
            )
        if denominator.kind == "unknown" and task.loss is not None:
            self._warn(
                "denominator",
                "The loss of a batch cannot be put together from parts of it (a custom scalar, a mask, or several weighted means): "
                "`micro_batch_size` and `curvature_batch_size` are not used. Return one value per case from the loss to use them.",
            )
        task = task._replace(denominator=denominator)
        replicas = self.distribute_strategy.num_replicas_in_sync
        if task.loss is not None and replicas > 1 and not denominator.is_sum:
            # Keras divides means, not sums, by the number of replicas.
            task = task._replace(loss=lambda *args: replicas * self._piece_loss(*args))
        return task, structure

    def _has_loss(self):
        return self._compile_loss is not None or type(self).compute_loss is not HFModel.compute_loss

    def _piece_loss(self, x, y, y_pred, sample_weight):
        """The compiled loss alone."""
        self._regularizers_apart = True
        try:
            loss = self._compute_loss(x=x, y=y, y_pred=y_pred, sample_weight=sample_weight, training=True)
        finally:
            self._regularizers_apart = False
        return loss

    def _update_metrics(self, data, y_pred):
        if self._compile_loss is not None and self._compile_loss.metrics:
            # The loss of each output, which Keras tracks in the call.
            self._compile_loss(data.y, y_pred, data.sample_weight)
        self.compute_metrics(data.x, data.y, y_pred, data.sample_weight)

    def _update_logs(self, objective, result):
        floating = {
            "loss": result.loss,
            "damping": self.optimizer.damping.value,
            "reduction_ratio": result.reduction_ratio,
            "step_size": result.step_size,
            "gradient_norm": result.gradient_norm,
        }
        whole = {
            "cg_iterations": result.num_iterations,
            "cg_step": result.chosen_iteration,
            "cg_stop": result.reason,
            "negative_curvature": result.reason == CGStop.NEGATIVE_CURVATURE,
            "num_cases": objective.totals.num_cases,
        }
        return {
            **{k: tf.convert_to_tensor(v) for k, v in floating.items()},
            **{k: tf.cast(v, tf.int32) for k, v in whole.items()},
        }

    def _apply(self, objective, structure, result):
        """Moves weights and states; a rejected step leaves them bit-equal."""
        accepted = result.step_size > 0
        step = tf.cast(result.step_size, objective.dtype) * result.step
        for variable, old, new in zip(
            self.trainable_variables, objective.start(), objective.candidate(step), strict=True
        ):
            variable.value.assign(tf.where(accepted, new, old))
        for state, new in zip(structure.states, result.states, strict=True):
            state.value.assign(tf.where(accepted, new, tf.convert_to_tensor(state.value)))
        self.optimizer.warm_start.value.assign(result.warm_start)
        self.optimizer.iterations.value.assign_add(1)

    def _build_optimizer(self):
        with self.distribute_strategy.scope():
            self.optimizer.build(self.trainable_variables)

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        # Keras builds from a first batch only under a strategy. Without it a first fit traces twice, and a network without an input shape has no
        # weights when the optimizer asks for them.
        if iterator is not None:
            data_batch = iterator._distributed_dataset.element_spec

        def spec(leaf):
            if leaf is None:
                return None
            leaf = getattr(leaf, "_value_specs", (leaf,))[0]
            return (
                leaf if isinstance(leaf, tf.TensorSpec) else tf.TensorSpec(np.shape(leaf), getattr(leaf, "dtype", None))
            )

        data_batch = keras.tree.map_structure(spec, data_batch)
        with self.distribute_strategy.scope():
            self._symbolic_build(data_batch=data_batch)

    # Warnings that the user can act on, each once.

    def _warn(self, key, message):
        if key not in self._warned:
            self._warned.add(key)
            warnings.warn(message, stacklevel=3)

    def _warn_without_damping_rule(self, callbacks):
        callbacks = getattr(callbacks, "callbacks", callbacks)
        if not any(isinstance(callback, DampingCallback) for callback in keras.tree.flatten(callbacks)):
            self._warn(
                "damping",
                "`fit` without a damping callback keeps the damping constant. Add `callbacks=[keras_hf.LevenbergMarquardt()]`, or "
                "`keras_hf.ConstantDamping()` if that is what you want.",
            )

    def _warn_without_curvature(self, loss):
        name = getattr(loss, "name", None) or getattr(loss, "__name__", None) or loss
        if isinstance(name, str):
            name = getattr(keras.losses.get(name), "__name__", name) if isinstance(loss, str) else name
        if name in _NO_CURVATURE:
            self._warn(
                f"curvature of {name}",
                f"The loss '{name}' has no curvature: its second derivative is zero, and the update a scaled gradient step. "
                f"Its smooth cousin is {_NO_CURVATURE[name]}.",
            )

    def _warn_about_small_batch(self, logs):
        if self._batch_may_be_small:
            self._batch_may_be_small = False
            num_cases = int(logs["num_cases"])
            if num_cases < _SMALL_BATCH:
                self._warn(
                    "small batch",
                    f"An update on {num_cases} cases fits their noise: Hessian-free optimization wants batches of hundreds to thousands. Raise "
                    "`batch_size`, or leave it out to take all cases.",
                )


def _is_arrays(x):
    """Whether `fit` was given arrays, and not a dataset or a generator."""
    if x is None or isinstance(x, (tf.data.Dataset, tf.distribute.DistributedDataset, keras.utils.PyDataset)):
        return False
    leaves = [leaf for leaf in keras.tree.flatten(x) if leaf is not None]
    return bool(leaves) and all(hasattr(leaf, "shape") and hasattr(leaf, "__len__") for leaf in leaves)


def _in_order(arrays, order):
    """Takes the first `len(order)` cases of each array in that order, the rest (Keras' validation split) after them as they are."""

    def permute(array):
        if array is None:
            return None
        places = np.concatenate([order, np.arange(len(order), len(array))])
        if hasattr(array, "iloc"):  # pandas
            return array.iloc[places]
        return tf.gather(array, places) if isinstance(array, tf.Tensor) else np.asarray(array)[places]

    return keras.tree.map_structure(permute, arrays)
