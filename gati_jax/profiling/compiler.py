"""Compiler options and drivers that tuning tries, and which of them this compiler has."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gati_jax.errors import InputError
from gati_jax.runtime import CompilerOptions

_LIBRARY = "xla_cpu_experimental_ynn_fusion_type"
_ONEDNN = "xla_cpu_experimental_onednn_custom_call"
_GRAPHS = "xla_gpu_enable_command_buffer"
_CAPTURED = "FUSION,CUBLAS,CUBLASLT,CUDNN,CUSTOM_CALL,DYNAMIC_SLICE_FUSION,CONVOLUTION,CONDITIONAL"
BRANCHES: CompilerOptions = ((_GRAPHS, _CAPTURED),)
"""On a GPU, capture operations and branches as CUDA graphs: all that is inside of a branch must be of these types."""
LOOPS: CompilerOptions = ((_GRAPHS, f"{_CAPTURED},WHILE"),)
"""Capture loops, too."""
OPTIONS: dict[str, tuple[CompilerOptions, ...]] = {
    "cpu": (
        (),
        ((_LIBRARY, "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"),),  # convolutions by the compiler itself
        ((_LIBRARY, "LIBRARY_FUSION_TYPE_INDIVIDUAL_CONVOLUTION,LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"),),
        ((_ONEDNN, "True"),),  # oneDNN, of which jaxlib 0.10.2 has none
    ),
    "gpu": ((), BRANCHES, LOOPS),
}
"""The compiler options that tuning tries, by platform."""
ROUNDED: CompilerOptions = (("xla_allow_excess_precision", "False"),)
"""Round where the program says so, whatever is fused: then programs of bfloat16 do not differ by what is in them."""
Driver = Literal["loop", "nest", "host"]
"""What takes a cascade's decisions: loops (around a switch, over tiles), a nest of two-way branches, or the host."""
DRIVERS: dict[str, tuple[tuple[Driver, CompilerOptions], ...]] = {
    "gpu": (("nest", BRANCHES), ("loop", LOOPS), ("host", BRANCHES)),
}
"""The drivers that tuning tries beside the loop, with their options, by platform."""


def known_options(options: CompilerOptions, platform: str) -> CompilerOptions:
    """Return options without the types of operations that this compiler cannot capture.

    Their names differ between versions of XLA.

    Raises:
        InputError: It refuses an option itself, or no type is left.
    """
    kept = []
    for name, value in options:
        given = value.split(",") if name == _GRAPHS else [value]
        accepted = [one for one in given if _accepts(platform, name, one)]
        if not accepted:
            raise InputError(f"options: expected those that this compiler has, got {name}={value}")
        kept.append((name, ",".join(accepted)))
    return tuple(kept)


@functools.cache
def _accepts(platform: str, name: str, value: str) -> bool:
    """Whether the compiler of the default device, which is of ``platform``, takes an option, and does what it says."""
    del platform  # part of the key
    try:
        program = jax.jit(_convolution, compiler_options={name: value}).lower(*_CONVOLVED).compile()
    except (jax.errors.JaxRuntimeError, ValueError, TypeError):
        return False
    # A compiler without oneDNN takes its option all the same.
    return name != _ONEDNN or '"__onednn' in (program.as_text() or "")


def _convolution(x: Float[Array, "n h w c"], kernel: Float[Array, "3 3 c o"]) -> Float[Array, "n h w o"]:
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


_CONVOLVED = (jax.ShapeDtypeStruct((1, 8, 8, 16), jnp.float32), jax.ShapeDtypeStruct((3, 3, 16, 16), jnp.float32))


def are_tried(options: CompilerOptions, platform: str) -> bool:
    """Whether tuning tries these options, or tries to capture these types of operations among others."""
    tried = OPTIONS.get(platform, ())
    if options in tried or not options:
        return True
    ((name, value), *more), all_types = options, LOOPS[0][1].split(",")
    types = value.split(",")
    return LOOPS in tried and not more and name == _GRAPHS and types == [one for one in all_types if one in types]
