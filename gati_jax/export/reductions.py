"""JAX's products, convolutions, reductions, windows and look-ups as ONNX nodes, added to ``OPERATIONS`` on import."""

__all__ = ["OPERATIONS"]

import math
from collections.abc import Sequence

import numpy as np

from .operations import OPERATIONS, Equation, Node, Operand, Shape, Translation, dtype_of, named, onnx_kind, shape_of


def _wholes(tr: Translation, equation: Equation, operands: list[Operand]) -> list[Operand]:
    return [tr.whole(x, shape_of(v)) for x, v in zip(operands, equation.invars, strict=True)]


@named("dot_general")
def _product(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    """Order the axes as MatMul has them, [batch, rows, contracted] and [batch, contracted, columns]."""
    a, b = _wholes(tr, equation, operands)
    (summed_a, summed_b), (batch_a, batch_b) = equation.params["dimension_numbers"]
    free_a, free_b = _others(a.shape, batch_a, summed_a), _others(b.shape, batch_b, summed_b)
    if tr.open(tuple(a.shape[axis] for axis in summed_a)):
        tr.refuse("a sum over rows")
    batch = tuple(a.shape[axis] for axis in batch_a)
    rows, columns = tuple(a.shape[axis] for axis in free_a), tuple(b.shape[axis] for axis in free_b)
    inner = math.prod(a.shape[axis] for axis in summed_a)
    left = tr.transpose(a, (*batch_a, *free_a, *summed_a))
    right = tr.transpose(b, (*batch_b, *summed_b, *free_b))
    flat = math.prod(rows), math.prod(columns)
    keep = not batch and len(rows) > 0  # then MatMul takes any number of axes of rows
    left = tr.reshape(left, (*rows, inner) if keep else (*batch, flat[0], inner))
    right = tr.reshape(right, (*batch, inner, flat[1]))
    shape = (*rows, flat[1]) if keep else (*batch, *flat)
    return tr.reshape(tr.add("MatMul", left, right, shape=shape), (*batch, *rows, *columns))


def _others(shape: Shape, *taken: Sequence[int]) -> tuple[int, ...]:
    return tuple(axis for axis in range(len(shape)) if not any(axis in axes for axes in taken))


@named("conv_general_dilated")
def _convolution(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    p, numbers = equation.params, equation.params["dimension_numbers"]
    if (
        any(n != 1 for n in p["lhs_dilation"])
        or p["batch_group_count"] != 1
        or min(min(p["padding"], default=(0,))) < 0
    ):
        tr.refuse("a transposed convolution, or one in groups of rows")
    x, kernel = _wholes(tr, equation, operands)
    low, high = zip(*p["padding"], strict=True)
    out = shape_of(equation.outvars[0])
    y = tr.add(
        "Conv",
        tr.transpose(x, numbers.lhs_spec),
        tr.transpose(kernel, numbers.rhs_spec),
        shape=tuple(out[axis] for axis in numbers.out_spec),
        strides=list(p["window_strides"]),
        pads=[*low, *high],
        dilations=list(p["rhs_dilation"]),
        group=p["feature_group_count"],
    )
    return tr.transpose(y, np.argsort(numbers.out_spec).tolist())


_REDUCTIONS = {
    "reduce_sum": "ReduceSum",
    "reduce_max": "ReduceMax",
    "reduce_min": "ReduceMin",
    "reduce_prod": "ReduceProd",
}


@named(*_REDUCTIONS, "reduce_and", "reduce_or")
def _reduction(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    (x,), axes, name = _wholes(tr, equation, operands), equation.params["axes"], equation.primitive.name
    if tr.open(tuple(x.shape[axis] for axis in axes)):
        tr.refuse(f"the operation {name} over rows")
    shape = shape_of(equation.outvars[0])
    if name in _REDUCTIONS:
        return tr.add(_REDUCTIONS[name], x, np.array(axes, np.int64), shape=shape, keepdims=0)
    kind = "ReduceMin" if name == "reduce_and" else "ReduceMax"
    whole = tr.add("Cast", x, shape=x.shape, to=onnx_kind(np.int32))
    return tr.add(
        "Cast",
        tr.add(kind, whole, np.array(axes, np.int64), shape=shape, keepdims=0),
        shape=shape,
        to=onnx_kind(np.bool_),
    )


@named("argmax", "argmin")
def _extreme(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    (x,), (axis,), shape = _wholes(tr, equation, operands), equation.params["axes"], shape_of(equation.outvars[0])
    if tr.open((x.shape[axis],)):
        tr.refuse(f"the operation {equation.primitive.name} over rows")
    kind = "ArgMax" if equation.primitive.name == "argmax" else "ArgMin"
    found = tr.add(kind, x, shape=shape, axis=axis, keepdims=0)
    return tr.add("Cast", found, shape=shape, to=onnx_kind(equation.params["index_dtype"]))


@named("cumsum")
def _running_sum(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    (x,), axis = _wholes(tr, equation, operands), equation.params["axis"]
    if tr.open((x.shape[axis],)):
        tr.refuse("a sum over rows")
    return tr.add("CumSum", x, np.array(axis, np.int64), shape=x.shape, reverse=int(equation.params["reverse"]))


@named("top_k")
def _largest(tr: Translation, equation: Equation, operands: list[Operand]) -> list[Operand]:
    (x,), k, (values, index) = _wholes(tr, equation, operands), equation.params["k"], equation.outvars
    shape = shape_of(values)
    found, at = tr.add_node("TopK", x, np.array([k], np.int64), shapes=[shape, shape], axis=len(shape) - 1)
    return [found, tr.add("Cast", at, shape=shape, to=onnx_kind(dtype_of(index)))]


@named("reduce_window_max", "reduce_window_sum")
def _window(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    """Move the window's axes behind the batch and one other axis, as pooling has them."""
    (x,), p, out = _wholes(tr, equation, operands), equation.params, shape_of(equation.outvars[0])
    window, strides, padding = p["window_dimensions"], p["window_strides"], p["padding"]
    moves = [axis for axis in range(len(window)) if (window[axis], strides[axis], padding[axis]) != (1, 1, (0, 0))]
    still = [axis for axis in range(len(window)) if axis not in moves]
    if tr.open(tuple(x.shape[axis] for axis in moves)) or any(n != 1 for n in p["base_dilation"]) or not still:
        tr.refuse("a window over rows, or between the elements of an axis")
    order = (*still, *moves)
    positions = tuple(x.shape[axis] for axis in moves)
    lead = tuple(x.shape[axis] for axis in still)
    flat = tr.reshape(tr.transpose(x, order), (lead[0], math.prod(lead[1:]), *positions))
    sizes = [window[axis] for axis in moves]
    low, high = zip(*(padding[axis] for axis in moves), strict=True)
    shape = (lead[0], math.prod(lead[1:]), *(out[axis] for axis in moves))
    given = {"kernel_shape": sizes, "strides": [strides[axis] for axis in moves], "pads": [*low, *high]}
    spread = [p["window_dilation"][axis] for axis in moves]
    if equation.primitive.name == "reduce_window_max":
        y = tr.add("MaxPool", flat, shape=shape, dilations=spread, **given)
    else:
        if any(n != 1 for n in spread):
            tr.refuse("a sum over a window with gaps")
        mean = tr.add("AveragePool", flat, shape=shape, count_include_pad=1, **given)
        y = tr.add("Mul", mean, np.array(math.prod(sizes), np.float32), shape=shape)
    return tr.transpose(tr.reshape(y, tuple(out[axis] for axis in order)), np.argsort(order).tolist())


@named("gather")
def _lookup(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    (x, index), p, out = _wholes(tr, equation, operands), dict(equation.params), shape_of(equation.outvars[0])
    numbers, sizes = p["dimension_numbers"], tuple(p["slice_sizes"])
    if isinstance(index, np.ndarray) and tr.open(x.shape[:1]) and sizes[0] == x.shape[0]:
        # Known places, the same in every row: where in a row is each element of the result?
        one = np.arange(math.prod(x.shape[1:]), dtype=np.int32).reshape(1, *x.shape[1:])
        p |= {"slice_sizes": (1, *sizes[1:]), "fill_value": -1}
        places = np.asarray(equation.primitive.bind(one, index, **p))
        if places.min(initial=0) < 0 or len(places) != 1 or not tr.open(out[:1]):
            tr.refuse("the operation gather beyond an axis, or that moves rows")
        flat = tr.reshape(x, (x.shape[0], one.size))
        found = tr.add("Gather", flat, places.ravel().astype(np.int64), shape=(x.shape[0], places.size), axis=1)
        return tr.reshape(found, out)
    rest = tuple(range(len(out) - len(x.shape) + 1, len(out)))
    plain = numbers.offset_dims == rest and numbers.collapsed_slice_dims == numbers.start_index_map == (0,)
    if tr.open(x.shape) or not plain or sizes != (1, *x.shape[1:]):
        tr.refuse("the operation gather, but for rows of a table and known places")
    return tr.add("Gather", x, tr.reshape(index, index.shape[:-1]), shape=out, axis=0)


@named("dynamic_slice")
def _known_slice(tr: Translation, equation: Equation, operands: list[Operand]) -> Operand:
    x, *starts = operands
    shape, sizes = shape_of(equation.invars[0]), equation.params["slice_sizes"]
    if any(isinstance(start, Node) for start in starts):
        tr.refuse("the operation dynamic_slice from a place that the input says")
    begin = [min(max(int(start), 0), n - size) for start, n, size in zip(starts, shape, sizes, strict=True)]  # pyright: ignore[reportArgumentType]
    axes = [axis for axis, n in enumerate(shape) if sizes[axis] != n]
    if tr.open(tuple(shape[axis] for axis in axes)):
        tr.refuse("a choice of rows")
    bounds = [np.array(v, np.int64) for v in ([begin[a] for a in axes], [begin[a] + sizes[a] for a in axes], axes)]
    x = tr.whole(x, shape)
    return tr.add("Slice", x, *bounds, shape=shape_of(equation.outvars[0])) if axes else x
