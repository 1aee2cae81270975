"""Cut a traced network at marked values: the blocks of a chain are the parts of one program between two marks.

A cut is sound where everything behind it is computed from the marked value and parameters alone. A shortcut that goes
around the mark breaks that, and the program says so: computing the next mark without this one then needs the input.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from types import NoneType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jaxtyping import Array

from gati_jax.errors import InputError, check_kind, listed

_MARK = "gati_jax site "
_TRANSPARENT = {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "custom_vmap_call"}
"""Calls that run their program once, so that a mark inside of them is a value of the program around them."""


@functools.cache
def _marker(site: str) -> Callable[[Array], Array]:
    """Return the identity that marks its argument; under vmap, it marks the whole batch with its axis first."""

    @jax.custom_batching.custom_vmap
    def marked(value: Array) -> Array:
        return checkpoint_name(value, _MARK + site)

    @marked.def_vmap
    def _(_: int, batched: list[bool], value: Array) -> tuple[Array, bool]:
        return marked(value), batched[0]

    return marked


def mark(value: Array, site: str) -> Array:
    """Return ``value``, marked in the program that is being traced."""
    return _marker(site)(value)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where a module has channels, which are last everywhere else.

    Args:
        rank: Dimensions of one input; values of as many dimensions have their channels in the same place.
        axis: Of one value, from 0; None for last.
    """

    rank: int
    axis: int | None

    @classmethod
    def of(cls, spec: jax.ShapeDtypeStruct, channel_axis: int | None) -> "Layout":
        """Return the layout of a module with inputs of ``spec``."""
        rank = len(spec.shape)
        check_kind("channel_axis", channel_axis, (int, NoneType), "a whole number: 0 for first, -1 for last")
        if channel_axis is None and rank > 1:
            raise InputError(
                "channel_axis: expected 0 (channels first, as Equinox's convolutions have them) or -1 (last, as in"
                f" [time, channels]) for inputs of shape {list(spec.shape)}, got none"
            )
        if channel_axis is not None and not -rank <= channel_axis < rank:
            raise InputError(f"channel_axis: expected an axis of one input {list(spec.shape)}, got {channel_axis}")
        axis = (-1 if channel_axis is None else channel_axis) % rank
        return cls(rank, None if axis == rank - 1 else axis)

    def into(self, x: Array) -> Array:
        """Move the channels of a batch of inputs to where the module has them."""
        return x if self.axis is None else jnp.moveaxis(x, -1, self.axis + 1)

    def mark(self, site: str, output: Any, *, batched: bool) -> Array:  # noqa: ANN401 (whatever a submodule returns)
        """Mark a submodule's output, with channels last."""
        if not isinstance(output, jax.Array):
            raise InputError(f"sites: expected {site} to return one array, got {type(output).__name__}")
        if self.axis is None or output.ndim - batched != self.rank:
            return mark(output, site)
        axis = self.axis + batched
        return jnp.moveaxis(mark(jnp.moveaxis(output, axis, -1), site), -1, axis)


@dataclasses.dataclass(frozen=True)
class Whole:
    """A network as one function of its parameters and a batch that marks its sites, and all that decides its program.

    Args:
        function: ``function(leaves, x[batch, ...]) -> logits``, which calls ``mark`` once for each site; hashable.
        leaves: Shapes and dtypes of the parameters.
        input_spec: Shape and dtype of one input.
        sites: Names of the marks in the order in which they are computed.
    """

    function: Callable[[tuple[Array, ...], Array], Any]
    leaves: tuple[jax.ShapeDtypeStruct, ...]
    input_spec: jax.ShapeDtypeStruct
    sites: tuple[str, ...]

    def parts(self, batch: int) -> tuple["Part", ...]:
        """Return the parts of the program for a batch of this size: one more than there are sites.

        Raises:
            InputError: A site is not marked once in the whole program, the order is another one, or a cut is not sound.
        """
        x = jax.ShapeDtypeStruct((batch, *self.input_spec.shape), self.input_spec.dtype)
        # jit remembers the program, also by the precision of products that is asked for here and now.
        return _parts(jax.make_jaxpr(self.function)(self.leaves, x), self.sites)


@dataclasses.dataclass(frozen=True)
class Segment:
    """One part as a block of a chain, for batches of any size; equal networks make equal blocks."""

    whole: Whole
    index: int
    names: tuple[str, ...]
    """Of its parameters, in the order in which the part takes them."""

    def __call__(self, params: dict[str, Array], x: Array) -> Array:
        """Run the part on its parameters and the value of the site before it."""
        part = self.whole.parts(len(x))[self.index]
        return core.jaxpr_as_fun(part.program)(x, *(params[name] for name in self.names))[0]


class Part(NamedTuple):
    """The program between two sites."""

    program: core.ClosedJaxpr
    """From the value of the site before and the parameters to the value of the site behind it."""
    leaves: tuple[int, ...]
    """Which parameters it takes."""
    shape: tuple[int, ...]
    """Of what it returns."""


