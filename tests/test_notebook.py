"""The tutorial's notebook runs from top to bottom; what it shows in place of a repr is escaped."""

import dataclasses
import importlib.util
import json
from html.parser import HTMLParser
from pathlib import Path

import jax
import numpy as np
import pytest

import gati_jax
from gati_jax.display import MOST_ROWS, html_table
from gati_jax.evaluation import timing

DOCS = Path(__file__).resolve().parents[1] / "docs"
HOSTILE = "<script>alert('x')</script>"


class Cells(HTMLParser):
    """The tags of a text, and what stands in its table cells."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: set[str] = set()
        self.cells: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        del attrs
        self.tags.add(tag)
        if tag in {"td", "th"}:
            self.cells.append("")

    def handle_data(self, data):
        self.text += data
        if self.cells:
            self.cells[-1] += data


def run_notebook():
    spec = importlib.util.spec_from_file_location("docs_notebook", DOCS / "notebook.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    notebook = json.loads((DOCS / "tutorial.ipynb").read_text())
    return notebook, module.run(notebook)


def test_the_notebook_runs_from_top_to_bottom(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "contenders", lambda *_: {})  # a search for the fastest full network, of a minute
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):  # as where its reader runs it
        notebook, names = run_notebook()
    assert isinstance(names["found"], gati_jax.Evaluation)
    assert names["found"].base.accuracy > 0.9
    shown = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    tables = ["".join(output["data"]["text/html"]) for output in shown if "text/html" in output.get("data", {})]
    kinds = ("Plan", "Certificate", "Chain(6 blocks", "Exits")
    assert all(kind in table for kind, table in zip(kinds, tables, strict=True))


def test_tables_of_a_notebook_say_what_the_summaries_say(planned, bundle_path, chain):
    plan, certificate = planned
    cells = Cells(plan._repr_html_()).cells
    assert [cells[3 + 3 * i : 5 + 3 * i] for i in range(len(plan.names))] == [
        [name, str(site)] for name, site in zip(plan.names, plan.sites, strict=True)
    ]
    assert certificate.promise in Cells(certificate._repr_html_()).cells
    assert f"{certificate.disagreements} of {certificate.n} disagreed" in Cells(certificate._repr_html_()).cells
    bundle = gati_jax.load_bundle(bundle_path, chain=chain)
    shown = Cells(bundle._repr_html_()).cells
    assert set(plan.names) <= set(shown)
    assert certificate.promise in shown
    nothing = dataclasses.replace(certificate, step=-1)
    assert "NOTHING at 0.08" in Cells(nothing._repr_html_()).text
    empty = dataclasses.replace(
        plan, names=(), sites=(), path=np.empty((1, 0)), disagreement=np.zeros(1), mean_ms=np.ones(1)
    )
    assert "EMPTY PLAN" in Cells(empty._repr_html_()).text


def test_an_evaluation_shows_its_exits(planned, bundle_path, chain, splits):
    del planned
    bundle = gati_jax.load_bundle(bundle_path, chain=chain)
    found = gati_jax.evaluate(bundle, splits["test"], timed=0, ledger=None, progress=False)
    cells = Cells(found._repr_html_()).cells
    for one in found.exits:
        at = cells.index(str(one.exit))
        assert cells[at + 1 : at + 3] == [str(one.hits), f"{one.hit_rate:.1%}"]


@pytest.mark.parametrize("where", ["title", "column", "cell", "note"])
def test_names_are_escaped(where):
    given = {name: HOSTILE if name == where else "plain" for name in ("title", "column", "cell", "note")}
    page = Cells(html_table(given["title"], (given["column"],), [(given["cell"],)], notes=[given["note"]]))
    assert page.tags <= {"table", "caption", "tr", "th", "td", "p"}
    assert HOSTILE in page.text


def test_a_long_table_is_cut():
    page = Cells(html_table("many", (), [(i,) for i in range(MOST_ROWS + 5)]))
    assert len(page.cells) == MOST_ROWS
    assert "and 5 more rows" in page.text
