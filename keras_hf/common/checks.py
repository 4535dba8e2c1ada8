"""Checks of user input. Errors state the rule, what was received, and the cure. This room imports nothing from the package."""

import math
import numbers

import keras
import tensorflow as tf


def finite(name, value, minimum=None, maximum=None):
    """Returns `value` as a float, or raises if it is not a finite number in [minimum, maximum]."""
    bounds = ""
    if minimum is not None and maximum is not None:
        bounds = f" in [{minimum}, {maximum}]"
    elif minimum is not None:
        bounds = f" >= {minimum}"
    is_within = lambda x: (minimum is None or x >= minimum) and (maximum is None or x <= maximum)  # noqa: E731
    return _number(name, value, f"a finite number{bounds}", is_within)


def bound(name, value):
    """Returns `value` as a float, or raises if it is not a number; infinity is one."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or math.isnan(value):
        raise ValueError(f"`{name}` must be a number; infinity is one. Received: {name}={value!r}.")
    return float(value)


def current_damping(value, is_to_be_found):
    """Raises if the assigned damping is not a finite number >= 0. NaN is allowed if the first update is to find the damping."""
    if not (math.isfinite(value) and value >= 0) and not (math.isnan(value) and is_to_be_found):
        raise ValueError(
            f"The damping must be a finite number >= 0. Received: optimizer.damping={value}, which a callback or your code has assigned. "
            "Nothing was updated; assign another number to `optimizer.damping` to go on."
        )


def positive(name, value):
    """Returns `value` as a float, or raises if it is not a finite number > 0."""
    return _number(name, value, "a finite number > 0", lambda x: x > 0)


def fraction(name, value):
    """Returns `value` as a float, or raises if it is not a number in (0, 1]."""
    return _number(name, value, "a number in (0, 1]", lambda x: 0 < x <= 1)


def below_one(name, value):
    """Returns `value` as a float, or raises if it is not a number in [0, 1)."""
    return _number(name, value, "a number in [0, 1)", lambda x: 0 <= x < 1)


def _number(name, value, rule, holds):
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    if not (is_number and holds(value)):
        raise ValueError(f"`{name}` must be {rule}. Received: {name}={value!r}.")
    return float(value)


def integer(name, value, minimum, maximum):
    """Returns `value` as an int, or raises if it is not an integer in [minimum, maximum]."""
    if not _is_integer(value) or not minimum <= value <= maximum:
        raise ValueError(f"`{name}` must be an integer in [{minimum}, {maximum}]. Received: {name}={value!r}.")
    return int(value)


def flag(name, value):
    """Returns `value`, or raises if it is not a bool."""
    if not isinstance(value, bool):
        raise ValueError(f"`{name}` must be `True` or `False`. Received: {name}={value!r}.")
    return value


def count(name, value, optional=False):
    """Returns `value` as an int, or raises if it is not an integer >= 1 (or `None`, if `optional`)."""
    if optional and value is None:
        return None
    if not _is_integer(value) or value < 1:
        alternative = " or `None`" if optional else ""
        raise ValueError(f"`{name}` must be an integer >= 1{alternative}. Received: {name}={value!r}.")
    return int(value)


def count_or_share(name, value):
    """Returns `value` if it is an integer >= 1, a float in (0, 1] or `None`, or raises."""
    if value is None or (isinstance(value, float) and 0 < value <= 1):
        return value
    if not _is_integer(value) or value < 1:
        raise ValueError(
            f"`{name}` must be an integer >= 1, a share as a float in (0, 1], or `None`. Received: {name}={value!r}."
        )
    return int(value)


def _is_integer(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def part(name, value, base, example):
    """Returns `value`, or raises if it is not an instance of `base`. Parts are objects, not names of objects."""
    if not isinstance(value, base):
        raise TypeError(
            f"`{name}` must be a `{base.__name__}` object, such as `{example}`. Received: {name}={value!r}."
        )
    return value


def all_cases(solver, growing_batch, curvature_batch_size):
    """Raises if a solver that uses all cases in every update is combined with a setting that uses only some of them."""
    for name, value in {"growing_batch": growing_batch, "curvature_batch_size": curvature_batch_size}.items():
        if value is not None:
            raise ValueError(
                f"`{type(solver).__name__}` uses all cases of the batch in every update. Received: {name}={value!r}. Leave it out."
            )


def num_cases(x, y=None, sample_weight=None):
    """Returns the number of cases in nests of arrays, or raises if it is 0 or differs between arrays."""
    found = {}
    for name, arrays in (("x", x), ("y", y), ("sample_weight", sample_weight)):
        leaves = [leaf for leaf in keras.tree.flatten(arrays) if leaf is not None]
        for i, leaf in enumerate(leaves):
            label = name if len(leaves) == 1 else f"{name}[{i}]"
            if not getattr(leaf, "shape", ()) or hasattr(leaf, "tocsr"):
                raise ValueError(
                    f"`{name}` must hold dense arrays whose first axis is the case. Received: {label}={_short(leaf)} of type "
                    f"{type(leaf).__name__}. Convert it with `np.asarray`, a sparse matrix with `.toarray()`."
                )
            found[label] = int(leaf.shape[0])
    if len(set(found.values())) > 1:
        raise ValueError(
            "`x`, `y` and `sample_weight` must hold the same number of cases. Received: "
            f"{', '.join(f'{label} of {count}' for label, count in found.items())}. The first axis is the case."
        )
    (count,) = set(found.values())
    if count < 1:
        raise ValueError("`x` must hold at least one case. Received: arrays of length 0.")
    return count


def no_batches(method, x):
    """Raises if a method that needs all cases at once, as arrays, got a dataset, a `PyDataset` or a generator."""
    if isinstance(x, (tf.data.Dataset, tf.distribute.DistributedDataset, keras.utils.PyDataset)) or hasattr(
        x, "__next__"
    ):
        raise ValueError(
            f"`{method}` needs all cases at once, as arrays. Received: x of type {type(x).__name__}. Of a dataset: "
            "`x, y = (np.concatenate(parts) for parts in zip(*dataset.as_numpy_iterator()))`."
        )


def dense(tensor):
    """Raises if what a batch holds is sparse or ragged."""
    if isinstance(tensor, (tf.SparseTensor, tf.RaggedTensor)):
        raise ValueError(
            f"Cases must be dense tensors, since updates work on parts of a batch. Received: a {type(tensor).__name__} of shape {tensor.shape}. "
            "Convert it with `tf.sparse.to_dense(...)` or `.to_tensor()`, in a dataset by `map`."
        )


def split(num_cases, validation_split):
    """Returns the number of cases that `validation_split` leaves for training, or raises if none are left for training or for validation."""
    num_training = math.floor(num_cases * (1.0 - validation_split))
    if not 0 < num_training < num_cases:
        raise ValueError(
            "`validation_split` must leave cases for training and for validation. "
            f"Received: validation_split={validation_split!r}, which leaves {num_training} of {num_cases} for training."
        )
    return num_training


def batch_has_cases(x):
    """Raises if a batch, of which shapes are enough, is known to be without cases: its loss has no value."""
    if any(leaf is not None and leaf.shape[:1] == (0,) for leaf in keras.tree.flatten(x)):
        raise ValueError("`x` must hold at least one case. Received: a batch of length 0.")


def equal_lengths(x, y=None, sample_weight=None):
    """Raises if `y` or `sample_weight` do not have as many cases as `x`. Where shapes are not known yet, the returned operations check them."""
    first, *others = [
        (name, leaf)
        for name, leaves in (("x", x), ("y", y), ("sample_weight", sample_weight))
        for leaf in keras.tree.flatten(leaves)
        if leaf is not None
    ]
    batch_has_cases(x)
    operations = []
    for name, leaf in others:
        message = "`x`, `y` and `sample_weight` must hold the same number of cases; the first axis is the case. Received: a batch where "
        lengths = first[1].shape[0], leaf.shape[0]
        if None not in lengths and lengths[0] != lengths[1]:
            raise ValueError(f"{message}x is of {lengths[0]} and {name} of {lengths[1]}.")
        if None in lengths:
            message = f"{message}{name} is not as long as x."
            operations.append(tf.debugging.assert_equal(tf.shape(leaf)[0], tf.shape(first[1])[0], message))
    return [operation for operation in operations if operation is not None]


def no_strings(name, values, cure):
    """Raises if a nest holds strings, which TensorFlow would refuse in the middle of an update, in many words."""
    if any(getattr(value, "dtype", None) == tf.string for value in keras.tree.flatten(values)):
        raise ValueError(f"`{name}` must hold numbers. Received: strings. {cure}")


def targets_are_numbers(y):
    """Raises if targets hold strings."""
    no_strings("y", y, "Number the classes: `np.unique(y, return_inverse=True)[1]`.")


def class_weight(value, y, sample_weight):
    """Raises if weights of classes are none, come beside weights of cases, or with other targets than those of one output."""
    if not isinstance(value, dict) or not value:
        raise ValueError(
            f"`class_weight` must be a dict from numbers of classes to weights. Received: class_weight={value!r}."
        )
    if sample_weight is not None:
        raise ValueError(
            "`class_weight` and `sample_weight` must not be given both. Received: both. Multiply them, and give `sample_weight` alone."
        )
    if y is None or isinstance(y, (dict, list, tuple)):
        raise ValueError(
            f"`class_weight` is for the targets of one output, an array. Received: y of type {type(y).__name__}. Give `sample_weight`, one for "
            "each output."
        )


def trainable_weights(variables):
    """Raises if a trainable weight is not a real floating-point number, which an update could not change, or not one of a loss."""
    for variable in variables:
        dtype = keras.backend.standardize_dtype(variable.dtype)
        if not keras.backend.is_float_dtype(dtype):
            raise ValueError(
                f"Trainable weights must be real floating-point numbers. Received: the weight '{variable.path}' of dtype {dtype}. "
                "Add it with `trainable=False`, or hold its real and imaginary parts in two weights."
            )
        if variable.overwrite_with_gradient:
            raise ValueError(
                f"Trainable weights must be those of a loss. Received: the weight '{variable.path}', whose gradient is to be its next value, as of a "
                "layer quantized to float8. Train without quantization, and quantize the trained network."
            )


def weights_of_optimizer(known, variables):
    """Raises if an optimizer that was built for the weights `known` is to train other weights. Its state belongs to `known`, weight by weight."""
    if [id(variable) for variable in known] == [id(variable) for variable in variables]:
        return
    names = lambda weights: _short([weight.path for weight in weights])  # noqa: E731
    raise ValueError(
        "An optimizer remembers the last step, the damping and factors of the weights that it was built for, and can train no others. Received: an "
        f"optimizer built for {len(known)} weights {names(known)}, and a model with {len(variables)} trainable weights {names(variables)}. "
        "Make a new one for this model, `HessianFree(...)`, also after `layer.trainable` has changed; with the same settings: "
        "`HessianFree.from_config(optimizer.get_config())`."
    )


def weights_as_compiled(method, paths):
    """Raises if there are `paths` of weights whose `trainable` has changed since `compile`."""
    if paths:
        raise ValueError(
            f"`{method}` is of the weights that `compile` found trainable. Received: a model whose `trainable` has changed for {_short(paths)}. "
            "Compile again, with a new `HessianFree(...)`."
        )


def has_loss(found):
    """Raises if no loss was `found` that could be minimised."""
    if not found:
        raise ValueError(
            "An update needs a loss to minimise. Received: `compile` without `loss`, and a network that adds none. Use `compile(loss=...)`, or "
            "`add_loss` in a layer's `call`."
        )


def loss_has_second_derivative(name):
    """Raises if TensorFlow has no second derivative of the loss of this name."""
    if name == "ctc":
        raise ValueError(
            "The loss 'ctc' has no second derivative: TensorFlow computes its first one by a function of its own. Train with a loss per frame, "
            "such as `SparseCategoricalCrossentropy`."
        )


def loss_values(name, values, y_pred):
    """Returns the values of a loss function, or raises if they are neither one number nor one value per case."""
    rule = f"The loss '{name}' must return a floating-point tensor that is computed from `y_pred`: one value per case, or one number."
    if values is None:
        raise ValueError(f"{rule} Received: None. Is a `return` missing?")
    if not hasattr(values, "shape") or not hasattr(values, "dtype"):
        raise ValueError(f"{rule} Received: {_short(values)} of type {type(values).__name__}.")
    dtype = keras.backend.standardize_dtype(values.dtype)
    if not keras.backend.is_float_dtype(dtype):
        raise ValueError(f"{rule} Received: a tensor of dtype {dtype}, through which no gradient flows.")
    if isinstance(values, tf.Tensor) and values.shape.rank and values.shape[0] is None and y_pred.shape[0] is None:
        # Micro-batches of a batch are combined by their numbers of cases. If both lengths are known, a difference (a value per class, say) is found
        # later.
        tf.debugging.assert_equal(
            tf.shape(values)[0],
            tf.shape(y_pred)[0],
            f"{rule} Received: another number of values than there are cases. Give cases that do not count the value 0, or return the mean.",
        )
    return values


def sample_weight(name, weight, values):
    """Raises if sample weights do not fit the values of a loss. Keras would broadcast them.

    Args:
        name: Name of the loss.
        weight: Tensor of the weights, or `None`.
        values: Tensor of the values of the loss, at least one per case.
    """
    if weight is None or not values.shape.rank:
        return
    rank = values.shape.rank
    shape = list(weight.shape)
    if len(shape) == rank + 1 and shape[-1] == 1:
        shape.pop()
    fits = len(shape) == rank and all(
        w == 1 or w is None or v is None or w == v for w, v in zip(shape[1:], values.shape[1:], strict=True)
    )
    fits = fits and not (rank == 1 and len(shape) != 1)
    if not fits:
        ones = ", 1" * (rank - 1) if rank > 1 else ","
        raise ValueError(
            f"`sample_weight` must hold one weight per value of the loss '{name}', or per case. Received: weights of shape {_shape(weight)} for "
            f"values of shape {_shape(values)}. Weights of cases have the shape (cases{ones})."
        )


def _shape(tensor):
    first, *others = tensor.shape
    return f"({', '.join(['cases' if first is None else str(first), *map(str, others)])}{'' if others else ','})"


def _short(value):
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."
