"""Write a commented config for the data and the weights at hand; it asks nothing.

What can be read is filled in: the splits' sizes from the data, the network from the weights. What only the user can
know is marked CHECK. Where the library has a config for the same data and network, its options of fit and plan are
taken over, with their comments.
"""

import argparse
import itertools
import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gati_jax import InputError, WeightsError, data
from gati_jax.commands import CONFIGS
from gati_jax.data import Dataset
from gati_jax.data.listing import list_pictures
from gati_jax.data.packed import Opened, open_npz
from gati_jax.data.pictures import Transform, read_regular
from gati_jax.errors import printable
from gati_jax.files import write_atomically
from gati_jax.imports import load_chain
from gati_jax.models import NAMES, architecture, import_state_dict, read_weights

from . import cli
from .config import Config, build
from .zoo import Entry, read_entry

EXAMPLE = "python -m train.init --data cifar10 --weights resnet56-cifar10.safetensors --out resnet56.toml"
SPLITS = ("all", "train", "validation", "val", "test")
IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}
TO_TRAIN = ("resnet18", "resnet20")  # where there are no weights yet
TRAINED = Path("runs/base/base.safetensors")
FIT = "[fit]\n"
_KERNEL = 4  # dimensions of a convolution's
_SIDE, _SMALL = 224, 64  # pixels: of most networks' images; below which nothing is cropped
_SAMPLE = 20  # pictures that tell whether all have one size
PLAIN = """\
[fit]
epochs = 20 # fewer for large data; --fit.minutes bounds the time
augment = { pad = 0, flip = false } # as the base was trained: pixels of shift, mirror images
# heads = [{ name = "grid", predictor = { kind = "grid", cells = 4, hidden = 128 } }]

[plan]
epsilon = 0.02 # at most this share of requests may disagree with the base
delta = 0.05 # the risk that the certificate is wrong
# also = [0.01] # further epsilons, certified together
# max_sites = 4 # at most so many caches
"""


def main(argv: list[str] | None = None) -> None:
    """Run the script."""
    arguments = parser().parse_args(argv)
    if arguments.weights and arguments.chain:
        raise InputError("--chain: expected it without --weights, which its function reads, got both")
    if arguments.out.exists():
        raise InputError(f"--out: expected a new file, got {arguments.out}, which is left alone")
    sizes = sizes_of(arguments.data, arguments.data_dir, arguments.size)
    shape, classes = sizes.shape, sizes.classes
    entry = read_entry(arguments.weights) if arguments.weights else None
    if arguments.chain:
        load_chain(arguments.chain, "--chain")  # it fails now, if at all
        below = f"[base]\nchain = {_toml(arguments.chain)}\n\n{PLAIN}"
    elif arguments.weights:
        network = entry.network if entry else network_of(arguments.weights, shape, classes)
        base = known_base(arguments.weights, entry) if entry else plain_base(arguments.weights, network, shape, classes)
        below = f"{base}\n\n{shipped(arguments.data, [network], FIT) or PLAIN}"
    else:
        own = shipped(arguments.data, TO_TRAIN, "[base]\n", 'weights = "runs/')
        below = own or f"{plain_base(None, TO_TRAIN[0], shape, classes)}\n\n{PLAIN}"
    steps = [_fit(arguments.out)]
    if not (arguments.weights or arguments.chain):
        trained = Path(tomllib.loads(below)["base"]["weights"])
        steps.insert(0, f"gati-jax train-base --config {arguments.out} --out {trained.parent}")
    text = config_text(arguments, sizes, entry, steps, below)
    try:
        build(Config, tomllib.loads(text))  # what is written can be read
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"--weights, --data-dir: expected names that TOML can hold, got others: {error}") from error
    write_atomically(arguments.out, text.encode())
    print(f"written: {arguments.out}; look at the lines marked CHECK, then: {' && '.join(steps)}")


def parser() -> cli.Parser:
    """Return the command line's parser."""
    p = cli.parser("Write a commented config for the data and the weights at hand.", EXAMPLE, out=False, as_json=False)
    p.add_argument("--data", required=True, metavar="NAME", help="as data.name: digits, cifar10, folder, npz, ...")
    p.add_argument("--data-dir", type=Path, metavar="DIR", help="as data.dir, where the data are")
    side = "side of the images that the network takes, for folder (default: 224 where its pictures differ in size)"
    p.add_argument("--size", type=cli.positive, metavar="N", help=side)
    p.add_argument("--weights", type=Path, metavar="FILE", help="of the trained network; none: train one here")
    cli.add_chain(p)
    p.add_argument("--out", type=cli.file, required=True, metavar="FILE", help="the config, a new .toml file")
    return p


