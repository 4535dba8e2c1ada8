"""Random networks with losses, data and settings, as the source of a function `make()`; `features.py` has what is drawn."""

import re
import warnings

import keras
import numpy as np
import tensorflow as tf

import keras_hf
from fuzz import features, layers
from fuzz.features import LOSSES, SLOTS


class Invalid(Exception):
    """A network that is not worth a draw."""


class Program:
    """The source of a program, the features in it, and the names of the properties to check.

    Args:
        one_of: Callable, list -> one of its entries.
    """

    def __init__(self, one_of):
        self._one_of, self.features = one_of, set()
        self._built, self._layers, self._lines = [], [], []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.source = self._drawn()

    def _feature(self, what, options):
        """One of the options, noted without the slots' values."""
        chosen = self._one_of(list(options))
        self.features.add(what + re.sub(r"<\w+>", "*", chosen))
        return chosen

    def _drawn(self):
        sizes = {name: int(self._one_of(options)) for name, options in {"N": "5612", "T": "3214", "K": "231"}.items()}
        self.features |= {f"{name} = 1" for name, size in sizes.items() if size == 1}
        self._settings = self._drawn_settings()
        kind = self._feature("", features.INPUTS)
        x = eval(features.INPUTS[kind], {"np": np, "rng": np.random.default_rng(0), **sizes})
        self._form = self._feature("", features.FORMS)
        is_sequential = self._form == "sequential"
        structure = "one output" if is_sequential else self._feature("", features.OUTPUTS)
        has_two_inputs = not is_sequential and self._one_of([False, False, True])
        h, other = self._network_input(x), self._network_input(np.zeros((sizes["N"], 2)))
        if kind == "tokens":
            h = self._with(h, "L.Embedding(4, <units>, mask_zero=<flag>)")
        if kind == "padded sequences":
            h = self._with(h, "L.Masking()")
        for _ in range(self._one_of([1, 2, 3, 0, 4])):
            h = self._with(h, self._one_of(features.EVERYWHERE + features.BY_RANK.get(len(h.shape), [])))
        if len(h.shape) > 3 or (len(h.shape) == 3 and self._one_of([True, False])):
            h = self._with(h, "L.Flatten()")
        if has_two_inputs and len(h.shape) == 2:
            h = self._with(h, "@1([h, @0(other)]) | L.Dense(<units>, <activation>) | L.Concatenate()", other)
        self.features.add("outputs of rank " + str(len(h.shape)))
        heads = [self._head(h, sizes) for _ in range(1 if structure == "one output" else 2)]
        tops, targets, self.cuts, losses = zip(*heads, strict=True)
        if sum(layer.count_params() for layer in self._built) > features.MOST_WEIGHTS:
            raise Invalid
        pack = {"one output": "{}", "a list of outputs": "[{}, {}]", "a dict of outputs": "{{'a': {}, 'b': {}}}"}[
            structure
        ]
        y, loss = pack.format(*targets), pack.format(*losses)
        weights = self._feature("weights ", features.WEIGHTS)
        if len(h.shape) > 2:
            weights = weights.replace("size=N", "size=(N, 1)")
        if len(heads) == 2:
            weights = (
                "None"
                if weights == "None"
                else pack.format(weights, "np.ones(N)" if len(h.shape) == 2 else "np.ones((N, 1))")
            )
        weighted = f"loss_weights={pack.format(0.5, 2.0)}, " if len(heads) == 2 and self._one_of([False, True]) else ""
        solver = self._feature("", features.SOLVERS)
        self._leave_out_what_is_refused(solver, weights, targets, losses, h)
        settings = self._settings
        is_whole = not any(part in self._chosen(*settings) for part in features.OF_PARTS)
        self.has_squares = all(loss.startswith(features.SQUARES) for loss in losses)
        text = f"{self._layers} {losses}"
        inputs = f"{{'a': {features.INPUTS[kind]}, 'b': rng.normal(size=(N, 2))}}" if has_two_inputs else ""
        of_optimizer = settings.keys() - {*features.OF_FIT, *features.OF_COMPILE, *features.OF_PROGRAM}
        optimizer = f"damping=0.1, seed=0, solver={solver}, {self._chosen(*of_optimizer)}"
        compiled = f"loss=loss, {weighted}"
        pause, change = self._draw_actions(text)
        # Rules that change the damping must see every update.
        damped = ", callbacks=[keras_hf.ConstantDamping()]" if "steps_per_execution" in settings else ""
        floatx = settings.get("floatx", "float64")
        lines = [
            f"keras.config.set_floatx({floatx!r})",
            f"keras.config.set_dtype_policy({floatx!r})",
            f"scope = {settings.get('scope', 'contextlib.nullcontext')}",
            *(f"{name} = {size}" for name, size in sizes.items()),
            "rng = np.random.default_rng(0)",
            f"x = {inputs or features.INPUTS[kind]}",
            f"y = {y}",
            f"sample_weight = {weights}",
            f"fit = dict({self._chosen(*features.OF_FIT) or 'epochs=1'}{damped})",
            f"settings = {sorted(settings)}",
            f"loss = {loss}",
            f"cuts, decay, rtol = {list(self.cuts)}, {settings.get('weight_decay', 0.0)}, {1e-8 if floatx == 'float64' else 1e-3}",
            f"pause, change, is_whole = {pause!r}, {change!r}, {is_whole}",
            f"curvature = {settings.get('curvature', 'keras_hf.GaussNewton(').split('.')[1].split('(')[0]!r}",
            f"doubles = {not any(word in text for word in features.NOT_MEANS)}",
            "",
            "def compile():",
            "    with scope():",
            f"        network.compile('sgd', {compiled})",
            f"        optimizer = keras_hf.HessianFree({optimizer})",
            f"        model.compile(optimizer, {compiled}{self._chosen(*features.OF_COMPILE)})",
            "",
            "def body(h, other=None):",
            *(f"    {line}" for line in [*self._lines, f"return {pack.format(*(top[1] for top in tops))}"]),
            "",
            "with scope():",
            f"    l = [{', '.join(self._layers)}]",
            f"    tops = [{', '.join(top[0] for top in tops)}]",
            *(f"    {line}" for line in self._network(has_two_inputs)),
            "    for variable in network.weights:",
            "        if 'float' in variable.dtype and 'moving' not in variable.name:",
            "            variable.assign(rng.normal(scale=0.6, size=variable.shape))",
            "    model = keras_hf.HFModel(network)",
            "compile()",
            "return types.SimpleNamespace(**locals())",
        ]
        return "\n".join(["def make():", *(f"    {line}" if line else "" for line in lines), ""])

    def _drawn_settings(self):
        """Up to three settings that are not left out, a dict from names to texts."""
        names = [self._one_of(list(features.SETTINGS)) for _ in range(self._one_of([0, 1, 2, 3]))]
        return {name: self._one_of(features.SETTINGS[name]) for name in dict.fromkeys(names)}

    def _leave_out_what_is_refused(self, solver, weights, targets, losses, h):
        """Takes settings back that mean nothing here, or that are documented to be refused, or to give other numbers."""
        settings, text = self._settings, f"{self._layers}"
        drop = lambda *names: [settings.pop(name, None) for name in names]  # noqa: E731
        if "Direct" in solver:
            drop("curvature_batch_size", "growing_batch", "curvature", "structural_damping", "scope")
        if "Momentum" in solver or settings.get("curvature", "GaussNewton").startswith(("keras_hf.H", "keras_hf.[EF]")):
            drop("structural_damping")
        if not any(word in text for word in ("LSTM", "GRU", "RNN")):
            drop("structural_damping")
        is_of_classes = len(targets) == 1 and len(h.shape) == 2 and "integers" in targets[0]
        if weights != "None" or not is_of_classes or ("(0, 2" in targets[0] and not self._has_one_target(targets[0])):
            drop("class_weight")
        if any(word in text for word in features.OF_ALL_CASES):
            drop("scope", "micro_batch_size")
        if any(word in "".join(losses) for word in features.NOT_MEANS[1:]):
            drop("scope")
        if "stateful" in text or "batch_shape" in settings:
            drop("scope", "micro_batch_size", "curvature_batch_size", "growing_batch", "batch_size")
        for name, value in settings.items():
            self.features.add(f"{name} = {value}")

    @staticmethod
    def _has_one_target(text):
        return text.endswith(", 1))") or "[:-1]" in text

    def _chosen(self, *names):
        """Those of the settings that are not left out, as text of arguments."""
        return ", ".join(f"{name}={value}" for name, value in self._settings.items() if name in names)

    def _draw_actions(self, text):
        """What happens in the middle, and the property that is checked beside the products."""
        self.checks = ["loss_gradient_and_product", self._feature("check ", ["update", "resumed", "cases", "jacobian"])]
        if self.checks[1] == "jacobian" and not self.has_squares:
            self.checks[1] = "update"
        pause = change = "nothing"
        if self.checks[1] == "resumed":
            pause = self._feature("pause: ", features.PAUSES)
            if pause in ("save", "pickle") and (
                self._form == "subclassed" or "ambda" in text or "scope" in self._settings
            ):
                pause = "save_weights"
        if self.checks[1] == "update":
            change = self._feature("change: ", features.CHANGES)
            if change == "weight_decay" and "weight_decay" not in self._settings:
                change = "damping"
            if change == "more cases" and ("stateful" in text or "batch_shape" in self._settings):
                change = "targets"
        return pause, change

    def _network_input(self, x):
        dtype = x.dtype.name if x.dtype.kind == "i" else None
        fixed = {"batch_shape": x.shape} if "batch_shape" in self._settings else {"shape": x.shape[1:]}
        return keras.Input(**fixed, dtype=dtype)

    def _head(self, h, sizes):
        """The last layers and the loss of an output: text of top and of its call, targets, cut, loss."""
        loss = self._feature("", LOSSES)
        activation, targets, cut, least = LOSSES[loss]
        width = max(least, int(self._one_of("123")))
        self._layers.append(f"L.Dense({width})")
        self._built.append(keras.layers.Dense(width))
        self._built[-1](h)
        number = sum(line.startswith("z") for line in self._lines)
        self._lines.append(f"z{number} = l[{len(self._layers) - 1}](h)")
        targets = targets.format(shape=(sizes["N"], *h.shape[1:-1], width), width=width)
        return (f"L.Activation({activation!r})", f"tops[{number}](z{number})"), targets, cut, loss

    def _network(self, has_two_inputs):
        inputs = "inputs['a'], inputs['b']" if has_two_inputs else "inputs"
        fixed = "batch_shape=a.shape" if "batch_shape" in self._settings else "shape=a.shape[1:]"
        spec = f"keras.Input({fixed}, dtype=a.dtype.name if a.dtype.kind == 'i' else None)"
        inputs_line = f"inputs = keras.tree.map_structure(lambda a: {spec}, x)"
        if self._form == "sequential":
            return [inputs_line, "network = keras.Sequential([inputs, *l, tops[0]])"]
        if self._form == "functional":
            return [inputs_line, f"network = keras.Model(inputs, body({inputs}))"]
        return [
            "class Network(keras.Model):",
            "    def __init__(self):",
            "        super().__init__()",
            "        self.l, self.tops = l, tops",
            "",
            "    def call(self, inputs):",
            f"        return body({inputs})",
            "",
            "network = Network()",
            "network(x)",
        ]

    def _with(self, h, feature, other=None):
        """Adds a feature to the body, and returns the body's symbolic output; the same one where Keras does not take it."""
        text = re.sub(r"<(\w+)>", lambda s: str(h.shape[-1]) if s[1] == "width" else self._one_of(SLOTS[s[1]]), feature)
        expression, *parts = text.split(" | ") if " | " in text else ("@0(h)", text)
        parts = [part for part in parts if part]
        if self._form == "sequential" and expression != "@0(h)":
            return h
        expression = re.sub(r"@(\d)", lambda place: f"l[{len(self._layers) + int(place[1])}]", expression)
        names = {
            "keras": keras,
            "L": keras.layers,
            "tf": tf,
            "keras_hf": keras_hf,
            "h": h,
            "other": other,
            **vars(layers),
        }
        try:
            built = [eval(part, names) for part in parts]
            output = eval(expression, {**names, "l": [*self._built, *built]})
        except (ValueError, TypeError, IndexError, tf.errors.OpError):
            return h
        shape = output.shape[1:]
        if not shape or None in shape or not 0 < np.prod(shape) <= features.MOST_ENTRIES:
            return h
        self._built += built
        self._layers += parts
        self._lines.append(f"h = {expression}")
        self.features.add(re.sub(r"<\w+>", "*", feature))
        return output
