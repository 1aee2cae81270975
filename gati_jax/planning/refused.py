"""Why a candidate was not chosen, in a sentence."""

import numpy as np

from .local import alternatives
from .options import Choice, Options, evaluate, used
from .tables import CostTable, ReplayTable

RESOURCES = ("bytes of memory", "ms of lookups on a full miss", "sites")


def reasons(table: ReplayTable, costs: CostTable, options: Options, choice: Choice) -> dict[str, str]:
    """Return a sentence for every candidate that ``choice`` leaves out."""
    chosen = {option[0] for option in choice if option is not None}
    now_ms = evaluate(options, choice)[0]
    told: dict[str, str] = {}
    for site, option in enumerate(choice):
        found = alternatives(options, choice, site)
        within = found.allowed & (found.wrong <= options.disagreements)
        best = np.where(within, found.ms, np.inf).min(1, initial=np.inf)
        for c, ms in zip(found.candidates, best, strict=True):
            if c not in chosen:
                rival = None if option is None else table.names[option[0]]
                lost = (float(ms) - now_ms) / options.n
                told[table.names[c]] = _alone(table, costs, options, int(c)) or _beside(
                    options, choice, site, int(c), rival, lost
                )
    return told


def _alone(table: ReplayTable, costs: CostTable, options: Options, c: int) -> str | None:
    """Say what keeps a candidate out whatever else is chosen."""
    behind = costs.full_ms - costs.until(table.sites[c])
    if options.lookup_ms[c] >= behind:
        return f"its lookup takes {options.lookup_ms[c]:.3f} ms, all blocks behind it {behind:.3f} ms"
    for need, limit, what in zip(options.uses[c], options.limits, RESOURCES, strict=True):
        if need > limit * (1 + 1e-12):
            return f"over the budget by itself: {need:g} {what}, {max(0.0, limit):g} allowed"
    if not len(options.thresholds[c]):
        return "it answers nothing"
    return None


def _beside(options: Options, choice: Choice, site: int, c: int, rival: str | None, lost: float) -> str:
    """Compare with the choice, the other sites staying as they are."""
    others = used(options, (*choice[:site], None, *choice[site + 1 :]))
    for need, limit, what in zip(others + options.uses[c], options.limits, RESOURCES, strict=True):
        if need > limit * (1 + 1e-12):
            return f"no room beside the others: {need:g} {what}, {limit:g} allowed"
    if np.isinf(lost):
        return "at every threshold too many requests would disagree"
    if rival is not None:
        return f"{rival} at the same site saves {max(0.0, lost):.3f} ms more"
    return f"would cost {max(0.0, lost):.3f} ms more than it saves beside the others"
