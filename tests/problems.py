"""Tiny shared problems, with dense oracles in float64."""

import keras
import numpy as np
import tensorflow as tf

from keras_hf import batching
from keras_hf.objective import Data, LocalObjective, Objective
from keras_hf.replicas import across_replicas


def model_data(model, x, y, sample_weight=None):
    """Cases as tensors of the model's dtype, and the model's symbolic build on them."""
    data = Data(*keras.tree.map_structure(lambda leaf: None if leaf is None else tf.convert_to_tensor(leaf), (x, y, sample_weight)))
    model._maybe_symbolic_build(data_batch=tuple(data))
    return data


def with_objective(model, data, function, curvature_batch_size=None, micro_batch_size=None, update_number=0):
    """Calls `function(objective)` with the objective of one update of the model, as `train_step` makes it."""
    task, structure = model._task(data)
    structure = structure._replace(chunk_is_one_piece=micro_batch_size is None)
    pieces = batching.divide(data.num_cases, curvature_batch_size, micro_batch_size, tf.constant(update_number), seed=0)
    part = LocalObjective(task, structure, data, pieces, tf.constant(update_number))

    def on_all(replicas, parts):
        return function(Objective(replicas, parts, task, chunk_is_batch=curvature_batch_size is None))

    return across_replicas(on_all, part)


def dense_matrix(product, n):
    """The matrix of a product, column by column."""
    return np.stack([product(tf.one_hot(i, n, dtype=tf.float64)).numpy() for i in range(n)], 1)
