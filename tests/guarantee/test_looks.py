"""Attacks on a series of looks at certify rows, all of which fail: what it may certify, tells, and remembers."""

import functools
import json
import multiprocessing
import re

import numpy as np
import pytest
from scipy.stats import binom

import gati_jax
from gati_jax import InputError, Ledger
from gati_jax.certification import Looks, find_ledger
from tests.planning.reference import OFF, make_plan, make_table

pytestmark = pytest.mark.filterwarnings("ignore:look")
N, EPSILON, DELTA = 130, 0.1, 0.1
PLANS = [make_plan([[OFF], [threshold]], depth=2) for threshold in (1.0, 0.9, 0.8, 0.7, 0.6)]


def table(wrong, *, n=N, first_row=0):
    """All n requests hit at every threshold; ``wrong`` of them disagree."""
    return make_table([np.arange(n) < wrong], np.ones((1, n)), depth=2, first_row=first_row)


def most_passing(level, n=N):
    return max(k for k in range(n) if binom.cdf(k, n, EPSILON) <= level)


def test_look_j_is_tested_at_its_part_of_delta():
    for wrong in range(12):
        ledger = Ledger()
        for j, plan in enumerate(PLANS, 1):
            level = 6 * DELTA / (np.pi * j) ** 2
            passes = wrong <= most_passing(level)
            certificate = gati_jax.certify(plan, table(wrong), EPSILON, DELTA, ledger=ledger)
            assert (certificate.certified, certificate.looks, certificate.recorded) == (passes, j, True)
            assert certificate.level == pytest.approx(level)
            if passes:
                break


def test_a_look_on_the_user_s_word_is_tested_at_delta_and_says_so():
    wrong = most_passing(DELTA)
    assert wrong > most_passing(6 * DELTA / np.pi**2)
    certificate = gati_jax.certify(PLANS[0], table(wrong), EPSILON, DELTA, ledger=None)
    assert (certificate.certified, certificate.recorded, certificate.looks) == (True, False, 1)
    assert "user's word" in certificate.basis
    assert not gati_jax.certify(PLANS[0], table(wrong), EPSILON, DELTA).certified  # the user's own ledger counts it


def test_a_failed_look_tells_nothing_until_it_is_asked_to():
    ledger = Ledger()
    few = gati_jax.certify(PLANS[0], table(40), EPSILON, ledger=ledger)
    many = gati_jax.certify(PLANS[0], table(60), EPSILON, ledger=Ledger())
    assert few == many  # whatever failed, and by however much
    assert "reveal" in few.stays_off[0]
    told = gati_jax.certify(PLANS[0], table(40), EPSILON, ledger=ledger, reveal=True)
    assert (told.looks, "30.77% of 130 disagree" in told.stays_off[0]) == (1, True)
    with pytest.raises(InputError, match=r"ledger: expected certify rows that are open, but 130 of 130 are closed"):
        gati_jax.certify(PLANS[1], table(0), EPSILON, ledger=ledger)


def test_a_look_that_passed_ends_the_series_and_keeps_its_answer():
    ledger = Ledger()
    first = gati_jax.certify(PLANS[0], table(0), EPSILON, ledger=ledger)
    assert first.certified
    for again in (PLANS[1], make_plan([[OFF], [1.0], [0.5]], depth=2)):
        with pytest.raises(InputError, match="closed since a plan was certified on them"):
            gati_jax.certify(again, table(0), EPSILON, ledger=ledger)
    with pytest.raises(InputError, match="closed"):
        gati_jax.certify(PLANS[0], table(0), 0.2, ledger=ledger)  # nor at another epsilon
    assert gati_jax.certify(PLANS[0], table(0), EPSILON, ledger=ledger) == first
    assert gati_jax.certify(PLANS[1], table(0, first_row=N), EPSILON, ledger=ledger).looks == 1  # fresh rows


