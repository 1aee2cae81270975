"""The page of a reproduction: every figure is in its row, missing results are "not run", remarks are kept."""

import json
import re
import shlex
from pathlib import Path

import pytest

from tests.train.one_pass import ROOT
from tests.train.reproduce.written_results import POLICIES, freeze, reproduction
from train.reproduce import figures, page
from train.reproduce.results import KINDS, Freeze, Reproduction

LINKS = {"reproduce": "[reproduce](#reproduce)", "freeze": "[freeze](#freeze)"}


def write(folder: Path, *arguments: str, **results) -> str:
    """Run the script on results; return the page."""
    named = []
    for name, result in results.items():
        (folder / f"{name}.json").write_text(json.dumps(result))
        named += [f"--{name}", str(folder / f"{name}.json")]
    page.main([*named, *arguments, "--out", str(folder / "page.md")])
    return (folder / "page.md").read_text()


def section(text: str, title: str) -> str:
    return text.partition(f"# {title}")[2].partition("\n#")[0]


def rows(text: str, title: str) -> list[list[str]]:
    """Return the cells of the table below a title."""
    lines = [line for line in section(text, title).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[2:]]


def figure(text: str, *parts: str) -> list[str]:
    """Return the row of the published figures that contains all parts: published, ours, command, why."""
    (found,) = [cells for cells in rows(text, "Published figures") if all(part in " | ".join(cells) for part in parts)]
    return found[1:]


@pytest.mark.parametrize(
    ("parts", "cells"),
    [
        (("CPU, batch 1", "step chosen on certify"), ("1.72", "2.62 (spread 4 %, ideal 3.50)", "97.30 %")),
        (("CPU, batch 1", "read off the test"), ("1.72", "2.93 (spread 4 %, ideal 3.50)", "chosen on test")),
        (("certified at 2 % disagreement",), ("none", "1.81 (spread 4 %, ideal 3.50)", "18 of 3000")),
        (("share of the base's bytes",), ("22 times them, for FC(1024) behind every block", "2.6 % / 1.8 %", "")),
        (("oracle over any explored candidate",), ("91.58 %", "98.61 %", "")),
        (("oracle over k-NN",), ("91.58 %", "90.12 %", "")),
        (("oracle over k-means",), ("none", "80.34 %", "")),
    ],
)
def test_every_figure_stands_beside_the_published_one_and_its_command(tmp_path, parts, cells):
    published, ours, command, why = figure(write(tmp_path, reproduction=reproduction(), freeze=freeze()), *parts)
    assert (published, ours) == cells[:2]
    assert command == LINKS["freeze" if parts[0].startswith("oracle over k") else "reproduce"]
    assert cells[2] in why


@pytest.mark.parametrize(
    ("name", "published"), [("k-NN", ("20 %", "95 %", "97.48 %")), ("k-means", ("33 %", "none", "92.85 %"))]
)
def test_neighbours_under_both_thresholds(tmp_path, name, published):
    text = write(tmp_path, freeze=freeze())
    for split, first in (("train[35000:40000]", 31), ("train[45000:]", 33)):
        own = first + (name == "k-means")
        for i, what in enumerate(("half of the blocks", "before the output", "agreement")):
            found = figure(text, f"{name}: ", what, split)
            assert found[:3] == [published[i], f"{own + 11 * i}.00 %", LINKS["freeze"]]
            assert ("was not trained" in found[3]) == (split == "train[45000:]")
    assert figure(text, f"{name}: memory, MB")[1] == {"k-NN": "3", "k-means": "7"}[name]


def test_rows_without_a_result_are_not_run(tmp_path):
    text = write(tmp_path)
    assert {row[2] for row in rows(text, "Published figures")} == {"not run"}
    assert {row[3] for row in rows(text, "Published figures")} == {"-"}
    ours = [row for row in rows(text, "Predictors") if row[0].endswith("ours")]
    assert [set(row[1:]) for row in ours] == [{"not run"}] * 3
    assert "Not run." in section(text, "Policies")
    assert "(#" not in text  # no link to what was not run


@pytest.mark.parametrize("missing", ["knn", "kmeans"])
def test_a_kind_of_cache_that_was_left_out_is_not_run(tmp_path, missing):
    result = freeze()
    for part in (*result["protocols"].values(), result["oracle"], result["memory"]):
        del part[missing]
    found = rows(write(tmp_path, freeze=result), "Published figures")
    for kind, name in KINDS.items():
        own = [row for row in found if row[0].startswith((f"{name}: ", f"oracle over {name}"))]
        assert len(own) == 8
        assert {row[2] == "not run" for row in own} == {kind == missing}
        assert {row[3] == "-" for row in own} == {kind == missing}


@pytest.mark.parametrize("device", ["cpu-amd", "gpu-nvidia-h200"])
def test_a_gain_stands_in_the_row_of_its_device(tmp_path, device):
    text = write(tmp_path, reproduction=reproduction() | {"device": device})
    for name, published in (("CPU", "1.72"), ("GPU", "1.28")):
        ran = name.lower() == device[:3]
        own = [row for row in rows(text, "Published figures") if f"accuracy, {name}, batch 1" in row[0]]
        assert [row[1] for row in own] == [published] * 2
        assert [row[2].startswith("2.") for row in own] == [ran] * 2
        assert ran or all(device in row[4] for row in own)


