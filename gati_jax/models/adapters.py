"""Chains from modules of Flax Linen, Flax NNX and Equinox: their submodules' outputs become sites.

The module is traced as a whole, in evaluation mode, with the outputs of the named submodules marked, and the traced
program is cut there (see ``cut``): whatever a module does between its submodules stays where it is, and a cut that a
shortcut goes around is refused. Each block gets the parameters that it reads, batch statistics among them, as a flat
dictionary by name, which a bundle saves like any other.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import errors as flax_errors
from jaxtyping import Array, Num, PyTree

from gati_jax.errors import InputError, as_array, check_kind, kind_of, listed, printable
from gati_jax.pytrees import Fixed

from .chain import ROWS, Chain, Normalization, WithoutParams, check_normalization, reference
from .cut import Layout, Part, Segment, Whole
from .probe import COARSE_NOISE, check_chain, is_coarse
from .submodules import check_sites, mark_calls, path_of, unknown_sites

_TOLERANCE = 1e-5  # of the largest logit, in float32


def from_linen(
    module: nn.Module,
    variables: Mapping[str, PyTree],
    *,
    sites: Sequence[str],
    sample: Any,  # noqa: ANN401 (anything that NumPy takes)
    normalization: Normalization | None = None,
    channel_axis: int = -1,
    input_name: str = "images",
    **call: Any,  # noqa: ANN401 (the module's own arguments)
) -> Chain:
    """Return a chain that computes what a Linen module does, with sites at the outputs of named submodules.

    Args:
        module: A module of one input, x[batch, ...] -> logits[batch, classes].
        variables: As ``module.init`` returns them, or as they were trained; batch statistics are frozen.
        sites: Names of submodules in the order of their calls, such as ``["stem", "block_0", "head/norm"]``: site k of
            the chain, where caches may look, is the output of the k-th (site 0 is the input).
        sample: A few of the module's inputs[n, ...], on which the chain is compared with ``module.apply``: uint8
            pixels if there is a normalization, otherwise prepared inputs. Channels are last, see ``channel_axis``.
        normalization: How uint8 images become the module's inputs.
        channel_axis: Where the module has the channels of one image: -1 for last, 0 for first. Outside of the module
            they are last, in images as at sites: blocks move them at the input, and at sites of as many dimensions.
        input_name: What a server calls the input in requests.
        **call: Arguments of the module's call, such as ``train=False``.

    Returns:
        The chain. Its bundle is loaded by ``load_bundle(path, chain=...)`` with a chain made in the same way.

    Raises:
        InputError: There is no such submodule or it is not called exactly once, something else than its output passes
            by it, the module draws random numbers or updates its statistics, or the chain's logits differ.

    Example:
        >>> import flax.linen as nn, jax, jax.numpy as jnp
        >>> module = nn.Sequential([nn.Dense(8), nn.relu, nn.Dense(8), nn.relu, nn.Dense(3)])
        >>> x = jnp.linspace(0, 1, 8).reshape(2, 4)
        >>> chain = from_linen(module, module.init(jax.random.key(0), x), sites=["layers_0", "layers_2"], sample=x)
        >>> len(chain), chain.site_specs[2].shape, chain(x).shape
        (3, (8,), (2, 3))
    """
    check_kind("module", module, nn.Module, "an instance of a flax.linen.Module")
    _check_variables(variables)
    for site in check_sites(sites):
        check_kind("sites", site, str, "names of submodules")
    leaves, structure = _flatten(variables)
    function = _Linen(Fixed(module), structure, Fixed(tuple(sorted(call.items()))))
    return _chain(
        function, leaves, sites, sample, normalization=normalization, channel_axis=channel_axis, input_name=input_name
    )


def from_nnx(
    module: Any,  # noqa: ANN401 (an nnx.Module)
    *,
    sites: Sequence[Any],
    sample: Any,  # noqa: ANN401 (anything that NumPy takes)
    normalization: Normalization | None = None,
    channel_axis: int = -1,
    input_name: str = "images",
    **call: Any,  # noqa: ANN401 (the module's own arguments)
) -> Chain:
    """Return a chain that computes what an NNX module does in evaluation mode, with sites at outputs of submodules.

    The module stays as it is: a copy of it is set to evaluation (``module.eval()``), where batch statistics are frozen
    and dropout does nothing. The state of its random numbers is left out.

    Args:
        module: An ``nnx.Module`` of one input, x[batch, ...] -> logits[batch, classes].
        sites: Attribute paths such as ``"blocks.0"``, or the submodules themselves, in the order of their calls; see
            ``from_linen``.
        sample: See ``from_linen``.
        normalization: See ``from_linen``.
        channel_axis: See ``from_linen``.
        input_name: See ``from_linen``.
        **call: Arguments of the module's call.

    Raises:
        InputError: As ``from_linen``.
    """
    from flax import nnx  # noqa: PLC0415 (most users have Linen modules, or none)

    if not isinstance(module, nnx.Module):
        raise InputError(f"module: expected an nnx.Module, got {kind_of(module)}")
    names = [path_of(site, module, nnx.Module) for site in check_sites(sites)]
    evaluated = nnx.merge(*nnx.split(module))
    evaluated.eval()
    graph, state = nnx.split(evaluated)
    leaves, structure = _flatten(state, of_each="/value")
    function = _Nnx(Fixed(graph), structure, Fixed(tuple(sorted(call.items()))))
    return _chain(
        function, leaves, names, sample, normalization=normalization, channel_axis=channel_axis, input_name=input_name
    )


def from_equinox(
    module: Any,  # noqa: ANN401 (an equinox.Module)
    state: Any = None,  # noqa: ANN401 (an equinox.nn.State)
    *,
    sites: Sequence[Any],
    sample: Any,  # noqa: ANN401 (anything that NumPy takes)
    normalization: Normalization | None = None,
    channel_axis: int | None = None,
    input_name: str = "images",
    **call: Any,  # noqa: ANN401 (the module's own arguments)
) -> Chain:
    """Return a chain that computes what an Equinox module does in inference mode, with sites at outputs of submodules.

    Args:
        module: An ``equinox.Module`` of one sample, x[...] -> logits[classes]; it is vmapped. With ``state``, it is
            called as ``module(x, state)`` and returns its state as well.
        state: The ``equinox.nn.State`` of a module with batch norm, which is frozen.
        sites: Attribute paths such as ``"layers[0]"``, or the submodules themselves, in the order of their calls; see
            ``from_linen``.
        sample: See ``from_linen``; with a leading batch dimension.
        normalization: See ``from_linen``.
        channel_axis: See ``from_linen``. It must be given for inputs of two or more dimensions: 0 for Equinox's own
            convolutions, -1 for sequences[time, channels].
        input_name: See ``from_linen``.
        **call: Arguments of the module's call.

    Raises:
        InputError: As ``from_linen``; or Equinox is not installed.
    """
    try:
        import equinox as eqx  # noqa: PLC0415 (optional)
    except ImportError as error:
        raise InputError("module: Equinox modules need equinox (pip install equinox)") from error
    if not isinstance(module, eqx.Module):
        raise InputError(f"module: expected an equinox.Module, got {kind_of(module)}")
    names = [path_of(site, module, eqx.Module) for site in check_sites(sites)]
    both = {"module": eqx.nn.inference_mode(module), "state": state}
    arrays, static = eqx.partition(both, eqx.is_array)
    leaves, structure = _flatten(arrays)
    values, shape = jax.tree.flatten(static)
    function = _Equinox(Fixed((tuple(values), shape)), structure, Fixed(tuple(sorted(call.items()))), state is not None)
    return _chain(
        function, leaves, names, sample, normalization=normalization, channel_axis=channel_axis, input_name=input_name
    )


@runtime_checkable
class _Module(Protocol):
    """A module as a hashable function of its parameters' leaves."""

    def __call__(self, leaves: tuple[Array, ...], x: Array, sites: tuple[str, ...], layout: Layout) -> Any:  # noqa: ANN401
        """Call the module on a batch, and mark the outputs of the submodules ``sites``."""
        ...


