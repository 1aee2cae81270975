"""The evaluation page: a true headline, figures to scale, well-formed, escaped, whole where something is missing."""

import json
import re
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gati_jax.certification import AccuracyGap
from gati_jax.certification.certificate import BAD_GROUPS
from gati_jax.display import percent
from tests.train.made_up import BLOCKS_MS, DEPTH, EXITS, N, Page, evaluation, made_up, pictures, shapes
from train import cli
from train.evaluate import base_command
from train.report import write_report
from train.report.figures import FIGURES
from train.report.page import LIGHT, NARROW, WIDE, ZOOM, render
from train.report.pictures import Wall
from train.report.svg import text_width
from train.report.words import headline, saved_share, share
from train.results import Evaluation

HOSTILE = "<script>alert('x')</script>\"&"
CONTROL = "\x00\x1b[2J\ud800"
NO_PICTURES = Wall({}, missing="Nothing to see.")


def page(**changes) -> Page:
    e = made_up(**changes)
    return Page(render(e, pictures(e)))


def test_the_page_is_well_formed_says_what_the_evaluation_says_and_loads_nothing():
    p, e = page(), made_up()
    assert e.cost is not None
    for exit_ in e.exits[:-1]:
        row = next(row for row in p.rows if row[0] == f"site {exit_.exit}")
        assert row[1:3] == [f"{exit_.hits:,}", share(exit_.hit_rate, digits=1)]
    assert ["base", "300", "15%", "100%", "-"] in p.rows
    first = e.cost.measured[0]
    assert [f"{first.speedup:.3f}"] == next(row for row in p.rows if row[0] == "1" and " to " in row[2])[1:2]
    for point in e.path:
        assert any(row[0].split()[0] == str(point.step) and row[2] == share(point.agreement) for row in p.rows)
    assert ["cat", "bird", "9"] in p.rows
    for said in ("Of the 2,500 certify requests, 30 disagreed (1.2%)", "44.70 MB", "1.23 MB", "0.13% of such samples"):
        assert said in p.words
    assert e.commands[0] in p.text
    assert not {"script", "link", "iframe", "object"} & set(p.tags)
    assert all(source.startswith("data:image/png;base64,") for source in p.values("src"))
    assert all(target.startswith("#") for target in p.values("href"))
    assert "http" not in render(e, pictures(e))
    assert len(p.values("id")) == len(set(p.values("id")))
    assert {target[1:] for target in p.values("href")} <= set(p.values("id"))


FASTER = "1.76 times as fast as your network (1.71 to 1.81), one request at a time"
CERTIFIED = "at most 2% of answers differ, with 95% confidence"
UNCERTIFIED = "how often answers differ is not certified (0.8% did here)"
NO_FASTER = "No faster: your network answers every request"
ROUNDED = {"served__epsilon": 0.02001, "served__delta": 0.05004}
OTHER = {"served__epsilon": 0.0234, "served__delta": 0.06, "served__numerics": "fast"}
GROUPS = {
    "certificate__method": BAD_GROUPS,
    "certificate__promise": "in at most 5% of groups, more than 2% of requests disagree",
    "served__epsilon": 0.069,
}
EMPTY = {
    "certificate__certified": False,
    "exits": [{"exit": DEPTH, "hits": N, "hit_rate": 1.0, "agreement": 1.0, "interval": [0.99, 1.0]}],
    "cascade__agreement": 1.0,
    "confusions": [],
    "classes": [],
}
BROKEN = {"cascade__agreement": 0.97, "certificate__holds": False}


