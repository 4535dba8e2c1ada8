"""What several workers or replicas do together; also a script, one process of a cluster: `python worker.py FOLDER WHAT...`."""

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from cluster import LONGEST
from keras import layers
from problems import model_data, on_objective
from training import assert_same, renewed

import keras_hf
from keras_hf import (
    ConjugateGradient,
    DirectSolver,
    DoubleBackward,
    EmpiricalFisher,
    EmpiricalFisherDiagonal,
    FiniteDifferenceHessian,
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
from keras_hf.common.cluster import num_workers, worker_number
from keras_hf.solvers.solver import LocalModel


def by_cg(preconditioner, **arguments):
    """CG at its end would amplify the order of sums."""
    return {"solver": ConjugateGradient(preconditioner, max_iterations=8), "growing_batch": None, **arguments}


def growing(initial_size, patience=1):
    """A part that grows after so many updates: of so much noise nothing generalises."""
    return GrowingBatch(initial_size, patience=patience, share=1, noise=1e6)


# Solvers, preconditioners and choices of cases.
OPTIMIZERS = {
    "diagonal": by_cg(EmpiricalFisherDiagonal()),
    "chunk": by_cg(EmpiricalFisherDiagonal(), curvature_batch_size=25),
    "growing": by_cg(EmpiricalFisherDiagonal(), growing_batch=growing(13, patience=5)),
    "Kronecker": by_cg(KroneckerFactored(interval=2)),
    "Kronecker of 20 cases": by_cg(KroneckerFactored(num_cases=20, interval=2)),
    "Kronecker of a growing part": by_cg(
        KroneckerFactored(num_cases=0.5, interval=2, decay=0.5), growing_batch=growing(20)
    ),
    "Nystrom": by_cg(Nystrom(rank=4)),
    "momentum": {"solver": PreconditionedMomentum(share=0.5), "growing_batch": GrowingBatch(20, rate=0.2)},
    "direct": {"solver": DirectSolver(), "growing_batch": None},
    "Fisher in micro-batches": by_cg(EmpiricalFisherDiagonal(), curvature=EmpiricalFisher(), micro_batch_size=20),
    "Hessian in micro-batches": by_cg(
        EmpiricalFisherDiagonal(), curvature=FiniteDifferenceHessian(), micro_batch_size=20
    ),
}
# Runs, by the arguments of `trained`. Those of one optimizer share a trace.
RUNS = {
    # Parts of 13 and 26 go around the cases and begin a new round. The next is all: 52 are more than half of 103, though 26 are half of what the
    # first of two replicas holds.
    "growing": {"optimizer": "growing", "num_cases": 103, "epochs": 11},
    "batches": {"optimizer": "growing", "batch_size": 20, "epochs": 2, "predicts": True},
    "dataset": {"optimizer": "growing", "batch_size": 20, "epochs": 2, "as_dataset": True},
    "one case": {"optimizer": "growing", "num_cases": 1, "predicts": True},
    "chunk": {"optimizer": "chunk", "weighted": True, "constrained": True, "loss": "categorical_crossentropy"},
    "Kronecker of 20 cases": {"optimizer": "Kronecker of 20 cases"},
    "Kronecker of a growing part": {"optimizer": "Kronecker of a growing part"},
    "Nystrom": {"optimizer": "Nystrom"},
    "momentum": {"optimizer": "momentum"},
    "direct": {"optimizer": "direct"},
    "fewer rows than weights": {"optimizer": "direct", "num_cases": 11},
    "normalized": {"optimizer": "diagonal", "normalized": True},
}
# Those of clusters of so many workers.
OF_CLUSTERS = {
    2: [name for name in RUNS if name != "Kronecker of 20 cases"],
    3: ["growing", "batches", "one case"],
}


class Hashes(keras.callbacks.Callback):
    """Hashes all weights and the optimizer's damping after every update."""

    def __init__(self):
        super().__init__()
        self.found = []

    def on_train_batch_end(self, batch, logs=None):
        values = [v.numpy().tobytes() for v in [*self.model.weights, self.model.optimizer.damping]]
        self.found.append(hashlib.sha256(b"".join(values)).hexdigest())


def cases(num_cases=51, loss="mse"):
    """Inputs and targets; one-hot ones for cross-entropies."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(num_cases, 3)), rng.normal(size=(num_cases, 2))
    y = np.eye(2)[(y[:, 0] > 0).astype(int)] if loss == "categorical_crossentropy" else y
    return x.astype(keras.config.floatx()), y.astype(keras.config.floatx())


def model_of(strategy, optimizer="diagonal", loss="mse", normalized=False, constrained=False, width=4):
    """A small compiled model."""
    keras.utils.set_random_seed(0)
    with strategy.scope():
        stack = [layers.Dense(width, "tanh", kernel_regularizer=keras.regularizers.L2(1e-2))]
        stack += [layers.BatchNormalization()] * normalized
        constraint = keras.constraints.MaxNorm(0.5) if constrained else None
        activation = "softmax" if loss == "categorical_crossentropy" else None
        stack += [layers.Dense(2, activation, kernel_constraint=constraint)]
        model = HFModel(keras.Sequential([keras.Input((3,)), *stack]))
        model.compile(HessianFree(0.1, seed=1, **OPTIMIZERS[optimizer]), loss=loss, metrics=["mae"])
    return model


def trained(
    strategy,
    optimizer,
    loss="mse",
    normalized=False,
    constrained=False,
    width=4,
    *,
    num_cases=51,
    weighted=False,
    batch_size=None,
    as_dataset=False,
    shuffle=True,
    epochs=4,
    predicts=False,
):
    """Trains a model, and returns it and what a user sees of it."""
    model = renewed(model_of, strategy, optimizer, loss, normalized, constrained, width)
    x, y = cases(num_cases, loss)
    data = {"x": x, "y": y, "batch_size": batch_size, "shuffle": shuffle}
    # The optimizer's seed alone puts cases in order.
    keras.utils.set_random_seed(worker_number(strategy))
    if as_dataset:
        data = {"x": tf.data.Dataset.from_tensor_slices((x, y)).batch(batch_size or num_cases)}
    if weighted:
        data["sample_weight"] = np.random.default_rng(1).uniform(size=num_cases)
    hashes = Hashes()
    callbacks = [LevenbergMarquardt(), hashes]
    # Validated once, in the end.
    data |= {"validation_data": (x, y), "validation_freq": epochs}
    history = model.fit(**data, epochs=epochs, callbacks=callbacks, verbose=0).history
    return model, {
        "weights": np.concatenate([np.ravel(weight) for weight in model.get_weights()]).tolist(),
        "history": history,
        "predicted": model.predict(x, verbose=0).tolist() if predicts else [],
        "hashes": hashes.found,
    }


def assert_as_one(found, one, atol=1e-6, rtol=1e-5, but=()):
    """That all a user sees of a run, but some keys of its history, is what one process makes on one device. CG amplifies the rounding of sums."""
    assert len(found["hashes"]) == len(one["hashes"]) > 0
    assert_same(found, one, rtol=1e-7, atol=atol, keys=("weights", "predicted"))
    keys = {"loss", "mae", "val_loss", "val_mae", "damping", "num_cases", "gradient_norm"} - set(but)
    assert_same(found["history"], one["history"], rtol=rtol, atol=1e-8, keys=keys)


# What a worker can be told to do.


def train(strategy, folder):
    """Makes the runs and writes what came of them."""
    for name in OF_CLUSTERS[num_workers(strategy)]:
        _, found = trained(strategy, **RUNS[name])
        Path(folder, f"{name}-{worker_number(strategy)}.json").write_text(json.dumps(found))


def long_run(strategy, folder, stop=None):
    """A run that is backed up, with every callback that writes; `stop` is called as a callback would be. It goes on from its backup."""
    folder = Path(folder, "run")
    folder.mkdir(exist_ok=True)
    model = renewed(model_of, strategy, "Kronecker of a growing part")
    callbacks = [
        keras.callbacks.BackupAndRestore(folder / "backup", delete_checkpoint=False),
        keras.callbacks.ModelCheckpoint(folder / "best.keras"),
        keras.callbacks.CSVLogger(folder / "log.csv"),
        UpdateRecorder(folder / "updates.jsonl"),
        *([stop] if stop else []),
        LevenbergMarquardt(),
    ]
    model.fit(*cases(), epochs=6, callbacks=callbacks, verbose=0)
    model.save(folder / "last.keras")
    model.save_weights(folder / "last.weights.h5")
    values = [np.asarray(variable) for variable in [*model.weights, *model.optimizer.variables]]
    np.savez(folder / f"values-{worker_number(strategy)}.npz", *values)


def kill_worker(strategy, folder):
    """The same, but the second worker is killed when the fourth epoch begins: the others are in the middle of an update."""

    class Killed(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 3 and worker_number(strategy) == 1:
                os.kill(os.getpid(), signal.SIGKILL)

    long_run(strategy, folder, stop=Killed())


def kill_chief(strategy, folder):
    """The same, but the chief is killed while it writes its second backup: in the middle of its weights."""
    replace, count = os.replace, 0

    def killing(source, target):
        nonlocal count
        count += Path(target).parent.name == "backup"
        # Every backup replaces three files, of which the second holds the weights.
        if count == 5 and worker_number(strategy) == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(source, target)

    os.replace = killing
    long_run(strategy, folder)


def other_jobs(strategy, folder):
    """Workers whose jobs differ: what each is told."""
    number, told = worker_number(strategy), {}
    for what in ("data", "cases", "optimizer"):
        x, y = cases()
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
    model = model_of(strategy, "diagonal", width=8)
    data = model_data(model, *cases())
    solver, variables = model.optimizer.solver, [variable.value for variable in model.trainable_variables]
    damping = tf.constant(0.1, tf.float64)

    def step(objective):
        at_start = objective.loss_and_gradient()
        product = objective.product(GaussNewton(DoubleBackward()))
        local = LocalModel(objective, lambda: product, at_start.gradient)
        path = solver.solve(local, damping, solver.initial_state(variables, []))
        return path.search(objective.loss_at, path.candidates, at_start.loss, at_start.gradient).loss

    @tf.function(autograph=False)
    def update():
        return strategy.run(lambda: on_objective(model, data, step))

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
    folder, *jobs = sys.argv[1:]
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    strategy = keras_hf.multi_worker_strategy(timeout=LONGEST)
    # As in conftest.py. Three workers have it on, as users do.
    tf.config.optimizer.set_experimental_options({"disable_meta_optimizer": num_workers(strategy) == 2})
    assert num_workers(strategy) == len(json.loads(os.environ["TF_CONFIG"])["cluster"]["worker"])
    for what in jobs:
        globals()[what](strategy, folder)