@dataclasses.dataclass(frozen=True)
class _Linen:
    module: Fixed
    structure: Any
    call: Fixed

    def __call__(self, leaves: tuple[Array, ...], x: Array, sites: tuple[str, ...], layout: Layout) -> Any:  # noqa: ANN401
        seen: dict[str, None] = {}

        def intercept(function: Any, args: Any, kwargs: Any, context: Any) -> Any:  # noqa: ANN401
            output, site = function(*args, **kwargs), "/".join(context.module.path)
            if context.method_name != "__call__":
                return output
            seen[site] = None
            return layout.mark(site, output, batched=True) if site in sites else output

        with nn.intercept_methods(intercept):
            logits = self.module.value.apply(jax.tree.unflatten(self.structure, leaves), x, **dict(self.call.value))
        if missing := [site for site in sites if site not in seen]:
            raise unknown_sites(missing, [site for site in seen if site])
        return logits


@dataclasses.dataclass(frozen=True)
class _Nnx:
    graph: Fixed
    structure: Any
    call: Fixed

    def __call__(self, leaves: tuple[Array, ...], x: Array, sites: tuple[str, ...], layout: Layout) -> Any:  # noqa: ANN401
        from flax import nnx  # noqa: PLC0415 (as above)

        module = nnx.merge(self.graph.value, jax.tree.unflatten(self.structure, leaves))
        mark_calls(module, nnx.Module, sites, layout, batched=True)
        return module(x, **dict(self.call.value))