def test_networks_that_are_not_here_stand_with_their_published_figures(tmp_path):
    text = write(tmp_path, reproduction=reproduction(), freeze=freeze())
    expected = {"ResNet-50, CIFAR-10": {"1.95", "1.63", "46 %"}, "ResNet-152, CIFAR-100": {"1.24", "1.21"},
                "VGG-16, speech commands": {"1.96", "1.54"}, "ResNet-50, CIFAR-100": {"26 %"},
                "ResNet-18, CIFAR-100": {"55 %", "15 %", "44 %", "99.03 %", "19 %", "88.86 %"}}  # fmt: skip
    for name, published in expected.items():
        own = [row for row in rows(text, "Published figures") if row[0].startswith(f"{name}:")]
        assert {row[1] for row in own} == published
        assert {row[2] for row in own} == {"not run"}


def test_older_results_lack_the_gain_read_off_test_looks_and_device(tmp_path):
    result = reproduction()
    gain = result["measured"].pop("read_off_test")
    del result["looks"], result["certified"]["disagreements"], result["device"]
    text = write(tmp_path, reproduction=result)
    assert figure(text, "CPU", "read off the test curve")[1:3] == ["not run", "-"]
    assert figure(text, "certified at 2 %")[3] == "delta 0.05"
    assert "2026-01-02 on a device that was not recorded" in text
    result["measured"]["read off test"] = gain  # the key of older results that have it
    assert figure(write(tmp_path, reproduction=result), "read off the test curve", "CPU")[1].startswith("2.93 ")


@pytest.mark.parametrize(
    ("script", "name", "module"),
    [
        ("reproduction", "/a/train/reproduce/__main__.py", "train.reproduce"),
        ("freeze", "/train/a/train/reproduce/freeze.py", "train.reproduce.freeze"),
        ("freeze", "train/freeze.py", "train.freeze"),
        ("freeze", "train.reproduce.freeze", "train.reproduce.freeze"),
    ],
)
def test_commands_can_be_run_again(tmp_path, script, name, module):
    result = {"reproduction": reproduction, "freeze": freeze}[script]()
    result["command"] = [name, "--fit.heads", "[{name = 'a b'}]", "--out", "$HOME"]
    found = section(write(tmp_path, **{script: result}), "reproduce\n" if script == "reproduction" else "freeze\n")
    (line,) = [line for line in found.splitlines() if line.startswith("    ")]
    assert shlex.split(line) == ["python", "-m", module, *result["command"][1:]]
    assert "2026-01-02 on cpu-made-up" in found


@pytest.mark.parametrize(("model", "result"), [(Reproduction, reproduction()), (Freeze, freeze())])
def test_a_record_is_read_back_as_it_was_written(tmp_path, model, result):
    record = model.model_validate(result)
    record.write(tmp_path / "result.json", print_json=False)
    assert model.read(tmp_path / "result.json", "result") == record


def test_figures_of_another_network_are_marked(tmp_path):
    assert "another network" not in write(tmp_path, reproduction=reproduction())
    assert "another network" in write(tmp_path, reproduction=reproduction() | {"network": "resnet20"})


def test_policies_are_slower_faster_or_tie_and_bound_the_accuracy_lost(tmp_path):
    result = reproduction()
    certificate = {"epsilon": 0.02, "accuracy_gap": {"upper": 0.0045, "delta": 0.05, "mean": 0.001}}
    result["certified"]["certificates"] = {POLICIES[0]: certificate, POLICIES[1]: {"accuracy_gap": None}}
    text = write(tmp_path, reproduction=result)
    name, _, _, slower, *shares, disagreed, lost = zip(*rows(text, "Each certified at 2 % disagreement"), strict=True)
    assert name == POLICIES
    assert slower == ("-", "0.60 [0.50, 0.70]", "0.12 [-0.25, 0.50] ties", "-0.62 [-0.75, -0.50] faster")
    assert disagreed == tuple(f"{18 + i} of 3000" for i in range(4))
    assert [share[0] for share in shares] == ["40.0 % (0.50)", "1.23 %", "97.30 %"]
    assert lost == ("0.45 % (delta 0.05)", "-", "-", "-")
    assert "The base takes 12.00 ms" in text


def test_a_bar_in_a_name_breaks_no_table(tmp_path):
    result = reproduction()
    result["certified"]["rows"][0]["policy"] = "a|b"
    text = write(tmp_path, reproduction=result)
    assert {len(row) for row in rows(text, "Each certified")} == {8}


def test_remarks_are_kept_however_often_the_page_is_written(tmp_path):
    (tmp_path / "remarks.md").write_text("- One | two.\n- 90 % of it.\n\n")
    arguments = ("--remarks", str(tmp_path / "remarks.md"))
    first = write(tmp_path, *arguments, reproduction=reproduction())
    assert first.endswith("\n\n## Remarks\n\n- One | two.\n- 90 % of it.\n")
    assert write(tmp_path, *arguments, reproduction=reproduction()) == first
    assert "Remarks\n" not in write(tmp_path, reproduction=reproduction())


def test_drawings_are_shown_where_they_are(tmp_path):
    (tmp_path / "figures").mkdir()
    for name in figures.FIGURES:
        (tmp_path / "figures" / f"repro-{name}.svg").write_text("")
    text = write(tmp_path, "--figures", "figures")
    shown = re.findall(r"!\[.+\]\((.+)\)", text)
    assert shown == [f"figures/repro-{name}.svg" for name in figures.FIGURES]
    assert all((tmp_path / path).is_file() for path in shown)


def test_the_page_of_this_repository_has_all_rows_and_its_remarks(tmp_path):
    text = (ROOT / "docs" / "reproduction.md").read_text()
    remarks = (ROOT / "docs" / "remarks" / "reproduction.md").read_text().strip()
    assert text.endswith(f"\n## Remarks\n\n{remarks}\n")
    names = [row[0] for row in rows(text, "Published figures")]
    page_now = write(tmp_path)  # after a new row the page must be written again
    assert names[-16:] == [row[0] for row in rows(page_now, "Published figures")][-16:]
    assert len(names) == len(rows(page_now, "Published figures"))