def test_old_rows_among_fresh_ones_count():
    """Adding rows to those that failed is a look at the old ones, too."""
    ledger = Ledger()
    gati_jax.certify(PLANS[0], table(20), EPSILON, ledger=ledger)
    assert gati_jax.certify(PLANS[0], table(20, n=2 * N), EPSILON, ledger=ledger).looks == 2
    assert gati_jax.certify(PLANS[0], table(20, first_row=2 * N - 1), EPSILON, ledger=ledger).looks == 3
    assert gati_jax.certify(PLANS[0], table(20, first_row=5 * N), EPSILON, ledger=ledger).looks == 1
    gati_jax.certify(PLANS[0], table(20), EPSILON, ledger=ledger, reveal=True)
    with pytest.raises(InputError, match="1 of 130 are closed"):
        gati_jax.certify(PLANS[1], table(0, first_row=N - 1), EPSILON, ledger=ledger)


def test_plans_of_one_look_count_once_in_any_order():
    ledger = Ledger()
    two = {"tight": (PLANS[0], 0.1), "loose": (PLANS[1], 0.2)}
    first = gati_jax.certify_together(two, table(90), ledger=ledger)
    again = gati_jax.certify_together(dict(reversed(two.items())), table(90), ledger=ledger)
    assert first == again
    assert {c.looks for c in first.values()} == {1}
    alone = gati_jax.certify(PLANS[0], table(90), 0.1, ledger=ledger)  # it has all of the level
    assert alone.looks == 2
    assert gati_jax.certify_together(two, table(90), 0.2, ledger=ledger)["tight"].looks == 3
    assert gati_jax.certify_conditional(PLANS[0], table(90), 0.1, ledger=ledger).looks == 4


def test_rows_that_were_shown_are_closed_however_few_of_them_were_before():
    """An evaluation tells how often a plan disagrees: the best of ten evaluated plans may be best by chance."""
    ledger, rows, shown = Ledger(), table(0).rows, {"default": (PLANS[0], EPSILON)}
    gati_jax.certify(PLANS[1], table(0, n=50), EPSILON, ledger=ledger)
    assert ledger.still_open(rows).tolist() == rows[50:].tolist()
    for _ in range(2):
        ledger.reveal(rows, shown, DELTA)
        assert not len(ledger.still_open(rows))
    with pytest.raises(InputError, match="80 of 80 are closed since what a look at them showed was told"):
        gati_jax.certify(PLANS[2], table(0, n=80, first_row=50), EPSILON, ledger=ledger)
    assert len(ledger.read().at(rows[50:]).looks) == 1


def test_a_path_is_a_ledger(tmp_path):
    path = tmp_path / "looks.json"
    looks = [gati_jax.certify(plan, table(40), EPSILON, ledger=path).looks for plan in PLANS[:2]]
    assert (looks, gati_jax.certify(PLANS[2], table(40), EPSILON, ledger=str(path)).looks) == ([1, 2], 3)


def test_a_ledger_that_is_no_file_or_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path, tmp_path / "file" / "looks.json"):
        with pytest.raises(InputError, match=rf"ledger: expected a file that can be read and written, got {path} \("):
            gati_jax.certify(PLANS[0], table(40), EPSILON, ledger=Ledger(path))


@pytest.mark.parametrize("wrong", [0, 90])
def test_rows_that_a_certified_plan_was_composed_on_certify_no_other(wrong):
    ledger, swapped = Ledger(), make_plan([[OFF], [0.5]], depth=2, first_row=0)
    gati_jax.certify(PLANS[0], table(wrong), EPSILON, ledger=ledger)
    select = table(0, n=100, first_row=10**9)
    assert gati_jax.certify(swapped, select, EPSILON, ledger=Ledger()).certified
    with pytest.raises(InputError, match=r"100 of 100 are closed since a plan .* was composed on them"):
        gati_jax.certify(swapped, select, EPSILON, ledger=ledger)


