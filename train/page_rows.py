"""The papers' figures beside ours: what the page of a reproduction says of every one."""

from gati_jax.caches import MIB

from . import published
from .markdown import NOT_RUN, link, percent, table
from .results import Freeze, Kind, Protocol, Reproduction, Speed

BLOCKS = range(1, 9)  # of ResNet-18
NAMES: dict[Kind, str] = {"knn": "k-NN", "kmeans": "k-means"}
SERVED = {
    "half_share": "half of the blocks saved for",
    "before_output_share": "frozen before the output",
    "agreement": "agreement with the base",
}


def predictors(freeze: Freeze | None) -> list[str]:
    """Say how often the paper's predictors agree with the base behind every block."""
    rows = []
    ours = {} if freeze is None else freeze.predictors
    for kind, shares in published.PREDICTORS.items():
        own = ours.get(kind, {})
        rows.append([f"{kind}, published", *(f"{share:g}" for share in shares)])
        rows.append([f"{kind}, ours", *(f"{100 * own[b]:.2f}" if b in own else NOT_RUN for b in BLOCKS)])
    how = ""
    if freeze and ours:
        many = f" for {freeze.epochs:g} epochs" if freeze.epochs is not None else ""
        how = f" By {link('freeze', freeze)}, on {freeze.n:,} requests; ours were trained{many}."
    why = (
        f"Agreement with the base on test images, in percent.{how} The published ones were trained for many more"
        " epochs, and with the teacher's softmax applied twice."
    )
    return ["## Predictors behind every block", table(["predictor", *(f"block {i}" for i in BLOCKS)], rows), why]


def gains(result: Reproduction | None) -> list[list[str]]:
    """Compare latency; a gain stands where the device belongs."""
    here = "GPU" if result and result.device and not result.device.startswith("cpu") else "CPU"
    rows = []
    for device, gain in published.GAIN.items():
        name = f"latency gain at 97 % of the base's accuracy, {device}, batch 1"
        off = f"{name}, read off the test curve, as published"
        if result is None or device != here:
            why = f"measured on {result.device} only" if result else ""
            rows += [[said, f"{gain}", NOT_RUN, "-", why] for said in (name, off)]
        else:
            rows += [[name, f"{gain}", *_accurate(result)], [off, f"{gain}", *_read_off_test(result)]]
    epsilon = result.epsilon if result else 0.01
    certified = f"latency gain certified at {100 * epsilon:g} % disagreement, {here}, batch 1"
    memory = [
        "caches' share of the base's bytes, at 97 % / certified",
        "22 times them, for FC(1024) behind every block",
    ]
    if result is None:
        return [*rows, [certified, "none", NOT_RUN, "-", ""], [*memory, NOT_RUN, "-", ""]]
    by, both = link("reproduce", result), (result.measured.accurate, result.measured.certified)
    shares = " / ".join(percent(speed.cache_bytes / speed.base_bytes, 1) for speed in both)
    return [
        *rows,
        [certified, "none", _gain(result.measured.certified), by, _certified(result)],
        [*memory, shares, by, "pooled and convolutional heads"],
    ]


def _accurate(result: Reproduction) -> tuple[str, str, str]:
    kept = percent(result.accurate.rows[0].accuracy / result.base.accuracy)
    return _gain(result.measured.accurate), link("reproduce", result), f"step chosen on certify; keeps {kept} on test"


def _read_off_test(result: Reproduction) -> tuple[str, str, str]:
    if (speed := result.measured.read_off_test) is None:
        return NOT_RUN, "-", ""
    return _gain(speed), link("reproduce", result), "this step was chosen on test, which flatters it"


def _gain(speed: Speed) -> str:
    return f"{speed.speedup:.2f} (spread {percent(speed.spread, 0)}, ideal {speed.ideal:.2f})"


def _certified(result: Reproduction) -> str:
    """Say how the default plan was certified."""
    group = result.certified
    parts = [f"delta {result.delta:g}"]
    if found := group.disagreements.get(group.rows[0].policy):
        parts.append(f"{found[0]} of {found[1]} disagreed on certify")
    if result.looks is not None:
        parts.append(f"look {result.looks} at these rows")
    return "; ".join(parts)


def oracles(reproduction: Reproduction | None, freeze: Freeze | None) -> list[list[str]]:
    """Compare what could be saved by somebody who knows when a cache is right."""
    theirs = _share(published.FREEZE["oracle"]["half_share"])
    rows = []
    for kind, name in NAMES.items():
        own = freeze.oracle.get(kind) if freeze else None
        ours, by = (percent(own.half_share), link("freeze", freeze)) if own else (NOT_RUN, "-")
        said = (theirs, "the same question") if kind == "knn" else ("none", "")
        rows.append([f"oracle over {name} caches: half of the blocks saved for", said[0], ours, by, said[1]])
    name, why = "oracle over any explored candidate: half of the blocks saved for", "theirs is over k-NN caches alone"
    if reproduction is None:
        return [*rows, [name, theirs, NOT_RUN, "-", why]]
    ours = percent(reproduction.oracle.half_share)
    why = f"{why}, ours may ask any of {reproduction.candidates}"
    return [*rows, [name, theirs, ours, link("reproduce", reproduction), why]]


def neighbours(result: Freeze | None) -> list[list[str]]:
    """Compare Freeze Inference's caches, under both thresholds."""
    rows = []
    for kind, name in NAMES.items():
        for split in ("seen", "clean"):
            protocol = getattr(result.protocols, split) if result else None
            served = getattr(protocol, kind) if protocol else None
            said = _thresholds(split, result, protocol)
            for key, figure in SERVED.items():
                ours = percent(getattr(served, key)) if served else NOT_RUN
                by = link("freeze", result if served else None)
                rows.append([f"{name}: {figure}", _share(published.FREEZE[kind][key]), ours, by, said])
    for kind, name in NAMES.items():
        own = result.memory.get(kind) if result else None
        total = f"{sum(cache.total for cache in own) / MIB:,.0f}" if own else NOT_RUN
        by, why = link("freeze", result if own else None), "ours with key networks; see [freeze.md](freeze.md)"
        rows.append([f"{name}: memory, MB", published.FREEZE_MEMORY[kind], total, by, why])
    return rows


def _thresholds(split: str, result: Freeze | None, protocol: Protocol | None) -> str:
    """Say where thresholds are from."""
    if result is None or protocol is None:
        return "thresholds from images that the base has " + ("seen" if split == "seen" else "not seen")
    knows = "the base was" if protocol.base_saw_thresholds else "the base was not"
    return f"thresholds from `{result.splits.get(split, split)}`, on which {knows} trained"


def others() -> list[list[str]]:
    """List what nothing here has measured."""
    return [[figure, theirs, NOT_RUN, "-", why] for figure, theirs, why in published.OTHERS]


def _share(published_share: float | None) -> str:
    return "none" if published_share is None else f"{100 * published_share:g} %"
