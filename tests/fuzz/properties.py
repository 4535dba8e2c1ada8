"""What must hold of every program: each property is one function of what `make()` of the program returns, and of `make` itself."""

import copy
import pickle
import tempfile

import keras
import numpy as np

from fuzz.oracles import Dense, close, flat, of_classes


def dense_of(p):
    """The dense matrices of a program at its present weights."""
    weights = of_classes(p.fit.get("class_weight"), p.y, p.sample_weight)
    return Dense(p.network, p.tops, p.cuts, p.x, p.y, weights, p.decay)


def train(p, **more):
    """Logs of `fit`, a dict of lists."""
    return p.model.fit(p.x, p.y, sample_weight=p.sample_weight, verbose=0, **{**p.fit, **more}).history


def compare_products(what, f, dense, p):
    """Loss, gradient and products of an objective are those of dense matrices."""
    loss, gradient = f.loss_and_gradient(f.weights)
    close(f"{what}loss", loss, dense.loss, p.rtol)
    close(f"{what}gradient", gradient, dense.gradient, p.rtol, abs(loss))
    if p.curvature == "EmpiricalFisher":
        return
    is_hessian = "Hessian" in p.curvature
    expected = dense.hessian() if is_hessian else dense.curvature
    rtol = max(p.rtol, 1e-4) if p.curvature == "FiniteDifferenceHessian" else p.rtol
    for v in np.random.default_rng(1).normal(size=(2, gradient.size)):
        size = np.abs(expected).max() + abs(loss)
        close(f"{what}product", f.product(f.weights, v), expected @ v, rtol, size)


def loss_gradient_and_product(p, make):
    """As dense matrices have them; the network stays as it was."""
    before = flat(p.network.variables)
    p = copy.copy(p)
    p.sample_weight = of_classes(p.fit.get("class_weight"), p.y, p.sample_weight)
    compare_products("", p.model.objective(p.x, p.y, p.sample_weight), dense_of(p), p)
    assert np.array_equal(flat(p.network.variables), before), "products changed the network"


def cases(p, make):
    """Doubled and permuted cases are the same loss; a case of weight 0 is an absent case."""
    if not p.doubles:
        return
    number = np.random.default_rng(2).permutation(np.repeat(np.arange(p.N), 2))
    taken = lambda nest: keras.tree.map_structure(lambda a: None if a is None else np.asarray(a)[number], nest)  # noqa: E731
    f = p.model.objective(taken(p.x), taken(p.y), taken(p.sample_weight))
    compare_products("doubled cases: ", f, Dense(p.network, p.tops, p.cuts, p.x, p.y, p.sample_weight, p.decay), p)


def jacobian(p, make):
    """Rows of least squares, half whose sum of squares is the loss."""
    f, dense = p.model.objective(p.x, p.y, p.sample_weight), dense_of(p)
    residuals, rows = f.residuals(f.weights), f.jacobian(f.weights)
    close("half the squared residuals", residuals @ residuals / 2, dense.loss, p.rtol)
    close("J'r", rows.T @ residuals, dense.gradient, p.rtol, dense.loss)
    close("J'J", rows.T @ rows, dense.curvature, p.rtol, dense.loss)


def changed(p):
    """Makes the change of a program after an update, which the next one must see."""
    if p.change == "weights":
        for variable in p.network.trainable_variables:
            variable.assign(0.5 * variable.numpy() + 0.1)
    if p.change == "targets":
        p.y = keras.tree.map_structure(lambda a: a[::-1].copy(), p.y)
    if p.change == "more cases":
        twice = lambda nest: keras.tree.map_structure(lambda a: None if a is None else np.concatenate([a, a]), nest)  # noqa: E731
        p.x, p.y, p.sample_weight = twice(p.x), twice(p.y), twice(p.sample_weight)
    if p.change == "frozen":
        next(layer for layer in p.l if layer.trainable_weights).trainable = False
        p.compile()
    if p.change == "damping":
        p.model.optimizer.damping = 0.3
    if p.change == "weight_decay":
        p.model.optimizer.weight_decay = p.decay = 0.2