def test_advice_asks_for_fresh_rows_and_reckons_with_a_first_look():
    failed = gati_jax.certify(PLANS[0], table(8), EPSILON, DELTA, ledger=Ledger(), reveal=True)
    (count,) = re.findall(r"about (\d+) fresh certify rows, without any of these", failed.stays_off[0])
    n = int(count)
    assert binom.cdf(np.ceil(8 / N * n), n, EPSILON) <= 6 * DELTA / np.pi**2


def test_the_file_is_shared_and_outlives_a_process(tmp_path):
    path = tmp_path / "state" / "looks.json"
    gati_jax.certify(PLANS[0], table(40), EPSILON, ledger=Ledger(path))
    assert gati_jax.certify(PLANS[1], table(40), EPSILON, ledger=Ledger(path)).looks == 2
    written = json.loads(path.read_text())
    opened = [look for look in written["looks"] if look["closed"] != "composed"]
    assert [(look["number"], look["closed"]) for look in opened] == [(1, ""), (2, "")]
    text = path.read_text()
    for damaged in (
        "{",
        "[]",
        "{}",
        '{"looks": [1], "rows": {}}',
        text.replace('"rows"', '"row"'),
        text[:-20],
        text.replace('"plan_hash": "', '"plan_hash": "\\u001b[2J'),
    ):
        path.write_text(damaged)
        with pytest.raises(InputError, match=r"looks: expected a whole looks\.json"):
            gati_jax.certify(PLANS[2], table(40), EPSILON, ledger=Ledger(path))
        assert path.read_text() == damaged


def test_without_its_file_a_process_still_remembers(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GATI_JAX_LEDGER", str(tmp_path / "file" / "looks.json"))  # cannot be written
    with pytest.warns(UserWarning, match="only this process counts them"):
        gati_jax.certify(PLANS[0], table(40), EPSILON)
    with pytest.warns(UserWarning, match="only this process counts them"):
        assert gati_jax.certify(PLANS[1], table(40), EPSILON).looks == 2


def test_files_of_older_versions_are_read_as_closed(tmp_path):
    """Those had told the counts of every look."""
    path, rows = tmp_path / "looks.json", np.arange(N, dtype="<u8")
    old = {"plan_hash": "p", "data_fingerprint": "f", "epsilon": 0.1, "delta": 0.05}
    path.write_text(json.dumps({"looks": [old], "rows": {"f": rows.tobytes().hex()}}))
    with pytest.raises(InputError, match="closed"):
        gati_jax.certify(PLANS[0], table(0), EPSILON, ledger=Ledger(path))


def _look(path, i):
    gati_jax.certify(PLANS[i], table(40), EPSILON, ledger=Ledger(path))


def test_processes_do_not_lose_each_other_s_looks(tmp_path):
    path = tmp_path / "looks.json"
    with multiprocessing.get_context("spawn").Pool(3) as pool:  # JAX's threads do not survive a fork
        pool.map(functools.partial(_look, path), range(3), chunksize=1)
    looks = Looks.model_validate_json(path.read_bytes()).looks
    assert sorted(look.number for look in looks if look.closed != "composed") == [1, 2, 3]


def test_a_bundle_carries_its_looks_to_another_ledger(tmp_path, monkeypatch, chain, candidates, splits, costs):
    plan = gati_jax.plan(gati_jax.replay(chain, candidates, splits["select"]), costs, epsilon=0.08)
    certify = gati_jax.replay(chain, candidates, splits["certify"])
    certificate = gati_jax.certify(plan, certify, 0.08, 0.1)
    gati_jax.save_bundle(tmp_path / "bundle", chain, candidates, plan, certificate)
    monkeypatch.setenv("GATI_JAX_LEDGER", str(tmp_path / "elsewhere.json"))
    elsewhere = find_ledger("user")
    assert elsewhere
    assert not elsewhere.closed(certify.rows)
    gati_jax.load_bundle(tmp_path / "bundle", chain=chain)
    with pytest.raises(InputError, match="350 of 350 are closed"):
        gati_jax.certify(plan, certify, 0.2)
