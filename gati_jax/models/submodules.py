"""Submodules of NNX and Equinox modules: their attribute paths, and calls of them that mark what they return."""

import functools
import re
import types
from collections.abc import Iterator, Sequence
from typing import Any

from gati_jax.errors import InputError, kind_of, listed, printable

from .cut import Layout


def mark_calls(module: Any, kind: type, sites: tuple[str, ...], layout: Layout, *, batched: bool) -> None:  # noqa: ANN401
    """Make the submodules ``sites`` of a fresh copy of a module mark their outputs."""
    submodules = dict(_submodules(module, kind))
    for site in sites:
        submodule = submodules[site]
        object.__setattr__(submodule, "__class__", _marking(type(submodule), site, layout, batched))


@functools.cache
def _marking(kind: type, site: str, layout: Layout, batched: bool) -> type:  # noqa: FBT001
    """Return a subclass whose calls mark their outputs; to its parent, a submodule of it is what it was."""

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 (a submodule's own)
        output = kind.__call__(self, *args, **kwargs)
        if not batched and isinstance(output, tuple) and output:  # Equinox's stateful layers return (output, state)
            return layout.mark(site, output[0], batched=batched), *output[1:]
        return layout.mark(site, output, batched=batched)

    body = {"__call__": call, "__module__": kind.__module__, "__doc__": kind.__doc__}
    return types.new_class(kind.__name__, (kind,), exec_body=lambda namespace: namespace.update(body))


def _submodules(module: Any, kind: type) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Yield the submodules of an object tree with their attribute paths, such as "blocks.0.norm"; each one once."""
    seen, found = {id(module)}, [("", module)]
    while found:
        path, node = found.pop(0)
        if path and isinstance(node, kind):
            yield path, node
        for name, child in _children(node):
            if id(child) not in seen and isinstance(child, (kind, list, tuple, dict)):
                seen.add(id(child))
                found.append((f"{path}.{name}" if path else name, child))


def _children(node: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, (list, tuple)) else None
    for name, child in vars(node).items() if items is None else items:
        yield str(name), child


def path_of(site: Any, module: Any, kind: type) -> str:  # noqa: ANN401
    """Return the attribute path of a submodule that is named by a path or given itself."""
    submodules = dict(_submodules(module, kind))
    if not isinstance(site, str):
        found = [path for path, submodule in submodules.items() if submodule is site]
        if not found:
            raise unknown_sites([kind_of(site)], list(submodules))
        return found[0]
    path = ".".join(part for part in re.split(r"[.\[\]/]+", site) if part)
    if path not in submodules:
        raise unknown_sites([site], list(submodules))
    return path


def unknown_sites(missing: Sequence[str], known: Sequence[str]) -> InputError:
    """Say which sites are no submodules."""
    return InputError(f"sites: expected submodules that are called, of {listed(known)}, got {listed(missing)}")


def check_sites(sites: Any) -> list[Any]:  # noqa: ANN401 (checked here)
    """Return what was given as sites, if it is a list of something.

    Raises:
        InputError: It is not, or has something twice.
    """
    if isinstance(sites, str) or not isinstance(sites, Sequence) or not sites:
        raise InputError(f"sites: expected a list of submodules, got {kind_of(sites)}")
    for k, site in enumerate(sites):
        if any(site is other or (isinstance(site, str) and site == other) for other in sites[:k]):
            got = printable(site) if isinstance(site, str) else kind_of(site)
            raise InputError(f"sites: expected every submodule once, got {got} twice")
    return list(sites)