class Sizes(NamedTuple):
    """What a config says of its data."""

    rows: Mapping[str, int]
    """Of each split."""
    shape: tuple[int, ...]
    classes: int
    reading: tuple[str, ...] = ()
    """Lines on how pictures become images of that shape."""


def sizes_of(name: str, folder: Path | None, side: int | None = None) -> Sizes:
    """Return the rows of each split of a data set, the shape of an image, and the number of classes.

    Raises:
        InputError: There is no split that has one of the usual names; a side is given for other data than a folder.
    """
    if side is not None and name != "folder":
        raise InputError(f"--size: expected it with --data folder, whose pictures are resized, got it with {name}")
    if name in {"folder", "npz"} and folder is None:
        raise InputError(f"--data-dir: expected the folder or file of {name}, got none")
    found: dict[str, Dataset | Opened] = {}
    for split in SPLITS:
        try:
            found[split] = open_split(name, split, folder)
        except InputError as error:
            if not str(error).startswith("split:"):
                raise
    if not found:
        raise InputError(f"--data: expected a data set with a split {', '.join(SPLITS)}, got {name} without")
    first = next(iter(found.values()))
    named = [1 + int(part.labels.max()) for part in found.values() if part.labels is not None]
    classes = len(first.class_names) or max(named, default=10)
    rows: Any = first.images
    shape, reading = pictures_shape(rows, side) if name == "folder" else (rows.shape[1:], ())
    return Sizes({split: len(part.images) for split, part in found.items()}, tuple(shape), classes, reading)


def open_split(name: str, split: str, folder: Path | None) -> Dataset | Opened:
    """Return a split; of a folder the paths of its pictures, of an archive what is not read yet."""
    if folder is not None and name == "folder":
        paths, labels, class_names, _ = list_pictures(folder, split)
        return Opened(paths, labels, class_names)
    if folder is not None and name == "npz":
        return open_npz(folder, split)
    return data.load(name, split, folder)


def pictures_shape(paths: Sequence[str], side: int | None) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the shape of the images that pictures become, and how, as lines of a config."""
    if side is None:
        sample = {paths[i * (len(paths) - 1) // (_SAMPLE - 1)] for i in range(_SAMPLE)}
        some = {Transform().picture(read_regular(path), path).shape for path in sample}
        if len(some) == 1:
            return some.pop(), ()
        side = _SIDE
    resize = side * 8 // 7 if side >= _SMALL else side  # 256 for 224, as torchvision's transforms have it
    check = "CHECK: resize and crop as the weights' evaluation transform; the shorter side in pixels"
    return (side, side, 3), (f"resize = {resize} # {check}", f"crop = {side} # the centre")


def known_base(weights: Path, entry: Entry) -> str:
    """Return [base] for weights that describe themselves."""
    told = printable(f"{entry.network}, {entry.accuracy:.2%} right on {entry.split}: the file says the rest itself")
    return f"[base] # {told}\nweights = {_toml(str(weights))}"


def plain_base(weights: Path | None, network: str, shape: tuple[int, ...], classes: int) -> str:
    """Return [base] for other weights, or for those that train-base will write."""
    usual = IMAGENET if shape[-1] == len(IMAGENET["mean"]) else {"mean": [0.5], "std": [0.5]}
    lines = [
        "[base]",
        f"network = {_toml(network)}" + (" # found by the tensors of the weights" if weights else " # CHECK"),
        f"weights = {_toml(str(weights or TRAINED))}"
        + ("" if weights else f" # gati-jax train-base --out {TRAINED.parent}"),
        f"classes = {classes}",
        f"input_shape = {list(shape)}",
        "",
        "[base.normalization] # CHECK: how its inputs were normalised in training, (pixel * scale - mean) / std",
        *(f"{key} = {value}" for key, value in usual.items()),
    ]
    return "\n".join(lines)


def network_of(weights: Path, shape: tuple[int, ...], classes: int) -> str:
    """Return the name of the network that has these tensors.

    Raises:
        WeightsError: None of this library has.
    """
    tensors = read_weights(weights)
    last = [array.shape for name, array in tensors.items() if name.endswith(("fc.weight", "linear.weight"))]
    if last and last[0][0] != classes:
        raise WeightsError(f"--weights: expected a classifier of the data's {classes} classes, got one of {last[0][0]}")
    convolutions = sum(array.ndim == _KERNEL for array in tensors.values())
    for name in NAMES:
        try:
            network = architecture(name, classes=classes, input_shape=_three(shape))
            if sum(map(len, network.layers())) == convolutions:  # the others need no second look, which takes seconds
                import_state_dict(network, tensors)
                return name
        except InputError:  # too deep for such images, or other tensors
            continue
    raise WeightsError(
        f"--weights: expected the tensors of one of {', '.join(NAMES)}, got others; a network of your own is named by"
        " --chain package.module:function"
    )


def _three(shape: tuple[int, ...]) -> tuple[int, int, int]:
    if len(shape) != len(("height", "width", "channels")):
        raise InputError(f"--data: expected images [height, width, channels], got {list(shape)}")
    height, width, channels = shape
    return height, width, channels


def config_text(arguments: argparse.Namespace, sizes: Sizes, entry: Entry | None, steps: list[str], below: str) -> str:
    """Return the config; ``steps`` are the commands that it is for, ``below`` is what follows the data."""
    run, commands = arguments.out.stem, "\n".join(f"#   {step}" for step in steps)
    own = f" --chain {arguments.chain}" if arguments.chain else ""  # which a bundle does not name
    splits, trained, source = split_lines(
        sizes.rows, entry.trained_on if entry and entry.dataset == arguments.data else None
    )
    folder = f"\ndir = {_toml(str(arguments.data_dir))}" if arguments.data_dir else ""
    reading = "".join(f"\n{line}" for line in sizes.reading)
    return f"""\