@pytest.mark.parametrize(
    ("changes", "sentence", "tile", "line"),
    [
        ({}, f"{FASTER}; {CERTIFIED}", "certified: at most 2% of answers differ", "98%"),
        ({"cost": None}, f"Speed not measured; {CERTIFIED}", "certified: at most 2% of answers differ", "98%"),
        ({"served": None}, f"{FASTER}; {CERTIFIED}", "certified: at most 2% of answers differ", "98%"),
        # A bound is rounded up, a confidence down.
        (
            ROUNDED,
            f"{FASTER}; at most 2.01% of answers differ, with 94.99% confidence",
            "certified: at most 2.01% of answers differ",
            "97.99%",
        ),
        # The bound is that of the answers that were measured, not of those that were certified.
        (
            OTHER,
            f"{FASTER}; at most 2.34% of answers differ, with 94% confidence",
            "certified: at most 2.34% of answers differ",
            "97.66%",
        ),
        (
            GROUPS,
            f"{FASTER}; in at most 5% of groups, more than 2% of requests disagree, with 95% confidence",
            "certified: in at most 5% of groups, more than 2% of requests disagree",
            None,
        ),
        ({"served__epsilon": None}, f"{FASTER}; {UNCERTIFIED}", "nothing is certified", None),
        ({"certificate__base_saw_data": True}, f"{FASTER}; {UNCERTIFIED}", "nothing is certified", None),
        (
            BROKEN,
            f"{FASTER}; 3% of answers differed here, where at most 2% of answers differ is certified",
            "certified: at most 2% of answers differ",
            "98%",
        ),
        (
            {"certificate__certified": False},
            f"{NO_FASTER}; 0.8% of answers differed here",
            "nothing is certified",
            None,
        ),
        (EMPTY, f"{NO_FASTER}; its answers are unchanged", "nothing is certified", None),
    ],
)
def test_title_tile_and_figures_promise_the_same(changes, sentence, tile, line):
    e = made_up(**changes)
    p = Page(render(e, pictures(e)))
    assert sentence in p.words
    assert headline(e).sentence == sentence
    assert f"here; {tile}" in p.words
    drawn = [shape.text or "" for shape in shapes("agreement", "small", **changes)]
    assert [text for text in drawn if "certified" in text] == ([f"{line} certified over all"] if line else [])
    assert FIGURES["certificate"].has(e) == (line is not None)
    if line:
        (label,) = shapes("certificate", "strong", **changes)
        assert tile.startswith(label.text or "nothing")
    warned = "does not hold" in p.words
    assert warned == (changes is BROKEN)
    assert ("of such samples" in p.words) == (e.certificate.certified and changes is not GROUPS)


def test_requests_in_groups_that_disagree_more_often_do_not_break_a_bound_over_groups():
    p = Page(render(e := made_up(**GROUPS, cascade__agreement=0.9), pictures(e)))
    assert "does not hold" not in p.words
    assert "disagreed (1.2%); the bound is not of single requests drawn at random" in p.words


def test_a_small_network_before_the_first_block_is_time_that_is_spent():
    placed = evaluation()["layout"]["caches"]
    small = {**placed[0], "name": "resnet20", "site": 0, "lookup_ms": 0.25 * sum(BLOCKS_MS)}
    without, first = made_up(), made_up(layout__caches=[small, *placed[1:]])
    assert saved_share(first) == pytest.approx(saved_share(without) - 0.25)
    assert "skipped, the small network counted, lookups left out" in Page(render(first, pictures(first))).words
    drawn = [float(shape.get("width", 0)) for shape in shapes("flow", "block", layout__caches=[small, *placed[1:]])]
    (bar,) = (s for s in shapes("flow", "cascade", layout__caches=[small, *placed[1:]]) if "small" in (s[0].text or ""))
    assert float(bar.get("width", 0)) == pytest.approx(0.25 * sum(drawn), rel=0.1)


def test_a_table_has_the_exits_of_every_class():
    rows = Page(render(e := made_up(), pictures(e))).rows
    for one in e.classes:
        assert [one.name, *(f"{n:,}" for n in (one.n, *one.exits, one.disagreements))] in rows