def update(p, make):
    """An update lowers the loss of its cases, keeps constraints and frozen weights, and takes the step of the damped system."""
    if p.change != "nothing":
        train(p)
        changed(p)
    if not p.network.trainable_variables:
        return
    dense = dense_of(p)
    w, before = flat(p.network.trainable_variables), dense.loss
    fixed = [v for v in p.network.non_trainable_variables if "moving" not in v.name]
    fixed = [
        (v, v.numpy())
        for v in fixed
        if not any(word in v.path for word in ("seed", "state", "vector", "rnn", "lstm", "gru"))
    ]
    is_within = not any(
        v.constraint and np.any(v.constraint(v).numpy() != v.numpy()) for v in p.network.trainable_variables
    )
    logs = {key: values[0] for key, values in train(p).items()}
    for variable, value in fixed:
        assert np.array_equal(variable.numpy(), value), f"{variable.path} is not trained, but changed"
    for variable in p.network.trainable_variables:
        if variable.constraint is not None and "use_ema" not in p.settings:
            close(f"the constraint of {variable.path}", variable, variable.constraint(variable.value), 1e-5)
    for key in ("loss", "update_loss", "damping", "step_size", "gradient_norm", "num_cases"):
        assert np.isfinite(logs[key]), f"{key} is {logs[key]}"
    if not (p.is_whole and is_within):
        return
    after = dense_of(p).loss
    assert after <= before + max(1e-9, p.rtol / 100) * abs(before), (
        f"an update raised the loss of its cases from {before} to {after}"
    )
    close("logged loss", logs["update_loss"], before, p.rtol)
    size, step = logs.get("arc_step", logs["step_size"]), flat(p.network.trainable_variables) - w
    if size == 0 or not np.any(step):
        assert np.array_equal(step, 0 * step), "a rejected step changed weights"
        return
    order = getattr(p.model.solver, "order", 1)
    is_plain = p.curvature == "GaussNewton" and p.rtol < 1e-4 and "structural_damping" not in p.settings
    is_plain &= not any(v.constraint for v in p.network.trainable_variables)
    is_curved = np.linalg.eigvalsh(dense.curvature)[0] > -1e-8 * (1 + abs(before))
    if order > 1 or not (is_curved and is_plain) or ("cg_step" in logs and p.change != "nothing"):
        return
    # Of the unscaled step, which minimises the quadratic along itself.
    step, damped = step / size, dense.curvature + logs["damping"] * np.eye(step.size)
    slope = step @ dense.gradient
    # Plain conjugate gradients in NumPy, too, lose six digits of this to rounding within a dozen iterations.
    close("slope at the step's end", slope + step @ damped @ step, 0.0, 1e-4, scale=abs(slope))
    if "arc_step" in logs:
        close("exact step", step, dense.step(logs["damping"]), 1e-6)


def resumed(p, make):
    """A run that was interrupted goes on bit-equal."""
    once, again = make(), make()
    if "use_ema" in p.settings:
        # At the end of `fit` the average takes the weights' place.
        train(once, epochs=2)
        train(once, initial_epoch=2, epochs=4)
    else:
        train(once, epochs=4)
    train(again, epochs=2)
    if p.pause == "save_weights":
        with tempfile.TemporaryDirectory() as folder:
            again.model.save_weights(folder + "/run.weights.h5")
            again = make()
            again.model.load_weights(folder + "/run.weights.h5")
    if p.pause == "save":
        with tempfile.TemporaryDirectory() as folder:
            again.model.save(folder + "/run.keras")
            again.model = keras.models.load_model(folder + "/run.keras", safe_mode=False)
    if p.pause == "pickle":
        again.model = pickle.loads(pickle.dumps(again.model))
    train(again, initial_epoch=2, epochs=4)
    # Layers draw the seeds of what is random in them when they are made.
    found = (flat([v for v in q.model.variables if "seed" not in v.path]) for q in (once, again))
    assert np.array_equal(*found), f"a run with {p.pause} in the middle is another one"


PROPERTIES = {check.__name__: check for check in (loss_gradient_and_product, jacobian, cases, update, resumed)}
