"""JAX's operations as ONNX nodes, one function for each kind, in the table ``OPERATIONS``.

An operand is an array that is known already, or a node's output. Either may have axes of 1 where the operation has
longer ones: arithmetic broadcasts them, and what cannot asks for ``Translation.whole``.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, NoReturn

import numpy as np
from jax.extend.core import JaxprEqn as Equation
from numpy.typing import DTypeLike
from onnx import helper

from gati_jax.errors import InputError

from .graph import Graph, Value

Shape = tuple[int, ...]


class Node(NamedTuple):
    """The output of a node."""

    name: str
    shape: Shape  # whole, with the batch


Operand = np.ndarray | Node


@dataclasses.dataclass(frozen=True)
class Translation:
    """A function whose nodes are being added to a graph."""

    graph: Graph
    rows: int
    """Stands for the number of rows in shapes: an axis that it divides is the batch, with others folded in or not."""
    batch: Node
    """Of which the first axis is the batch."""
    where: str
    """What is translated, for messages."""

    def refuse(self, why: str) -> NoReturn:
        """Say what cannot be expressed."""
        raise InputError(f"bundle: expected functions that ONNX can express, got {why} in {self.where}")

    def open(self, shape: Shape) -> bool:
        """Return whether the batch is among these axes."""
        return any(size and size % self.rows == 0 for size in shape)

    def add(self, kind: str, *inputs: Operand, shape: Shape, **attributes: Any) -> Node:  # noqa: ANN401
        """Add a node with one output."""
        return self.add_node(kind, *inputs, shapes=[shape], **attributes)[0]

    def add_node(self, kind: str, *inputs: Operand, shapes: Sequence[Shape], **attributes: Any) -> list[Node]:  # noqa: ANN401
        """Add a node with several outputs."""
        values = [Value(x.name, ()) if isinstance(x, Node) else self.graph.constant(x, x.dtype) for x in inputs]
        found = self.graph.add_node(kind, *values, outputs=len(shapes), **attributes)
        return [Node(value.name, tuple(shape)) for value, shape in zip(found, shapes, strict=True)]

    def reshape(self, x: Operand, shape: Shape) -> Operand:
        """Bring an operand of as many elements into a shape."""
        if x.shape == shape:
            return x
        if isinstance(x, np.ndarray):
            return x.reshape(shape)
        sizes = [-1 if self.open((size,)) else size for size in shape]
        return self.add("Reshape", x, np.array(sizes, np.int64), shape=shape, allowzero=0 if 0 not in sizes else 1)

    def transpose(self, x: Operand, order: Sequence[int]) -> Operand:
        """Order the axes."""
        order = tuple(int(axis) for axis in order)
        if order == tuple(range(len(order))):
            return x
        if isinstance(x, np.ndarray):
            return x.transpose(order)
        return self.add("Transpose", x, shape=tuple(x.shape[axis] for axis in order), perm=order)

    def whole(self, x: Operand, shape: Shape) -> Operand:
        """Repeat what has axes of 1 where the operation has longer ones."""
        if x.shape == shape:
            return x
        if isinstance(x, np.ndarray) and not self.open(shape):
            return np.broadcast_to(x, shape)
        sizes: Operand = np.array(shape, np.int64)
        if self.open(shape):
            rows = self.add("Shape", self.batch, shape=(1,), start=0, end=1)
            parts = [self._size(rows, size) if self.open((size,)) else np.array([size]) for size in shape]
            sizes = self.add("Concat", *parts, shape=(len(shape),), axis=0)
        return self.add("Expand", x, sizes, shape=shape)

    def _size(self, rows: Node, size: int) -> Node:
        return rows if size == self.rows else self.add("Mul", rows, np.array([size // self.rows]), shape=(1,))

    def node(self, x: Operand, shape: Shape) -> Node:
        """Return a node with an operand in its whole shape."""
        x = self.whole(x, shape)
        return x if isinstance(x, Node) else self.add("Identity", x, shape=shape)


Operation = Callable[[Translation, Equation, list[Operand]], Operand | list[Operand]]
"""Of the translation, the equation and its operands."""
OPERATIONS: dict[str, Operation] = {}
ELEMENTWISE: dict[str, Operation] = {}
"""Those whose operands may have axes of 1 where their result has longer ones."""


def named(*names: str, table: dict[str, Operation] = OPERATIONS) -> Callable[[Operation], Operation]:
    """Enter a function into a table under the names of JAX's operations."""

    def register(operation: Operation) -> Operation:
        table.update(dict.fromkeys(names, operation))
        return operation

    return register


def shape_of(variable: Any) -> Shape:  # noqa: ANN401 (JAX's variables and literals)
    """Return the shape that an equation gives a variable."""
    return tuple(variable.aval.shape)


def dtype_of(variable: Any) -> np.dtype:  # noqa: ANN401
    """Return the dtype that an equation gives a variable."""
    return variable.aval.dtype


