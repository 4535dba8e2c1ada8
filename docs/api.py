"""Writes docs/api.md, the reference of all public names, from their signatures and docstrings.

Run from the root of the repository: `python -m docs.api`. A test holds the page against what this would write.
"""

import enum
import inspect
import re
import textwrap
from pathlib import Path

import keras_hf
from keras_hf import pinn, plots

PATH = Path(__file__).with_name("api.md")

INTRODUCTION = """\
# Reference

Every public name, from its docstring. `python -m docs.api` writes this page: to change it, change the docstring.

Methods that only Keras calls (`build`, `call`, `get_config` and the like) are left out, and so are those that mean what they mean in the base class.
"""

# Headings and what stands under them; a new public name goes into one of them. Names are attributes of keras_hf.
SECTIONS = {
    "Model and optimizer": ["HFModel", "HessianFree", "LossFunction", "ParameterCovariance"],
    "Damping rules": ["LevenbergMarquardt", "ArcStepDamping", "ConstantDamping", "DampingCallback"],
    "Cases of an update": ["GrowingBatch"],
    "Recurrent networks": ["StructuralDamping", "InitialState"],
    "Curvatures": [
        "GaussNewton",
        "Hessian",
        "EmpiricalFisher",
        "FiniteDifferenceHessian",
        "DoubleBackward",
        "ForwardAccumulation",
    ],
    "Solvers": ["ConjugateGradient", "DirectSolver", "PreconditionedMomentum", "recipe_of_2010"],
    "Preconditioners": ["KroneckerFactored", "EmpiricalFisherDiagonal", "Nystrom", "Identity"],
    "Stopping rules of conjugate gradients": ["RelativeProgress", "ResidualTolerance"],
    "Conjugate gradients": ["conjugate_gradient", "CGResult", "CGStop"],
    "Physics-informed networks": ["pinn.PINN", "pinn.derivatives"],
    "Initialization": ["SparseNormal"],
    "Records and figures": ["UpdateRecorder", "read_updates", "recorder.update_cost", "plots.plot_updates"],
    "Bases of parts": [
        "common.part.Part",
        "solvers.solver.Solver",
        "solvers.solver.Path",
        "solvers.solver.LocalModel",
        "solvers.search.Taken",
        "solvers.search.walk_back",
        "solvers.stopping.StoppingRule",
        "solvers.preconditioners.Preconditioner",
        "problem.curvature.Curvature",
        "problem.linearization.Linearization",
    ],
}
# What Keras calls, not the user.
_OF_KERAS = {
    "apply",
    "build",
    "call",
    "compile_from_config",
    "from_config",
    "get_config",
    "losses",
    "make_train_function",
    "set_model",
    "set_params",
    "train_step",
}
_HEADS = {
    "Args": "Arguments",
    "Attributes": "Attributes",
    "Returns": "Returns",
    "Raises": "Raises",
    "Example": "Example",
    "References": "References",
}
_WIDTH = 118


def document():
    """Returns the text of the page.

    Raises:
        ValueError: If a public name stands under no heading.
    """
    listed = [name for names in SECTIONS.values() for name in names]
    if missing := sorted(_public_names() - set(listed)):
        raise ValueError(f"Every public name must stand in `SECTIONS` of docs/api.py. Missing: {', '.join(missing)}.")
    contents = [
        f"- [{title}](#{_slug(title)}): {', '.join(f'[`{name}`](#{_slug(_full(name))})' for name in names)}"
        for title, names in SECTIONS.items()
    ]
    parts = [INTRODUCTION, "\n".join(contents)]
    for title, names in SECTIONS.items():
        parts.append(f"## {title}")
        for name in names:
            parts += _entry(name)
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def main():
    """Writes the page."""
    PATH.write_text(document(), encoding="utf-8")


def _public_names():
    """What `keras_hf` exports, and what `keras_hf.plots` and `keras_hf.pinn` define."""
    exports = {name for name, value in vars(keras_hf).items() if name[0] != "_" and not inspect.ismodule(value)}
    beside = {
        f"{module.__name__.rpartition('.')[-1]}.{name}"
        for module in (plots, pinn)
        for name, value in vars(module).items()
        if name[0] != "_" and getattr(value, "__module__", None) == module.__name__
    }
    return exports | beside