@dataclasses.dataclass(frozen=True)
class _Equinox:
    static: Fixed
    structure: Any
    call: Fixed
    stateful: bool

    def __call__(self, leaves: tuple[Array, ...], x: Array, sites: tuple[str, ...], layout: Layout) -> Any:  # noqa: ANN401
        import equinox as eqx  # noqa: PLC0415 (as above)

        values, shape = self.static.value
        both = eqx.combine(jax.tree.unflatten(self.structure, leaves), jax.tree.unflatten(shape, values))
        module, state = both["module"], both["state"]
        mark_calls(module, eqx.Module, sites, layout, batched=False)
        if not self.stateful:
            return jax.vmap(lambda one: module(one, **dict(self.call.value)))(x)
        return jax.vmap(lambda one: _logits_of(module(one, state, **dict(self.call.value))))(x)


def _logits_of(returned: Any) -> Any:  # noqa: ANN401 (whatever a module returns)
    if not isinstance(returned, tuple) or len(returned) != len(("logits", "state")):
        raise InputError(f"state: expected a module that returns (logits, state), got {type(returned).__name__}")
    return returned[0]


@dataclasses.dataclass(frozen=True)
class _Marked:
    """A module as the function that ``Whole`` takes; without sites, it is the module's own."""

    module: _Module
    sites: tuple[str, ...]
    layout: Layout

    def __call__(self, leaves: tuple[Array, ...], x: Array) -> Array:
        logits = self.module(leaves, self.layout.into(x), self.sites, self.layout)
        if not isinstance(logits, jax.Array):
            own = isinstance(logits, tuple) and isinstance(self.module, _Equinox)
            hint = " (pass the state of a module with batch norm)" if own else ""
            raise InputError(f"module: expected it to return one array of logits, got {type(logits).__name__}{hint}")
        return logits


def _check_variables(given: Any) -> None:  # noqa: ANN401 (checked here)
    if not isinstance(given, Mapping) or "params" not in given:
        got = f"keys {listed(list(map(str, given)))}" if isinstance(given, Mapping) else kind_of(given)
        raise InputError(f'variables: expected {{"params": ..., ...}}, as module.init returns them, got {got}')