# --- Element by element -----------------------------------------------------------------------------------------------

_KINDS = {
    "add": "Add", "add_any": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max", "min": "Min", "pow": "Pow",
    "neg": "Neg", "exp": "Exp", "log": "Log", "tanh": "Tanh", "logistic": "Sigmoid", "sqrt": "Sqrt", "abs": "Abs",
    "sign": "Sign", "floor": "Floor", "ceil": "Ceil", "erf": "Erf", "sin": "Sin", "cos": "Cos", "tan": "Tan",
    "asin": "Asin", "acos": "Acos", "atan": "Atan", "sinh": "Sinh", "cosh": "Cosh", "asinh": "Asinh",
    "acosh": "Acosh", "atanh": "Atanh", "eq": "Equal", "lt": "Less", "le": "LessOrEqual", "gt": "Greater",
    "ge": "GreaterOrEqual",
}  # fmt: skip
_SAME = ("stop_gradient", "copy", "copy_p", "sharding_constraint", "optimization_barrier", "name", "pvary")
_ONE, _TWO = np.array(1, np.float32), np.array(2, np.float32)


def _broadcast(tr: Translation, kind: str, *inputs: Operand) -> Node:
    return tr.add(kind, *inputs, shape=np.broadcast_shapes(*(x.shape for x in inputs)))