@functools.lru_cache(maxsize=32)
def _parts(closed: core.ClosedJaxpr, sites: tuple[str, ...]) -> tuple[Part, ...]:
    """Cut a program of parameters and x."""
    flat = _Flat()
    equations = list(flat.equations(closed.jaxpr, closed.consts))
    *leaves, x = closed.jaxpr.invars
    marks = _find_marks(equations, sites)
    [output] = closed.jaxpr.outvars
    targets: list[Any] = [*marks, flat.resolve(output)]  # variables, or a literal
    parts = []
    for i, (start, target) in enumerate(zip([x, *marks], targets, strict=True)):
        steps, reached = _behind(equations, target, start)
        if start is not x and x in reached:
            raise _bypassed(sites[i - 1], equations, start, steps, x)
        used = tuple(k for k, leaf in enumerate(leaves) if leaf in reached)
        constants = [v for v in flat.constants if v in reached]
        inputs = [start, *(leaves[k] for k in used)]
        jaxpr = closed.jaxpr.replace(constvars=constants, invars=inputs, outvars=[target], eqns=steps)
        parts.append(Part(core.ClosedJaxpr(jaxpr, [flat.constants[v] for v in constants]), used, target.aval.shape))
    return tuple(parts)


class _Flat:
    """The equations of a program, with those calls replaced by their content in which a site is marked."""

    def __init__(self) -> None:
        self.constants: dict[core.Var, Any] = {}
        self._alias: dict[core.Var, Any] = {}

    def resolve(self, atom: Any) -> Any:  # noqa: ANN401 (a variable or a literal)
        """Return what stands for a variable of a call that was replaced."""
        return self._alias.get(atom, atom) if isinstance(atom, core.Var) else atom

    def equations(self, jaxpr: core.Jaxpr, constants: Sequence[Any]) -> Iterator[core.JaxprEqn]:
        self.constants |= dict(zip(jaxpr.constvars, constants, strict=True))
        for equation in jaxpr.eqns:
            inputs = [self.resolve(atom) for atom in equation.invars]
            marked = [site for inner in core.jaxprs_in_params(equation.params) for site in _marks_in(inner)]
            if not marked:
                yield equation.replace(invars=inputs)
                continue
            if equation.primitive.name not in _TRANSPARENT:
                raise InputError(
                    f"sites: expected {listed(marked)} to be called once, got calls inside {equation.primitive.name},"
                    " which repeats or chooses them: cut outside of it"
                )
            [inner] = [v for v in equation.params.values() if isinstance(v, core.Jaxpr | core.ClosedJaxpr)]
            inner, values = (inner.jaxpr, inner.consts) if isinstance(inner, core.ClosedJaxpr) else (inner, ())
            self._alias |= dict(zip(inner.invars, inputs, strict=True))
            yield from self.equations(inner, values)
            self._alias |= dict(zip(equation.outvars, map(self.resolve, inner.outvars), strict=True))


def _site_of(equation: core.JaxprEqn) -> str | None:
    name = equation.params.get("name", "") if equation.primitive.name == "name" else ""
    return name.removeprefix(_MARK) if name.startswith(_MARK) else None


def _marks_in(jaxpr: core.Jaxpr) -> Iterator[str]:
    for equation in jaxpr.eqns:
        if (site := _site_of(equation)) is not None:
            yield site
        for inner in core.jaxprs_in_params(equation.params):
            yield from _marks_in(inner)


def _find_marks(equations: Sequence[core.JaxprEqn], sites: tuple[str, ...]) -> list[core.Var]:
    """Return the marked variables in the order of ``sites``."""
    found = [(site, equation.outvars[0]) for equation in equations if (site := _site_of(equation)) is not None]
    calls = [site for site, _ in found]
    for site in sites:
        if (times := calls.count(site)) != 1:
            raise InputError(f"sites: expected {site} to be called once, got {times or 'no'} calls")
    if calls != list(sites):
        raise InputError(f"sites: expected them in the order of their calls, {listed(calls)}, got {listed(sites)}")
    return [variable for _, variable in found]


def _behind(
    equations: Sequence[core.JaxprEqn],
    target: Any,  # noqa: ANN401 (a variable or a literal)
    start: core.Var | None,
) -> tuple[list[core.JaxprEqn], set[core.Var]]:
    """Return the equations by which ``target`` is computed from ``start``, and all variables that they read."""
    reached, steps = {target} if isinstance(target, core.Var) else set(), []
    for equation in reversed(equations):
        made = reached.intersection(equation.outvars) - {start}
        if made:
            steps.append(equation)
            reached.update(_variables(equation))
    return steps[::-1], reached


def _variables(equation: core.JaxprEqn) -> list[core.Var]:
    return [atom for atom in equation.invars if isinstance(atom, core.Var)]


def _bypassed(
    site: str, equations: Sequence[core.JaxprEqn], cut: core.Var, steps: Sequence[core.JaxprEqn], x: core.Var
) -> InputError:
    """Say which value goes around a cut: what the part behind it reads of all that was computed before it."""
    before, _ = _behind(equations, cut, None)
    made = {x}
    for equation in before:  # of the input, not of parameters alone
        made.update(equation.outvars if made.intersection(_variables(equation)) else ())
    made -= {cut}
    own = {id(equation) for equation in before}
    read = [v for equation in steps if id(equation) not in own for v in _variables(equation)]
    around: Any = next((v for v in read if v in made), x)
    what = "the input" if around is x else f"{around.aval.dtype}{list(around.aval.shape)}"
    return InputError(
        f"sites: expected everything behind {site} to be computed from its output alone, got {what} from before it as"
        " well (a shortcut around it?): cut where the paths have joined, or leave it out"
    )
