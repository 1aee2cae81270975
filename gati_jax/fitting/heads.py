"""Heads: the kinds of caches to fit, and at which sites."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from pydantic import AfterValidator, Field

from gati_jax.caches import (
    Candidate,
    Cascaded,
    Centres,
    ClassToken,
    Grid,
    Neighbours,
    SortedSelector,
    describe_predictor,
    describe_selector,
    fold_standardize,
    import_network,
    predictor_inputs,
)
from gati_jax.caches.candidate import Part
from gati_jax.errors import InputError, kind_of
from gati_jax.models import Architecture, Bert, Chain, Normalization, Variables, ViT
from gati_jax.options import check_options
from gati_jax.pytrees import tree_bytes

DEFAULT_SELECTOR = SortedSelector()


def _plain(name: str) -> str:
    if not name or set(name) & {"@", "+"}:
        raise ValueError("expected a name without @ and +, which separate it from selector and site in grid+linear@4")
    return name


HeadName = Annotated[str, AfterValidator(_plain)]
Sites = Annotated[
    tuple[Annotated[int, Field(ge=0)], ...] | None, Field(description="where; unset: at every site but the input")
]
IsCascaded = Annotated[bool, Field(description="each also sees the logits of the same head at the site before")]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Head:
    """A kind of cache.

    Args:
        name: Prefix of the candidates' names: "grid" at site 9 becomes "grid@9".
        predictor: Returns the predictor for a number of classes.
        selector: The selector.
        sites: Where to fit one; None for sites 1 .. N - 1. Site k is the input of block k + 1. Its last axis has the
            channels; those between it and the batch are positions, such as [height, width] or [time].
        variables: The predictor's, if it is trained already: then only its selector is fitted.
        selectors: Further selectors to try on the same predictor, by name: "linear" makes "grid+linear@9".
        cascaded: Whether each one behind the first site also reads the logits of the one at the site before, see
            ``gati_jax.caches.Cascaded``.
    """

    name: Annotated[HeadName, Field(description="prefix of the candidates' names")]
    predictor: Callable[[int], nn.Module]
    selector: nn.Module
    sites: Sites = None
    variables: PyTree | None = dataclasses.field(default=None, repr=False, compare=False)
    selectors: Annotated[tuple[tuple[HeadName, Any], ...], Field(description="further ones, by name")] = ()
    cascaded: IsCascaded = False

    def __post_init__(self) -> None:
        """Check the options, and that the names of candidates differ."""
        if isinstance(self.predictor, nn.Module) or not callable(self.predictor):
            name = type(self.predictor).__name__
            raise InputError(
                "predictor: expected a function of the number of classes, such as the class Grid, got"
                f" {kind_of(self.predictor)}; for options, lambda classes: {name}(classes, ...)"
            )
        selectors: list[Any] = [self.selector, *(selector for _, selector in self.selectors)]
        for selector in selectors:
            if not isinstance(selector, nn.Module):
                raise InputError(f"selector: expected an instance such as SortedSelector(), got {kind_of(selector)}")
        check_options(self)
        others = [name for name, _ in self.selectors]
        if len(set(others)) < len(others):
            raise InputError(f"selectors: expected distinct names, got {', '.join(others)}")


def network_head(
    name: str,
    network: Architecture,
    variables: Variables,
    *,
    trained: Normalization,
    base: Normalization,
    selector: nn.Module = DEFAULT_SELECTOR,
) -> Head:
    """Return a trained small network as a head at site 0: requests that it answers never reach the base.

    Args:
        name: The candidate becomes "name@0".
        network: Its configuration, with the base's classes and input shape.
        variables: As ``import_state_dict`` reads them.
        trained: The normalisation of its training images.
        base: The normalisation of the base's inputs.
        selector: The selector.
    """
    predictor, own = import_network(network, variables, trained=trained, base=base)
    return Head(name=name, predictor=lambda _: predictor, selector=selector, sites=(0,), variables=own)


DEFAULT_HEADS = (Head(name="grid", predictor=Grid, selector=DEFAULT_SELECTOR),)


def default_heads(chain: Chain) -> tuple[Head, ...]:
    """Return the heads to fit where none are named: means over a grid; of transformers, the class token as well."""
    token = Head(name="token", predictor=ClassToken, selector=DEFAULT_SELECTOR)
    return (*DEFAULT_HEADS, token) if isinstance(chain.network, ViT | Bert) else DEFAULT_HEADS


def _check_heads(heads: Any) -> Sequence[Head]:  # noqa: ANN401 (checked here)
    if isinstance(heads, Head):
        raise InputError(f"heads: expected a sequence of heads, got one: write [{heads.name}]")
    if isinstance(heads, (str, Mapping)) or not isinstance(heads, Sequence):
        raise InputError(f"heads: expected a sequence of gati_jax.Head, got {kind_of(heads)}")
    for head in heads:
        if not isinstance(head, Head):
            raise InputError(
                f"heads: expected gati_jax.Head(name=..., predictor=..., selector=...), got {kind_of(head)}"
            )
    return heads


def _check_sites(chain: Chain, name: str, sites: Sequence[int]) -> None:
    if bad := [site for site in sites if not 0 <= site < len(chain)]:
        raise InputError(f"heads: expected sites 0 to {len(chain) - 1} for {name}, got {bad}")
    kinds = {site: str(chain.site_specs[site].dtype) for site in sites}
    if bad := [f"{kind} at {site}" for site, kind in kinds.items() if not jnp.issubdtype(kind, jnp.floating)]:
        raise InputError(f"heads: expected sites of floating-point numbers for {name}, got {', '.join(bad)}")


def _check_module(name: str, made: Any) -> nn.Module:  # noqa: ANN401 (checked here)
    if not isinstance(made, nn.Module):
        raise InputError(f"heads: expected {name} to make a Linen module, got {kind_of(made)}")
    return made


def _predictor_of(head: Head, classes: int) -> nn.Module:
    predictor = _check_module(head.name, head.predictor(classes))
    describe_predictor(predictor)  # what could not be saved later is refused before hours of training
    for selector in (head.selector, *(each for _, each in head.selectors)):
        describe_selector(selector)
    if (got := getattr(predictor, "classes", classes)) != classes:
        raise InputError(f"heads: expected {head.name} to have the base's {classes} classes, got {got}")
    if isinstance(predictor, Neighbours | Centres) and head.variables is None:
        raise InputError(
            f"heads: expected {head.name} to be trained by gradients, got a neighbour cache: see fit_freeze"
        )
    return predictor


def parts_of(chain: Chain, heads: Sequence[Head]) -> dict[str, Part]:
    """Return the parts of all heads by candidates' names.

    Raises:
        InputError: A site that the chain does not have, or that no cache can read; names given twice; a network of
            other classes; or a predictor or a selector that no bundle can hold.
    """
    parts: dict[str, Part] = {}
    for head in _check_heads(heads):
        sites = range(1, len(chain)) if head.sites is None else head.sites
        _check_sites(chain, head.name, sites)
        predictor = _predictor_of(head, chain.classes)
        previous = None
        for site in sorted(sites):
            own = Cascaded(chain.classes, predictor) if previous else predictor
            name = f"{head.name}@{site}"
            parts[name] = Part(site, own, head.selector, head.variables, previous)
            previous = name if head.cascaded else None
    if not parts:
        raise InputError(
            f"heads: expected at least one at some site, got none; a chain of {len(chain)} blocks has by default"
            " sites 1 to N - 1; site 0 needs sites=(0,)"
        )
    if len(parts) != sum(len(chain) - 1 if h.sites is None else len(h.sites) for h in heads):
        raise InputError(f"heads: expected distinct names, got {[head.name for head in heads]}")
    return parts


def more_selectors(parts: Mapping[str, Part], heads: Sequence[Head]) -> dict[str, Part]:
    """Return the parts, followed by the same predictors with the heads' further selectors."""
    found = dict(parts)
    for head in heads:
        for name, part in parts.items():
            # Two heads may share a name at different sites.
            if name == f"{head.name}@{part.site}" and (head.sites is None or part.site in head.sites):
                for other, selector in head.selectors:
                    found[f"{head.name}+{other}@{part.site}"] = dataclasses.replace(part, selector=selector)
    return found