@named(*_KINDS, table=ELEMENTWISE)
def _plain(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    kind = _KINDS[equation.primitive.name]
    known = [x for x in operands if isinstance(x, np.ndarray)]
    if kind == "Max" and known and not known[0].any() and known[0].dtype == np.float32:
        return _broadcast(tr, "Relu", *(x for x in operands if isinstance(x, Node)))  # which runtimes fuse
    if kind == "Sub" and isinstance(operands[1], np.ndarray) and operands[1].dtype == np.float32:
        return _broadcast(tr, "Add", operands[0], np.asarray(-operands[1]))  # as they do this
    return _broadcast(tr, kind, *operands)


@named(*_SAME, table=ELEMENTWISE)
def _same(tr: Translation, equation: Equation, operands: list[Operand]) -> list[Operand]:
    del tr, equation
    return operands


_COMPOSED: dict[str, Callable[[Callable[..., Node], Operand], Node]] = {
    "square": lambda node, x: node("Mul", x, x),
    "rsqrt": lambda node, x: node("Div", _ONE, node("Sqrt", x)),
    "log1p": lambda node, x: node("Log", node("Add", x, _ONE)),
    "expm1": lambda node, x: node("Sub", node("Exp", x), _ONE),
    "exp2": lambda node, x: node("Pow", _TWO, x),
    "erfc": lambda node, x: node("Sub", _ONE, node("Erf", x)),
    "is_finite": lambda node, x: node("Not", node("Or", node("IsNaN", x), node("IsInf", x))),
}


@named(*_COMPOSED, table=ELEMENTWISE)
def _composed(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    return _COMPOSED[equation.primitive.name](functools.partial(_broadcast, tr), operands[0])


@named("integer_pow", table=ELEMENTWISE)
def _power(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    (x,), power = operands, equation.params["y"]
    return _broadcast(tr, "Mul", x, x) if power == 2 else _broadcast(tr, "Pow", x, np.array(power, np.float32))  # noqa: PLR2004


@named("ne", table=ELEMENTWISE)
def _unequal(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    del equation
    return _broadcast(tr, "Not", _broadcast(tr, "Equal", *operands))


@named("and", "or", "xor", "not", table=ELEMENTWISE)
def _logical(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    if dtype_of(equation.outvars[0]) != np.bool_:
        tr.refuse(f"the operation {equation.primitive.name} of integers")
    return _broadcast(tr, equation.primitive.name.capitalize(), *operands)


@named("select_n", table=ELEMENTWISE)
def _select(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    if len(operands) != 3 or dtype_of(equation.invars[0]) != np.bool_:  # noqa: PLR2004
        tr.refuse("the operation select_n of more than two cases")
    return _broadcast(tr, "Where", operands[0], operands[2], operands[1])


@named("clamp", table=ELEMENTWISE)
def _clamp(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    del equation
    low, x, high = operands
    return _broadcast(tr, "Min", _broadcast(tr, "Max", x, low), high)


@named("convert_element_type", table=ELEMENTWISE)
def _cast(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    return tr.add("Cast", *operands, shape=operands[0].shape, to=onnx_kind(equation.params["new_dtype"]))


def onnx_kind(dtype: DTypeLike) -> int:
    """Return ONNX's number of a dtype."""
    return helper.np_dtype_to_tensor_dtype(np.dtype(dtype))


# --- Shapes -----------------------------------------------------------------------------------------------------------


@named("reshape")
def _reshape(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    if equation.params["dimensions"] is not None:
        tr.refuse("the operation reshape with an order of its own")
    return tr.reshape(tr.whole(operands[0], shape_of(equation.invars[0])), shape_of(equation.outvars[0]))


@named("squeeze")
def _squeeze(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    gone = equation.params["dimensions"]
    return tr.reshape(operands[0], tuple(n for axis, n in enumerate(operands[0].shape) if axis not in gone))


@named("broadcast_in_dim", "expand_dims")
def _broadcast_in_dim(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    shape = [1] * len(shape_of(equation.outvars[0]))
    for axis, size in zip(equation.params["broadcast_dimensions"], operands[0].shape, strict=True):
        shape[axis] = size
    return tr.reshape(operands[0], tuple(shape))  # repeated where that matters, see ``whole``


@named("transpose")
def _transpose(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    return tr.transpose(operands[0], equation.params["permutation"])


@named("concatenate")
def _concatenate(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    parts = [tr.whole(x, shape_of(v)) for x, v in zip(operands, equation.invars, strict=True)]
    axis = equation.params["dimension"]
    if tr.open(tuple(part.shape[axis] for part in parts)):
        tr.refuse("rows that are joined with others")
    return tr.add("Concat", *parts, shape=shape_of(equation.outvars[0]), axis=axis)


@named("stack")
def _stack(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    axis, shape = equation.params["axis"], shape_of(equation.outvars[0])
    one = tuple(1 if i == axis else size for i, size in enumerate(shape))
    wholes = [tr.whole(x, shape_of(v)) for x, v in zip(operands, equation.invars, strict=True)]
    return tr.add("Concat", *(tr.reshape(x, one) for x in wholes), shape=shape, axis=axis)


@named("unstack")
def _unstack(tr: Translation, equation: Equation, operands: list[Operand]) -> list[Operand]:
    axis, shape = equation.params["axis"], shape_of(equation.invars[0])
    if tr.open((shape[axis],)):
        tr.refuse("rows that are taken apart")
    one = tuple(1 if i == axis else size for i, size in enumerate(shape))
    x, sizes = tr.whole(operands[0], shape), np.ones(shape[axis], np.int64)
    parts = tr.add_node("Split", x, sizes, shapes=[one] * shape[axis], axis=axis)
    return [tr.reshape(part, shape_of(v)) for part, v in zip(parts, equation.outvars, strict=True)]


@named("tile")
def _tile(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    reps, shape = equation.params["reps"], shape_of(equation.invars[0])
    if all(n == 1 or size == 1 for n, size in zip(reps, shape, strict=True)):
        return operands[0]  # repeated where that matters
    if tr.open(reps):
        tr.refuse("the operation tile along rows")
    x = tr.whole(operands[0], shape)
    return tr.add("Tile", x, np.array(reps, np.int64), shape=shape_of(equation.outvars[0]))


@named("split")
def _split(tr: Translation, equation: Equation, operands: list[Operand]) -> list[Operand]:
    axis, sizes = equation.params["axis"], [int(size) for size in equation.params["sizes"]]
    x = tr.whole(operands[0], shape_of(equation.invars[0]))
    shapes = [shape_of(variable) for variable in equation.outvars]
    return [*tr.add_node("Split", x, np.array(sizes, np.int64), shapes=shapes, axis=axis)]


@named("slice")
def _slice(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    shape, p = shape_of(equation.invars[0]), equation.params
    starts, stops, steps = p["start_indices"], p["limit_indices"], p["strides"] or (1,) * len(shape)
    axes = [i for i, n in enumerate(shape) if (starts[i], stops[i], steps[i]) != (0, n, 1)]
    if tr.open(tuple(shape[axis] for axis in axes)):
        tr.refuse("a choice of rows")
    bounds = [np.array([v[axis] for axis in axes], np.int64) for v in (starts, stops, range(len(shape)), steps)]
    x = tr.whole(operands[0], shape)
    return tr.add("Slice", x, *bounds, shape=shape_of(equation.outvars[0])) if axes else x


@named("rev")
def _reverse(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    axes, shape = equation.params["dimensions"], shape_of(equation.invars[0])
    if tr.open(tuple(shape[axis] for axis in axes)):
        tr.refuse("rows in another order")
    ends, n = (-1, -(2**31)), len(axes)
    bounds = [np.array(v, np.int64) for v in ([ends[0]] * n, [ends[1]] * n, axes, [-1] * n)]
    return tr.add("Slice", tr.whole(operands[0], shape), *bounds, shape=shape)


@named("pad")
def _pad(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    low, high, inner = zip(*equation.params["padding_config"], strict=True)
    shape = shape_of(equation.invars[0])
    if (
        any(inner)
        or min(*low, *high) < 0
        or tr.open(tuple(n for n, a, b in zip(shape, low, high, strict=True) if a or b))
    ):
        tr.refuse("the operation pad inside of an axis, of rows, or by less than nothing")
    pads = np.array([*low, *high], np.int64)
    return tr.add("Pad", tr.whole(operands[0], shape), pads, operands[1], shape=shape_of(equation.outvars[0]))
