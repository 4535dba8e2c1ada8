"""What several workers do together; also a script, one process of a cluster: `python worker.py WHAT FOLDER ARGUMENTS`."""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import keras_hf
from keras_hf import (
    ConjugateGradient,
    DirectSolver,
    DoubleBackward,
    EmpiricalFisherDiagonal,
    GaussNewton,
    GrowingBatch,
    HessianFree,
    HFModel,
    KroneckerFactored,
    LevenbergMarquardt,
    Nystrom,
    PreconditionedMomentum,
    UpdateRecorder,
)
from keras_hf.problem.replicas import num_workers, worker_number
from keras_hf.solvers.solver import LocalModel


def by_cg(preconditioner, **arguments):
    """CG at its end would amplify the order of sums."""
    return {"solver": ConjugateGradient(preconditioner, max_iterations=8), "growing_batch": None, **arguments}


def growing(initial_size):
    """A part that grows after every update: of so much noise nothing generalises."""
    return GrowingBatch(initial_size, patience=1, share=1, noise=1e6)


# Solvers, preconditioners and choices of cases.
OPTIMIZERS = {
    "diagonal": by_cg(EmpiricalFisherDiagonal()),
    "chunk": by_cg(EmpiricalFisherDiagonal(), curvature_batch_size=25),
    "growing": by_cg(EmpiricalFisherDiagonal(), growing_batch=growing(12)),
    "growing from 13": by_cg(EmpiricalFisherDiagonal(), growing_batch=GrowingBatch(13, patience=100, noise=1e6)),
    "Kronecker": by_cg(KroneckerFactored()),
    "Kronecker of 20 cases": by_cg(KroneckerFactored(num_cases=20, interval=2)),
    "Kronecker of a growing part": by_cg(KroneckerFactored(num_cases=0.5, decay=0.5), growing_batch=growing(20)),
    "Nystrom": by_cg(Nystrom(rank=4)),
    "momentum": {"solver": PreconditionedMomentum(share=0.5), "growing_batch": GrowingBatch(20, rate=0.2)},
    "direct": {"solver": DirectSolver(), "growing_batch": None},
}
# Networks, losses and data, with the diagonal.
TASKS = {
    "weights": {"weighted": True},
    "batches": {"batch_size": 20},
    "softmax": {"loss": "categorical_crossentropy"},
    "normalized": {"normalized": True},
    "constrained": {"constrained": True},
    "one case": {"num_cases": 1},
    "fewer rows than weights": {"num_cases": 11, "optimizer": "direct"},
    "dataset": {"as_dataset": True},
}
CASES = {**{name: {"optimizer": name} for name in OPTIMIZERS}, **TASKS}


class Hashes(keras.callbacks.Callback):
    """Hashes all weights and the optimizer's damping after every update."""

    def __init__(self):
        super().__init__()
        self.found = []

    def on_train_batch_end(self, batch, logs=None):
        values = [v.numpy().tobytes() for v in [*self.model.weights, self.model.optimizer.damping]]
        self.found.append(hashlib.sha256(b"".join(values)).hexdigest())