def timed(**changes: Any) -> dict[str, Any]:
    """The costs of an evaluation with other measurements of single requests."""
    cost = evaluation()["cost"]
    speedup = changes.get("speedup", cost["measured"][0]["speedup"])
    cost["measured"][0].update({"interval": [0.99 * speedup, 1.01 * speedup], "typical": speedup} | changes)
    return cost


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"speedup": 12.34}, "12.3 times as fast as your network (12.2 to 12.5), one request at a time;"),
        ({"speedup": 1.03}, "About as fast as your network, one request at a time (1.03 times, 1.02 to 1.04);"),
        ({"speedup": 0.5}, "Slower than your network, one request at a time: 2.0 times its time (1.98 to 2.0);"),
        # The times do not tell the two apart, however the mean fell.
        ({"speedup": 1.4, "interval": [0.98, 1.9]}, "About as fast as your network, one request at a time (1.40"),
        ({"speedup": 0.65, "interval": [0.5, 1.01]}, "About as fast as your network, one request at a time (0.65"),
        ({"speedup": 1.4, "interval": [1.01, 1.9]}, "1.40 times as fast"),
        ({"speedup": 1.4, "interval": None, "typical": None}, "1.40 times as fast as your network, one request at a"),
        ({"speedup": 1.4, "batch": 8}, "1.40 times as fast as your network (1.39 to 1.41), in batches of 8;"),
    ],
)
def test_the_headline_says_how_fast(changes, said):
    assert headline(made_up(cost=timed(**changes))).sentence.startswith(said)


def test_the_headline_says_where_requests_leave():
    assert headline(made_up()).leaving == (
        "85% of requests leave early; the largest share, 35% of all, after block 2 of 8, with 18% of the network's"
        " computation done; 15% run through the whole network."
    )
    assert "no cache is on" in headline(made_up(**EMPTY)).leaving


@pytest.mark.parametrize(("first", "mostly"), [(850, False), (852, True)])
def test_most_are_more_than_half_of_those_that_leave_early(first, mostly):
    exits = evaluation()["exits"]
    for one, hits in zip(exits, (first, 1200 - first, 500, 300), strict=True):
        one.update(hits=hits, hit_rate=hits / N)
    assert ("most of them" in headline(made_up(exits=exits)).leaving) == mostly


GAP = AccuracyGap(n=2500, losses=17, gains=11, upper=0.0123, delta=0.1)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"certificate__accuracy_gap": GAP}, "at most 1.23% less accurate than your network, with 90% confidence"),
        ({"certificate__accuracy_gap": GAP}, "17 right answers were lost and 11 gained (betting"),
        ({"certificate__plans": 3}, "plan 1% of 3 certified together"),
        ({"certificate__base_saw_data": True}, "the base was trained on the certify rows"),
        (BROKEN, "does not hold here: 3% of these 2,000 requests disagreed"),
        ({"certificate__base_saw_data": True}, "Of requests that your network was trained on: at most 2%"),
        (OTHER, "By reference arithmetic: at most 2% of requests disagree"),
        ({"served__epsilon": None, "served__text": "fast arithmetic"}, "they were given by fast arithmetic"),
        ({"layout__unsteady": "they spread by 202%"}, "unreliable: they spread by 202%"),
        ({"certificate__certified": False}, "Nothing could be certified"),
        ({"base__accuracy": None}, "There are no labels"),
        ({"cost": None}, "Latency was not measured"),
        (EMPTY, "No answer changed"),
        ({"layout": None}, "drawn as if all took as long"),
    ],
)  # fmt: skip
def test_what_is_not_always_so_is_said_only_where_it_is(changes, said):
    assert said in page(**changes).words
    assert said not in page().words
    assert "None" not in page(**changes).text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spread": 1.12, "interval": None, "typical": None}, "the speed-up varied by 112%."),
        ({"interval": [1.2, 2.4]}, "the speed-up varied from 1.20 to 2.4."),
        # Medians as of a quiet machine, means of a few slow runs.
        ({"speedup": 0.65, "typical": 1.05}, "by medians it is 1.05, by means 0.65."),
    ],
)
def test_an_unsteady_speed_up_is_called_one(changes, said):
    assert said in page(cost=timed(**changes)).words
    assert "varied" not in page(cost=timed()).words