def _flatten(tree: PyTree, *, of_each: str = "") -> tuple[dict[str, Array], Any]:
    """Return the leaves of a pytree under their paths without the end ``of_each``, in its order, and its structure."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(tree)
    leaves = {}
    for path, leaf in pairs:
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix(of_each)
        if name in leaves:
            raise InputError(f"module: expected distinct names of parameters, got {name} twice")
        leaves[name] = jnp.asarray(leaf)
    return leaves, structure


def _chain(
    module: _Module,
    leaves: Mapping[str, Array],
    sites: Sequence[str],
    sample: Any,  # noqa: ANN401
    *,
    normalization: Normalization | None,
    channel_axis: int | None,
    input_name: str,
) -> Chain:
    names, inputs = tuple(check_sites(sites)), _prepared(sample, normalization)
    spec = jax.ShapeDtypeStruct(inputs.shape[1:], inputs.dtype)
    layout = Layout.of(spec, channel_axis)
    specs = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves.values())
    whole = Whole(_Marked(module, names, layout), specs, spec, names)
    n, items = len(inputs), list(leaves.items())
    parts, of_more = _traced(whole, n, layout), _traced(whole, n + 1, layout)
    for site, part, other in zip(names, parts, of_more, strict=False):
        if (n, *part.shape[1:]) != part.shape or (n + 1, *part.shape[1:]) != other.shape:
            got = f"{list(part.shape)} for {n} inputs"
            raise InputError(f"sites: expected {site} to return an array[batch, ...], got {got}")
    blocks, params = [], []
    for index, part in enumerate(parts):
        used = dict(items[i] for i in part.leaves)
        if keys := [name for name, leaf in used.items() if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)]:
            raise InputError(
                f"module: it draws random numbers ({listed(keys)}) in evaluation, too: a frozen classifier gives an"
                " input the same answer each time, so take out what draws them"
            )
        blocks.append(Segment(whole, index, tuple(used)))
        params.append(used)
    unchanged = WithoutParams(jnp.asarray)  # the last block ends with the logits
    chain = Chain(blocks, unchanged, (*params, ()), spec, normalization, input_name=input_name)
    _check_parity(chain, _Marked(module, (), layout), tuple(leaves.values()), inputs[:ROWS])
    check_chain(chain, np.asarray(inputs))
    return chain


def _prepared(sample: Any, normalization: Normalization | None) -> Num[Array, "n ..."]:  # noqa: ANN401
    check_normalization(normalization)
    array = as_array("sample", sample)
    if array.ndim < 2 or not len(array) or array.dtype.kind not in "fiub" + "V":  # noqa: PLR2004 (V: bfloat16)
        raise InputError(f"sample: expected a few inputs[n, ...], got {array.dtype}{list(array.shape)}")
    return normalization(array) if normalization is not None and array.dtype == np.uint8 else jnp.asarray(array)


def _traced(whole: Whole, batch: int, layout: Layout) -> tuple[Part, ...]:
    """Return the parts of a module's program; say in one line why it has none."""
    try:
        return whole.parts(batch)
    except InputError:
        raise
    except flax_errors.InvalidRngError as error:
        raise InputError(
            "module: it draws random numbers, as dropout does in training: pass what its call takes for evaluation,"
            " such as train=False or deterministic=True, on to this function"
        ) from error
    except flax_errors.ModifyScopeVariableError as error:
        raise InputError(
            "module: it updates its variables, as batch norm does in training: pass what its call takes for"
            " evaluation, such as train=False or use_running_average=True, on to this function"
        ) from error
    except Exception as error:
        got = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        shape, moved = list(whole.input_spec.shape), ""
        if layout.axis is not None:
            shape.insert(layout.axis, shape.pop())
            moved = " (the sample's channels, which are last, at channel_axis)"
        raise InputError(
            f"module: expected one that takes {whole.input_spec.dtype}[batch, {', '.join(map(str, shape))}]{moved} and"
            f" the arguments passed on to it, got {printable(got, most=300)}"
        ) from error


def _check_parity(chain: Chain, own: _Marked, leaves: tuple[Array, ...], inputs: Num[Array, "n ..."]) -> None:
    """Check that the chain's logits are the module's own."""
    logits = jax.jit(reference(own))(leaves, inputs), jax.jit(reference(Chain.__call__))(chain, inputs)
    expected, got = (np.nan_to_num(np.asarray(each).astype(np.float64)) for each in logits)
    apart, most = np.abs(got - expected).max(), np.abs(expected).max()
    if apart > (COARSE_NOISE * expected.std() if is_coarse(chain) else _TOLERANCE * most):
        raise InputError(
            f"module: expected the same logits from the chain as from its own call, got ones that differ by {apart:.2g}"
            f" at most {most:.2g}: does it compute something else from call to call?"
        )