# Caches for a network on {arguments.data}, written by gati-jax init. Every key: gati-jax fit --help
#
{commands}
#   gati-jax evaluate --bundle runs/{run}/bundle{own} --out runs/{run}/eval
#   gati-jax serve --bundle runs/{run}/bundle{own}
seed = 0

[data]
name = {_toml(arguments.data)}{folder}{reading}
base_trained_on = {json.dumps(trained, ensure_ascii=False)} # {source}

[data.splits] # disjoint; select and certify: rows that the base was not trained on
{splits}

{below}"""


def split_lines(rows: Mapping[str, int], trained_on: tuple[str, ...] | None) -> tuple[str, list[str], str]:
    """Deal rows to the four splits; return their lines, what the base was trained on, and how that is known."""
    names = list(rows)
    fit, other = names[0], names[-1]
    if fit == other:  # one split for all
        half, n = rows[fit] // 2, rows[fit]
        edges = [half, half + (n - half) // 3, half + 2 * (n - half) // 3]
        fitted, trained = f"{fit}[:{half}]", [f"{fit}[:{half}]"]
    else:
        n = rows[other]
        edges = [0, n // 4, n // 2]
        fitted, trained = fit, [fit]
    lines = [
        f'fit = "{fitted}" # trains the caches',
        f'select = "{other}[{edges[0] or ""}:{edges[1]}]" # the plan is composed on it',
        f'certify = "{other}[{edges[1]}:{edges[2]}]" # opened once the plan is fixed',
        f'test = "{other}[{edges[2]}:]" # nothing is chosen on it',
    ]
    if trained_on is not None:
        return "\n".join(lines), list(trained_on), "as the weights say"
    return "\n".join(lines), trained, "CHECK: the rows that the base was trained on; a certificate depends on it"


def shipped(name: str, networks: Sequence[str], begin: str, holds: str = "") -> str | None:
    """Return the library's own config for a data set and one of these networks, from a section on, if there is one."""
    for network, file in itertools.product(networks, sorted(CONFIGS.glob("*.toml"))):
        text = file.read_text(encoding="utf-8")
        if f'\nname = "{name}"' in text and f'\nnetwork = "{network}"' in text and begin in text and holds in text:
            return f"# From here on as in {file.name} of the library.\n{begin}{text.partition(begin)[2]}"
    return None


def _fit(out: Path) -> str:
    return f"gati-jax fit --config {out} --out runs/{out.stem}"


def _toml(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


if __name__ == "__main__":
    cli.run(main)