def test_what_is_modelled_is_told_from_what_was_measured():
    p, e = page(), made_up()
    assert e.cost is not None
    first = e.cost.measured[0]
    running = sum(hits / N * sum(BLOCKS_MS[:site]) for site, hits, _ in EXITS) / sum(BLOCKS_MS)
    assert f"by them {1 - running:.0%} of the computation is skipped, lookups left out." in p.words
    assert f"the cascade took {1 / first.speedup:.0%} of your network's time (1.76 times as fast)" in p.words
    # Oracle and plan by one clock.
    plan = next(point for point in e.path if point.certified)
    assert f"2.3 ms a request where the plan takes {plan.ms:.3g} ms, both by these times" in p.words
    by_share = page(path=[], oracle={"saved_share": 0.61, "ms": None}).words
    assert "it would save 61% of the time where the plan saves 48%, lookups left out of both" in by_share
    for width in (NARROW, WIDE):
        labels = [shape.text or "" for shape in shapes("front", "small", width)]
        assert any("modelled" in text for text in labels)


def test_the_text_says_what_holds_and_rounds_bounds_up():
    text = made_up().summary()
    assert "not certified: certify had no labels" in text
    assert ": holds here" in text
    assert "nothing is certified" in made_up(certificate__certified=False).summary()
    sequential = "sequential on later traffic: betting against a conditional mean above epsilon"
    assert "not certified by this method" in made_up(certificate__method=sequential).summary()
    gap = AccuracyGap(n=2500, losses=17, gains=11, upper=0.0516493, delta=0.1)
    assert "5.17%, delta 0.1 (0.24% of 2500" in made_up(certificate__accuracy_gap=gap).summary()
    assert "does NOT hold here" in made_up(**BROKEN).summary()
    assert "hold" not in made_up(served__epsilon=None).summary()
    assert "1.761 (1.708 to 1.814, 5.8" in text


def test_shares_are_rounded_as_their_meaning_asks():
    assert [percent(0.0516493), percent(0.0516493, up=True), percent(0.0516493, down=True)] == [
        "5.16%",
        "5.17%",
        "5.16%",
    ]
    assert [percent(0.02, up=True), percent(0.95, down=True)] == ["2%", "95%"]
    assert [percent(0.0), percent(1e-6), percent(1 - 1e-6), percent(1.0)] == ["0%", "<0.01%", ">99.99%", "100%"]
    assert [percent(0.004, digits=0), percent(0.9999, digits=0), percent(-0.005), percent(None)] == [
        "<1%",
        ">99%",
        "-0.5%",
        "-",
    ]


def test_the_page_says_how_the_network_was_trained(tmp_path):
    (tmp_path / "base.json").write_text(json.dumps({"command": "python -m train.base --config c.toml"}))
    assert base_command(tmp_path / "base.safetensors") == ("python -m train.base --config c.toml",)
    for damaged in ("", "[]", '{"command": 3}', "{}"):
        (tmp_path / "base.json").write_text(damaged)
        assert base_command(tmp_path / "base.safetensors") == ()
    assert base_command(tmp_path / "elsewhere" / "base.safetensors") == base_command(None) == ()


def test_no_space_is_lost_between_sentences():
    for changes in ({}, EMPTY, {"certificate__accuracy_gap": GAP}, {"cost": None}):
        assert not re.findall(r"[a-z0-9)%][.;:][A-Z][a-z]", page(**changes).text)


