"""Functions of JAX as ONNX nodes: a block of a user's own chain, or a head of their own, is traced and translated.

Parameters are constants, and what depends on them alone is computed here. The batch stays open: a function is traced
for a number of rows that is a prime, so that an axis of that size is the batch, and a multiple of it the batch with
other axes folded in. What depends on the number of rows otherwise comes out another way for another prime, and is
refused; so is, by name, every operation without an ONNX form.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from gati_jax.errors import InputError, describe_failure

from .graph import Graph, Value
from .operations import ELEMENTWISE, Equation, Node, Operand, Translation, dtype_of, shape_of
from .reductions import OPERATIONS  # with its own added

_PRIMES = 65_521, 65_519
_INLINED = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # of jit, custom_jvp_call, custom_vjp_call, remat
_LOOPS = ("while", "scan", "cond")  # which have such parameters, too
_DTYPES = ("float32", "int32", "int64", "uint8", "bool")


def emit_function(
    g: Graph,
    function: Callable[[Any, Any], Any],
    params: Any,  # noqa: ANN401 (a pytree)
    x: Value,
    *,
    where: str,
    dtype: Any = np.float32,  # noqa: ANN401 (anything that NumPy takes)
) -> Value:
    """Add the nodes of a function of parameters and a batch, whose input and output have channels last.

    Args:
        g: Where to.
        function: ``function(params, x[batch, ...]) -> y[batch, ...]``, pure.
        params: Its parameters, as NumPy arrays.
        x: Its input, channels first.
        where: What the function is, for messages.
        dtype: Of its input.

    Returns:
        Its output, channels first.

    Raises:
        InputError: It has an operation without an ONNX form, or depends on the number of rows.
    """
    params = jax.tree.map(jnp.asarray, params)  # a NumPy array cannot be indexed by what is traced
    other = Graph(g.prefix, [*g.nodes], [*g.constants])
    found, _ = (
        _emit(to, functools.partial(function, params), x, n, where, dtype)
        for to, n in zip((g, other), _PRIMES, strict=True)
    )
    if (g.nodes, g.constants) != (other.nodes, other.constants):
        got = "a number that depends on the number of rows"
        raise InputError(f"bundle: expected functions that ONNX can express, got {got} in {where}")
    return found


def _emit(g: Graph, function: Callable[[Any], Any], x: Value, rows: int, where: str, dtype: Any) -> Value:  # noqa: ANN401
    channels, *positions = x.shape
    spec = jax.ShapeDtypeStruct((rows, *positions, channels), dtype)
    try:
        traced, result = jax.make_jaxpr(function, return_shape=True)(spec)
    except Exception as error:
        raise InputError(f"bundle: {where} cannot be traced for ONNX: {describe_failure(error)}") from error
    if not isinstance(result, jax.ShapeDtypeStruct) or result.shape[:1] != (rows,):
        raise InputError(f"bundle: expected functions that return an array with a row for each input, got {where}")
    first = Node(x.name, (rows, *x.shape))
    tr = Translation(g, rows, first, where)
    (out,) = _run(tr, traced.jaxpr, traced.consts, [tr.transpose(first, (0, *range(2, len(first.shape)), 1))])
    last = len(result.shape) - 1
    y = tr.transpose(tr.node(out, result.shape), (0, *((last,) if last else ()), *range(1, last)))
    return Value(tr.node(y, y.shape).name, y.shape[1:])


def _run(tr: Translation, jaxpr: Jaxpr, consts: Sequence[Any], inputs: Sequence[Operand]) -> list[Operand]:
    known = [np.asarray(value) for value in consts]
    values: dict[Any, Operand] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*known, *inputs), strict=True))

    def read(variable: Any) -> Operand:  # noqa: ANN401
        if not isinstance(variable, Literal):
            return values[variable]
        return np.asarray(variable.val, dtype_of(variable))

    for equation in jaxpr.eqns:
        found = _apply(tr, equation, [read(variable) for variable in equation.invars])
        values.update(zip(equation.outvars, found, strict=True))
    return [read(variable) for variable in jaxpr.outvars]


def _apply(tr: Translation, equation: Equation, operands: list[Operand]) -> list[Operand]:
    name = equation.primitive.name
    inner = next((equation.params[key] for key in _INLINED if key in equation.params and name not in _LOOPS), None)
    if inner is not None:
        closed = isinstance(inner, ClosedJaxpr)
        return _run(tr, inner.jaxpr if closed else inner, inner.consts if closed else (), operands)
    if name == "iota":
        return [_iota(tr, equation)]
    if all(isinstance(x, np.ndarray) for x in operands) and (found := _computed(tr, equation, operands)) is not None:
        return found
    operation = ELEMENTWISE.get(name) or OPERATIONS.get(name)
    if operation is None:
        tr.refuse(f"the operation {name}")
    for variable in (*equation.invars, *equation.outvars):
        if (dtype := str(dtype_of(variable))) not in _DTYPES:
            tr.refuse(f"the operation {name} of {dtype}")
    found = operation(tr, equation, operands)
    return found if isinstance(found, list) else [found]


def _computed(tr: Translation, equation: Equation, operands: list[Any]) -> list[Operand] | None:
    """Return what an operation gives for known operands; None if its result has the batch."""
    if equation.primitive.name in ELEMENTWISE:
        operands = [*np.broadcast_arrays(*operands)]
    elif any(tr.open(shape_of(variable)) for variable in (*equation.invars, *equation.outvars)):
        return None
    else:
        operands = [np.broadcast_to(x, shape_of(v)) for x, v in zip(operands, equation.invars, strict=True)]
    found = equation.primitive.bind(*operands, **equation.params)
    return [np.asarray(value) for value in (found if equation.primitive.multiple_results else [found])]


def _iota(tr: Translation, equation: Equation) -> np.ndarray:
    p = equation.params
    if tr.open((p["shape"][p["dimension"]],)):
        tr.refuse("a count of rows")
    shape = [1] * len(p["shape"])
    shape[p["dimension"]] = -1
    return np.arange(p["shape"][p["dimension"]], dtype=p["dtype"]).reshape(shape)
