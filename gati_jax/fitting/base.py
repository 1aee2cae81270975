"""Run a frozen base for a fit: on images from memory or a source, in pieces that fit, by the fastest backend."""

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from gati_jax import data
from gati_jax.caches import Summary
from gati_jax.caches.candidate import Logits
from gati_jax.devices import ONE, Devices
from gati_jax.errors import InputError
from gati_jax.models import Architecture, Chain, check_images, fast_forward
from gati_jax.pytrees import tree_bytes

Images = Shaped[Array | np.ndarray, "batch *input"]
_SITE_BYTES = 2**29  # of the activations at all sites, for the rows that run at once on a CPU
_ACCELERATOR = 8  # times as many elsewhere


def open_images(chain: Chain, images: Any, *, argument: str = "images") -> data.Images:  # noqa: ANN401 (see Args)
    """Return images that a chain takes, as an array or as rows that are read when they are needed.

    Args:
        chain: The base.
        images: An array, what NumPy makes one of, or a ``gati_jax.data.Source``; see ``check_images``.
        argument: The name to use in messages.

    Raises:
        InputError: The shape, the dtype or a value is not what the chain takes, or a row cannot be read.
    """
    in_memory = isinstance(images, np.ndarray | jax.Array | list | tuple | str | bytes | Mapping)
    if in_memory or not isinstance(images, data.Source):
        return check_images(chain, images, argument=argument)
    rows = images if isinstance(images, data.ImageRows) else data.ImageRows(images, name=argument)
    if len(rows):
        check_images(chain, rows[:1], argument=argument)  # the others are compared with it when they are read
    return rows


def rows_at_once(chain: Chain, most: int) -> int:
    """Return ``most``, halved until the activations of so many rows fit into memory: 512 MB on a CPU.

    Caches at several sites keep the activations in between; of ResNet-50 at 224x224, a row has 22 MB of them.
    """
    room = _SITE_BYTES * (1 if jax.default_backend() == "cpu" else _ACCELERATOR)
    each = tree_bytes(chain.site_specs)
    while most > 1 and most * each > room:
        most = -(-most // 2)
    return most


Inputs = tuple[tuple[int, Summary], ...]
"""Sites, ascending, and what is kept of their activations."""
Run = Callable[[Images], tuple[list[Array], Logits]]


def base_runner(chain: Chain, inputs: Inputs, devices: Devices = ONE) -> Run:
    """Return a function from images to summaries of the base's activations and its logits, on the fastest backend.

    On a CPU that is ONNX Runtime, where it is installed and the base has an ONNX form; otherwise, and on several
    devices, XLA. Results differ in their last bits from those of ``Chain.activations``: they are to learn from, and
    never answers.
    """
    stops = [*dict.fromkeys(site for site, _ in inputs), len(chain)]
    if devices.count > 1 or (spans := _onnx_spans(chain, stops)) is None:
        fast = devices.copy(fast_forward(chain))
        run_on = functools.partial(_run_base, fast, inputs=inputs, devices=devices)
        return _in_pieces(chain, lambda images: run_on(devices.split(images)), devices)
    static = tuple((stops.index(site), summary) for site, summary in inputs)

    def run(images: Images) -> tuple[list[Array], Logits]:
        found = [spans.first(np.asarray(images), stops[0])]
        for start, stop in itertools.pairwise(stops):
            found.append(spans.run(found[-1], np.arange(len(images)), start, stop))
        # Views, and XLA reads arrays of the host where they are: ``found`` must live until it has.
        *sites, logits = (value.numpy() for value in found)
        return jax.block_until_ready(_summarize(sites, inputs=static)), jnp.array(logits)

    return _in_pieces(chain, run, devices)


def _in_pieces(chain: Chain, run: Run, devices: Devices) -> Run:
    """Run no more rows at once than memory allows; what is kept of them may be much less."""

    def run_pieces(images: Images) -> tuple[list[Array], Logits]:
        n, count = len(images), devices.count
        if (size := count * rows_at_once(chain, n // count)) == n:
            return run(images)
        pieces = [jax.block_until_ready(run(images[i : i + size])) for i in range(0, n, size)]
        sites, logits = zip(*pieces, strict=True)
        return [jnp.concatenate(rows) for rows in zip(*sites, strict=True)], jnp.concatenate(logits)

    return run_pieces


def _onnx_spans(chain: Chain, stops: Sequence[int]) -> Any | None:  # noqa: ANN401 (onnxruntime is optional)
    if jax.default_backend() != "cpu" or not isinstance(chain.network, Architecture):
        return None
    try:
        from gati_jax.export.sessions import Spans  # noqa: PLC0415 (optional)

        return Spans(chain, stops)
    except (ImportError, InputError):  # InputError: too large for a file of ONNX
        return None


@functools.partial(jax.jit, static_argnames=("inputs", "devices"))
def _run_base(chain: Chain, images: Array, *, inputs: Inputs, devices: Devices) -> tuple[list[Array], Array]:
    sites, logits = chain.activations(chain.prepare(images))
    return devices.as_rows(([summary(sites[site]) for site, summary in inputs], logits))


@functools.partial(jax.jit, static_argnames="inputs")
def _summarize(activations: list[Array], *, inputs: Inputs) -> list[Array]:
    """Return summaries of activations that are channels first, by their index."""
    return [summary(jnp.moveaxis(activations[index], 1, -1)) for index, summary in inputs]