def test_an_evaluation_of_an_older_version_is_a_page_too():
    old = {key: value for key, value in evaluation().items() if key not in {
        "layout", "path", "classes", "confusions", "samples", "commands", "served",
    }}  # fmt: skip
    for one in old["exits"]:
        del one["interval"]
    for name in ("full_each_ms", "cascade_each_ms"):
        del old["cost"]["measured"][0][name]
    p = Page(render(Evaluation.model_validate(old), NO_PICTURES))
    assert "Nothing to see." in p.text
    assert p.tags.count("svg") == 2 * len({"flow", "certificate"})


def hostile(value: object) -> object:
    """Replace every string that is no choice of a few in a tree."""
    if isinstance(value, dict):
        kept = {"driver", "backend", "full"} & value.keys()
        kept |= {"numerics"} & value.keys() if "driver" in value else set()
        return {k: v if k in kept else hostile(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [hostile(v) for v in value]
    return HOSTILE if isinstance(value, str) else value


def test_hostile_strings_are_escaped_everywhere(tmp_path):
    found = hostile(evaluation())
    assert isinstance(found, dict)
    e = Evaluation.model_validate(found | {"versions": {HOSTILE: HOSTILE}})
    html = render(e, pictures(e))
    p = Page(html)
    assert "script" not in p.tags
    assert "<script" not in html
    assert p.tags == Page(render(Evaluation.model_validate(evaluation(versions={"a": "b"})), pictures(e))).tags
    assert p.text.count(HOSTILE) >= 20  # network, data, classes, caches, devices, commands, versions, ...
    write_report(tmp_path, e, pictures(e))  # the files are XML before they are pictures


def test_names_that_xml_has_no_place_for_are_written_out(tmp_path):
    e = made_up(
        classes=[{"index": 0, "name": CONTROL, "n": N, "exits": [hits for _, hits, _ in EXITS], "disagreements": 9}]
    )
    write_report(tmp_path, e, NO_PICTURES)
    assert "\\x00\\x1b" in (tmp_path / "report.html").read_text()


LONG = ("x" * 600, "漢字クラス名日本語とても長い名前テスト", "WWWWWWWWWWWWWWWWMMMM", "مرحبا" * 20)


def test_figures_are_also_pictures_beside_the_page(tmp_path):
    e = made_up()
    write_report(tmp_path, e, pictures(e))
    assert {file.stem for file in (tmp_path / "figures").iterdir()} == set(FIGURES)
    with Image.open(tmp_path / "figures" / "flow.png") as picture:
        assert picture.width == ZOOM * WIDE
        colours = {f"#{r:02x}{g:02x}{b:02x}" for r, g, b, *_ in np.unique(np.asarray(picture).reshape(-1, 4), axis=0)}
    assert {LIGHT["cascade"], LIGHT["soft"], LIGHT["base"], LIGHT["paper"]} <= colours
    write_report(tmp_path, made_up(cost=None), NO_PICTURES)
    assert not (tmp_path / "figures" / "latency.png").exists()  # it would be another evaluation's


def test_long_names_are_cut_where_they_are_drawn():
    named = [one | {"name": name} for one, name in zip(evaluation()["classes"], LONG, strict=True)]
    for width, left in ((NARROW, 76), (WIDE, 130)):
        labels = [
            shape for shape in shapes("classes", "label", width, classes=named) if shape.get("x") == str(left - 12)
        ]
        assert [(shape.text or "")[:3] for shape in labels] == [name[:3] for name in LONG]
        assert all(text_width(shape.text or "") <= left - 12 for shape in labels)
        assert all((shape.text or "").endswith("…") for shape in labels)
    samples = [sample | {"cascade": LONG[0], "base": LONG[0], "agrees": True} for sample in evaluation()["samples"]]
    assert "x" * 41 not in page(samples=samples).text


def test_commands_are_shown_as_they_were_typed():
    module = ["/somewhere/train/evaluate.py", "--bundle", "a b"]
    assert cli.command_line(module) == "python -m train.evaluate --bundle 'a b'"
    assert cli.command_line(["gati-jax fit", "--config", "c.toml"]) == "gati-jax fit --config c.toml"