def cases(num_cases, loss):
    """Inputs and targets; one-hot ones for cross-entropies."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(num_cases, 3)), rng.normal(size=(num_cases, 2))
    return x, np.eye(2)[(y[:, 0] > 0).astype(int)] if loss == "categorical_crossentropy" else y


def model_of(strategy, optimizer="diagonal", loss="mse", normalized=False, constrained=False, width=4):
    """A small compiled model."""
    keras.utils.set_random_seed(0)
    with strategy.scope():
        l2 = keras.regularizers.L2(1e-2) if optimizer != "direct" else None
        stack = [layers.Dense(width, "tanh", kernel_regularizer=l2)]
        stack += [layers.BatchNormalization()] * normalized
        constraint = keras.constraints.MaxNorm(0.5) if constrained else None
        activation = "softmax" if loss == "categorical_crossentropy" else None
        stack += [layers.Dense(2, activation, kernel_constraint=constraint)]
        model = HFModel(keras.Sequential([keras.Input((3,)), *stack]))
        model.compile(HessianFree(0.1, seed=1, **OPTIMIZERS[optimizer]), loss=loss, metrics=["mae"])
    return model


def trained(strategy, num_cases=51, weighted=False, batch_size=None, as_dataset=False, epochs=4, **arguments):
    """Trains a model, and returns all that a user sees of it."""
    x, y = cases(num_cases, arguments.get("loss"))
    model, hashes = model_of(strategy, **arguments), Hashes()
    data = {"x": x, "y": y, "batch_size": batch_size}
    if as_dataset:
        data = {"x": tf.data.Dataset.from_tensor_slices((x, y)).batch(20)}
    if weighted:
        data["sample_weight"] = np.random.default_rng(1).uniform(size=num_cases)
    # In their order: batches would be other ones after other random numbers.
    data["shuffle"] = batch_size is None
    callbacks = [LevenbergMarquardt(), hashes]
    history = model.fit(**data, epochs=epochs, callbacks=callbacks, verbose=0, validation_data=(x, y)).history
    return {
        "weights": np.concatenate([np.ravel(weight) for weight in model.get_weights()]).tolist(),
        "history": history,
        "evaluated": model.evaluate(x, y, verbose=0),
        "predicted": model.predict(x, verbose=0).tolist(),
        "hashes": hashes.found,
    }


# What a worker can be told to do.


def train(strategy, folder, *names):
    """Trains each of `CASES` and writes what came of it."""
    for name in names:
        found = trained(strategy, **CASES[name])
        Path(folder, f"{name}-{worker_number(strategy)}.json").write_text(json.dumps(found))


def long_run(strategy, folder, *, epochs=6, stop=None):
    """A run that is backed up, with every callback that writes; `stop` is called as a callback would be."""
    x, y = cases(51, "mse")
    model = model_of(strategy, "Kronecker of 20 cases")
    callbacks = [
        keras.callbacks.BackupAndRestore(f"{folder}/backup", delete_checkpoint=False),
        keras.callbacks.ModelCheckpoint(f"{folder}/best.keras"),
        keras.callbacks.CSVLogger(f"{folder}/log.csv"),
        UpdateRecorder(f"{folder}/updates.jsonl"),
        *([stop] if stop else []),
        LevenbergMarquardt(),
    ]
    model.fit(x, y, epochs=epochs, callbacks=callbacks, verbose=0)
    model.save(f"{folder}/last.keras")
    model.save_weights(f"{folder}/last.weights.h5")
    return model


def whole(strategy, folder):
    """The run without interruption."""
    model = long_run(strategy, folder)
    values = [variable.numpy() for variable in [*model.weights, *model.optimizer.variables]]
    np.savez(f"{folder}/values-{worker_number(strategy)}.npz", *values)


def kill_worker(strategy, folder):
    """The same, but the second worker is killed when the fourth epoch begins: the others are in the middle of an update."""

    class Killed(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 3 and worker_number(strategy) == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    long_run(strategy, folder, stop=Killed())


def kill_chief(strategy, folder, moment):
    """The same, but the chief is killed while it writes the fourth backup: before its weights are written, in the middle of them, or after."""
    replace, count = os.replace, 0

    def killing(source, target):
        nonlocal count
        backup = "backup" in str(target)
        count += backup
        # Every backup replaces three files.
        at = {"before": 10, "weights": 11, "after": 12}[moment]
        if backup and count == at and worker_number(strategy) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(source, target)

    os.replace = killing
    long_run(strategy, folder)


def other_jobs(strategy, folder):
    """Workers whose jobs differ: what each is told."""
    number, told = worker_number(strategy), {}
    for what in ("data", "cases", "optimizer"):
        x, y = cases(51, "mse")
        if number == 1 and what == "data":
            x = x[:, :, None]
        if number == 1 and what == "cases":
            x, y = x[:40], y[:40]
        try:
            model = model_of(strategy, optimizer="Nystrom" if number == 1 and what == "optimizer" else "diagonal")
            model.fit(x, y, epochs=2, callbacks=[LevenbergMarquardt()], verbose=0)
        except ValueError as error:
            told[what] = str(error)
    Path(folder, f"told-{number}.json").write_text(json.dumps(told))


def reductions(strategy, folder):
    """Counts the reductions in the loops of an update: of each while loop, those of one turn, loops in it apart."""
    x, y = cases(51, "mse")
    model = model_of(strategy, "diagonal", width=8)
    data = model._built_for(x, y, None)

    solver, variables = model.optimizer.solver, [variable.value for variable in model.trainable_variables]
    damping = tf.constant(0.1, tf.float64)

    def step(objective, structure):
        at_start = objective.loss_and_gradient()
        product = objective.product(GaussNewton(DoubleBackward()))
        local = LocalModel(objective, lambda: product, at_start.gradient)
        path = solver.solve(local, damping, solver.initial_state(variables, []))
        return path.search(objective.loss_at, path.candidates, at_start.loss, at_start.gradient).loss

    @tf.function(autograph=False)
    def update():
        return strategy.run(lambda: model._with_objective(data, step))

    graph = update.get_concrete_function().graph.as_graph_def()
    nodes = {each.signature.name: each.node_def for each in graph.library.function}

    def count(name):
        """Reductions of a call, those of loops in it apart."""
        total = 0
        for node in nodes[name]:
            total += node.op.startswith("CollectiveReduce")
            if "While" not in node.op:
                total += sum(count(called.func.name) for called in node.attr.values() if called.func.name in nodes)
        return total

    every = [*graph.node, *(node for each in nodes.values() for node in each)]
    found = sorted(count(node.attr["body"].func.name) for node in every if "While" in node.op)
    Path(folder, f"reductions-{worker_number(strategy)}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    what, folder, *arguments = sys.argv[1:]
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    strategy = keras_hf.multi_worker_strategy(timeout=60)
    assert num_workers(strategy) == len(json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"])
    globals()[what](strategy, folder, *arguments)
