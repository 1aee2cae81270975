"""Convolution algorithms: which one is fastest depends on the shape, the batch and the device.

- ``direct``: the compiler's own convolution.
- ``im2col``: the patches of the input, written out, times the kernel: one large matrix product.
- ``winograd2``, ``winograd4``: Winograd's F(2x2, 3x3) and F(4x4, 3x3) (Lavin and Gray, arXiv:1509.09308): 2.25 and 4
  times fewer products, for more memory. Only for 3x3 kernels at stride 1.

A kernel is stored in the form that its algorithm takes, transformed once (``store``), so that only the products are
left when a request comes. All pad explicitly, kernel // 2 on each side. ``convolve_cpu`` is for training only.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Algorithm = Literal["direct", "im2col", "winograd2", "winograd4"]
ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)

Activation = Float[Array, "batch height width in"]
Kernel = Float[Array, "kernel kernel in out"]
Output = Float[Array, "batch h w out"]
_Matrix = Float[np.ndarray, "rows columns"]

# Input, kernel and output transforms, by output tile.
_INPUT: dict[int, _Matrix] = {
    2: np.array([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], np.float32),
    4: np.array(
        [
            [4, 0, -5, 0, 1, 0],
            [0, -4, -4, 1, 1, 0],
            [0, 4, -4, -1, 1, 0],
            [0, -2, -1, 2, 1, 0],
            [0, 2, -1, -2, 1, 0],
            [0, 4, 0, -5, 0, 1],
        ],
        np.float32,
    ),
}
_KERNEL: dict[int, _Matrix] = {
    2: np.array([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], np.float32),
    4: np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], np.float32) / np.float32(24),
}
_OUTPUT: dict[int, _Matrix] = {
    2: np.array([[1, 1, 1, 0], [0, 1, -1, -1]], np.float32),
    4: np.array([[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]], np.float32),
}


def applicable(kernel: int, stride: int) -> tuple[Algorithm, ...]:
    """Return the algorithms that can do a convolution of this kernel size and stride."""
    return ALGORITHMS if kernel == 3 and stride == 1 else ("direct", "im2col")  # noqa: PLR2004


class Layer(NamedTuple):
    """One convolution of a network."""

    kernel: int
    stride: int
    inputs: int
    outputs: int
    height: int  # of its input
    width: int
    path: tuple[str, ...]  # to its parameters in those of its block

    @property
    def kind(self) -> str:
        """What its speed depends on; layers of one kind share an algorithm."""
        return f"{self.kernel}x{self.kernel}/{self.stride} {self.inputs}-{self.outputs} {self.height}x{self.width}"

    @property
    def applicable(self) -> tuple[Algorithm, ...]:
        """The algorithms that can do it."""
        return applicable(self.kernel, self.stride)


def stored_shape(shape: tuple[int, int, int, int], algorithm: Algorithm) -> tuple[int, ...]:
    """Return the shape in which a kernel of ``shape``, [height, width, in, out], is stored."""
    height, width, inputs, outputs = shape
    if algorithm == "direct":
        return shape
    if algorithm == "im2col":
        return (height * width * inputs, outputs)
    return ((_tile(algorithm) + 2) ** 2, inputs, outputs)


def store(kernel: Float[Array | np.ndarray, "height width in out"], algorithm: Algorithm) -> Float[np.ndarray, "..."]:
    """Return a kernel in the form that its algorithm takes."""
    array = np.asarray(kernel)
    if algorithm in {"direct", "im2col"}:
        height, width, inputs, outputs = array.shape
        return array.reshape(stored_shape((height, width, inputs, outputs), algorithm))
    g = _KERNEL[_tile(algorithm)].astype(np.float64)
    points = np.einsum("ia,abck,jb->ijck", g, array.astype(np.float64), g, optimize=True)
    return points.reshape(-1, *array.shape[2:]).astype(array.dtype)


def convolve(x: Activation, stored: Float[Array, "..."], algorithm: Algorithm, kernel: int, stride: int) -> Output:
    """Convolve by the algorithm that a kernel x kernel convolution was stored for, see ``store``."""
    if algorithm == "direct":
        return _direct(x, stored, stride)
    if algorithm == "im2col":
        return _im2col(x, stored, kernel, stride)
    return _winograd(x, stored, _tile(algorithm))


def _tile(algorithm: Algorithm) -> int:
    return int(algorithm.removeprefix("winograd"))


def _direct(x: Activation, kernel: Kernel, stride: int) -> Output:
    pad, numbers = kernel.shape[0] // 2, ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, kernel, (stride, stride), [(pad, pad)] * 2, dimension_numbers=numbers)


def _im2col(x: Activation, matrix: Float[Array, "patch out"], kernel: int, stride: int) -> Output:
    batch, height, width, _ = x.shape
    pad = kernel // 2
    rows, columns = ((size + 2 * pad - kernel) // stride + 1 for size in (height, width))
    x = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    flat = jnp.concatenate(patches(x, (kernel, kernel), (rows, columns), stride), -1).reshape(-1, matrix.shape[0])
    return (flat @ matrix).reshape(batch, rows, columns, -1)


def patches(x: Activation, kernel: tuple[int, int], output: tuple[int, int], stride: int) -> list[Array]:
    """Return, for each position of a kernel, the inputs [batch, rows, columns, in] under it; ``x`` is padded."""
    rows, columns = ((n - 1) * stride + 1 for n in output)
    return [x[:, i : i + rows : stride, j : j + columns : stride] for i in range(kernel[0]) for j in range(kernel[1])]


def _winograd(x: Activation, stored: Float[Array, "points in out"], tile: int) -> Output:
    batch, height, width, channels = x.shape
    n, dtype = tile + 2, x.dtype
    rows, columns = -(-height // tile), -(-width // tile)  # of tiles
    x = jnp.pad(x, ((0, 0), (1, 1 + rows * tile - height), (1, 1 + columns * tile - width), (0, 0)))
    x = x.astype(jnp.float32)  # the transforms add and subtract large numbers
    by_row = _combine(_INPUT[tile], [x[:, i : i + (rows - 1) * tile + 1 : tile] for i in range(n)])
    points = [
        point.reshape(-1, channels).astype(dtype)
        for line in by_row
        for point in _combine(_INPUT[tile], [line[:, :, j : j + (columns - 1) * tile + 1 : tile] for j in range(n)])
    ]
    products = jnp.einsum("pnc,pck->pnk", jnp.stack(points), stored, preferred_element_type=jnp.float32)
    grid = products.reshape(n, n, batch, rows, columns, -1)
    by_row = [_combine(_OUTPUT[tile], [grid[i, j] for i in range(n)]) for j in range(n)]
    tiles = [_combine(_OUTPUT[tile], [by_row[j][i] for j in range(n)]) for i in range(tile)]
    y = jnp.stack([jnp.stack(line, axis=3) for line in tiles], axis=2)  # [batch, rows, tile, columns, tile, out]
    return y.reshape(batch, rows * tile, columns * tile, -1)[:, :height, :width].astype(dtype)


def _combine(matrix: _Matrix, parts: Sequence[Array]) -> list[Array]:
    """Return ``matrix @ parts`` written out: most entries are 0, 1 or -1, and need no product."""
    return [
        functools.reduce(
            operator.add, (_times(float(factor), part) for factor, part in zip(row, parts, strict=True) if factor)
        )
        for row in matrix
    ]


def _times(factor: float, part: Array) -> Array:
    return part if factor == 1 else -part if factor == -1 else factor * part


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolve_cpu(x: Activation, kernel: Kernel, stride: int) -> Output:
    """Convolve as "direct" does, with a gradient that is fast inside a loop on a CPU; for square kernels of odd size.

    XLA computes the gradient of a kernel as a convolution whose "kernel" is as large as the image. Inside a
    ``lax.scan`` that runs as plain nested loops, thirty times slower than outside (jax 0.10.2: 341 against 11 ms for 32
    images of 32x32x16, measured on two cores). Here it is one matrix product for each position of the kernel: 13 ms
    inside a scan as well.
    """
    return _direct(x, kernel, stride)


def _forward(x: Activation, kernel: Kernel, stride: int) -> tuple[Output, tuple[Activation, Kernel]]:
    return convolve_cpu(x, kernel, stride), (x, kernel)


def _backward(stride: int, residuals: tuple[Activation, Kernel], dy: Output) -> tuple[Activation, Kernel]:
    x, kernel = residuals
    return _of_input(x.shape, kernel, dy, stride), _of_kernel(x, kernel.shape, dy, stride)


def _of_input(shape: Sequence[int], kernel: Kernel, dy: Output, stride: int) -> Activation:
    """Return the gradient of the input: the mirrored kernel over ``dy``, dilated by the stride."""
    spread = [(0, size - (n - 1) * stride - 1, stride - 1) for size, n in zip(shape[1:3], dy.shape[1:3], strict=True)]
    wide = jax.lax.pad(dy, jnp.zeros((), dy.dtype), ((0, 0, 0), *spread, (0, 0, 0)))
    return convolve_cpu(wide, kernel[::-1, ::-1].transpose(0, 1, 3, 2), 1)


def _of_kernel(x: Activation, shape: Sequence[int], dy: Output, stride: int) -> Kernel:
    """Return the gradient of the kernel: for each of its positions, the inputs under it times ``dy``."""
    pad = shape[0] // 2
    padded = jnp.pad(x, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    flat = dy.reshape(-1, dy.shape[-1])
    parts = patches(padded, (shape[0], shape[1]), (dy.shape[1], dy.shape[2]), stride)
    return jnp.stack([part.reshape(-1, x.shape[-1]).T @ flat for part in parts]).reshape(*shape)


convolve_cpu.defvjp(_forward, _backward)


def convolution_of(stride: int) -> Callable[..., Array] | None:
    """Return the ``conv_general_dilated`` that ``nn.Conv`` trains with here; None for the compiler's own."""
    if jax.default_backend() != "cpu":
        return None

    def convolve(x: Array, kernel: Array, *_: object, **__: object) -> Array:
        return convolve_cpu(x, kernel, stride)

    return convolve