def head_sizes(chain: Chain, heads: Sequence[Head]) -> dict[str, int]:
    """Return the bytes of every candidate that a fit would make, by name, without allocating it."""
    return {name: tree_bytes(_shapes(chain, part)) for name, part in _all_parts(chain, heads).items()}


def untrained(chain: Chain, heads: Sequence[Head]) -> tuple[Candidate, ...]:
    """Return the candidates that ``fit`` would make, with small random parameters: for measuring their costs."""
    candidates, drawn = [], {}
    for i, (name, part) in enumerate(_all_parts(chain, heads).items()):
        draw = np.random.default_rng(i).standard_normal  # JAX would compile a program for every shape
        random = jax.tree.map(
            lambda leaf, draw=draw: jnp.asarray(0.01 * draw(leaf.shape) + 0.01, leaf.dtype), _shapes(chain, part)
        )
        predictor, variables = part.predictor, part.variables
        if variables is None:
            # Several selectors share one predictor, as after a fit, so that its lookup is timed once.
            same = part.site, part.predictor, part.previous
            if same not in drawn:
                drawn[same] = fold_standardize(part.predictor, random["predictor"])
            predictor, variables = drawn[same]
        params = {"predictor": variables, "selector": random["selector"]}
        candidates.append(Candidate(name, part.site, predictor, part.selector, params, part.previous))
    return tuple(candidates)


def _all_parts(chain: Chain, heads: Sequence[Head]) -> dict[str, Part]:
    return more_selectors(parts_of(chain, heads), heads)


def _shapes(chain: Chain, part: Part) -> PyTree:
    batch = [jax.ShapeDtypeStruct((1, *spec.shape), spec.dtype) for spec in chain.site_specs]
    logits = jax.ShapeDtypeStruct((1, chain.classes), jnp.float32)

    def init(sites: list[jax.Array], logits: jax.Array) -> PyTree:
        key = jax.random.key(0)
        inputs = predictor_inputs(part, sites, {} if part.previous is None else {part.previous: logits})
        variables = part.predictor.init(key, *inputs) if part.variables is None else part.variables
        return {"predictor": variables, "selector": part.selector.init(key, logits)}

    return jax.eval_shape(init, batch, logits)