def _full(name):
    return f"keras_hf.{name}"


def _entry(name):
    """Gives heading, signature, docstring and methods of a public name, a list of texts."""
    value = keras_hf
    for attribute in name.split("."):
        value = getattr(value, attribute)
    parts = [f"### `{_full(name)}`"]
    if not (inspect.isclass(value) and issubclass(value, enum.Enum)):
        parts.append(_signature(name.rpartition(".")[-1], value))
    parts.append(_markdown(value.__doc__))
    if not inspect.isclass(value):
        return parts
    if issubclass(value, enum.Enum):
        # What a member means stands behind it, as a comment.
        meanings = dict(re.findall(r"^ +(\w+) = \d+  # (.*)$", inspect.getsource(value), re.MULTILINE))
        parts.append("\n".join(f"- `{member.name} = {member.value}`: {meanings[member.name]}" for member in value))
        return parts
    for method, member in vars(value).items():
        function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
        is_own = inspect.isfunction(function) or isinstance(function, property)
        if is_own and function.__doc__ and method[0] != "_" and method not in _OF_KERAS:
            parts.append(f"#### `{value.__name__}.{method}`")
            if inspect.isfunction(function):
                parts.append(_signature(method, function, skip_first=not isinstance(member, staticmethod)))
            parts.append(_markdown(function.__doc__))
    return parts


def _signature(name, value, skip_first=False):
    """Gives the call of a function or class as a block of code."""
    if inspect.isclass(value):
        # Not of the class: Keras' layers take anything in `__new__`.
        if value.__init__ is not object.__init__:
            value, skip_first = value.__init__, True
        elif value.__new__ is not object.__new__:
            value, skip_first = value.__new__, True
        else:
            return f"```text\n{name}()\n```"
    signature = inspect.signature(value)
    parameters = [
        parameter.replace(annotation=inspect.Parameter.empty, default=_Shown.of(parameter.default))
        for parameter in list(signature.parameters.values())[int(skip_first) :]
    ]
    text = name + str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))
    lines = textwrap.wrap(text, _WIDTH, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return "```text\n" + "\n".join(lines) + "\n```"


class _Shown:
    """A default whose text is the same in every run: that of an object is its class, not its address."""

    def __init__(self, value):
        self._value = value

    @classmethod
    def of(cls, value):
        return value if value is inspect.Parameter.empty else cls(value)

    def __repr__(self):
        text = repr(self._value)
        return f"{type(self._value).__name__}()" if " at 0x" in text else text


def _markdown(docstring):
    """Gives a Google docstring as Markdown."""
    text = inspect.cleandoc(docstring)
    head = rf"^({'|'.join(_HEADS)}):$"
    body, *sections = re.split(head, text, flags=re.MULTILINE)
    parts = [_with_examples(body.strip("\n"))]
    for title, content in zip(sections[::2], sections[1::2], strict=True):
        content = textwrap.dedent(content.strip("\n"))
        if title in ("Args", "Attributes", "Raises"):
            content = _listed(content)
        parts.append(f"**{_HEADS[title]}**\n\n{_with_examples(content)}")
    return "\n\n".join(parts)


def _listed(content):
    """Makes a list of entries `name: text`, whose further lines are indented."""
    lines = []
    for line in content.splitlines():
        entry = re.match(r"(\*{0,2}[\w.]+): (.*)", line)
        lines.append(f"- `{entry[1]}`: {entry[2]}" if entry else f"  {line.strip()}".rstrip())
    return "\n".join(lines)


def _with_examples(text):
    """Fences what begins with a prompt of Python, up to the next empty line."""
    return re.sub(
        r"^>>> .*?(?=\n\n|\Z)", lambda match: f"```pycon\n{match[0]}\n```", text, flags=re.DOTALL | re.MULTILINE
    )


def _slug(title):
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")


if __name__ == "__main__":
    main()
