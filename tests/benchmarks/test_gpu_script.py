"""The ten-minute script for GPUs: what it keeps if a stage fails or takes too long, and all of it in tiny sizes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.captured import count_thunks

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["install", "tests", "train", "certify", "drivers", "captured", "serving", "second"]


def run(
    folder: Path, *, failing: str = "nothing", slow: str = "nothing", status: int = 0, **given: str
) -> dict[str, dict]:
    """Run the script with a Python that only writes down what it is asked for; return every stage's JSON."""
    (folder / "benchmarks").mkdir()
    script, python = folder / "benchmarks" / "gpu.sh", folder / "python"
    script.write_bytes((ROOT / "benchmarks" / "gpu.sh").read_bytes())
    lines = [
        "#!/bin/bash", 'echo "$JAX_DEFAULT_MATMUL_PRECISION $*" >>calls', 'echo "said: $*"',
        f'[[ "$*" == *"{failing}"* ]] && exit 3', f'[[ "$*" == *"{slow}"* ]] && sleep 60', "exit 0",
    ]  # fmt: skip
    python.write_text("\n".join(lines))
    python.chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "OUT": "out", **given}
    command = ["bash", str(script)]
    done = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, timeout=60)
    assert done.returncode == status, done.stderr
    return {path.stem: json.loads(path.read_text()) for path in (folder / "out").glob("*.json")}


def test_stages_come_in_order_with_limits_of_ten_minutes_in_all(tmp_path):
    found = run(tmp_path)
    assert sorted(found) == sorted(NAMES)
    assert {stage["status"] for stage in found.values()} == {0}
    assert found["second"]["limit"] > 500  # what is left
    assert sum(stage["limit"] for name, stage in found.items() if name != "second") <= 600
    calls = (tmp_path / "calls").read_text().splitlines()
    order = ["--version", "pytest", "train.base", "train.caches", "train.evaluate", "benchmarks.drivers"]
    at = [next(i for i, call in enumerate(calls) if name in call) for name in order]
    assert at == sorted(at)
    assert [call.startswith("highest ") for call in calls if "pytest" in call] == [True]
    assert sum(call.startswith("highest ") for call in calls) == 1
    assert all("--plan.bfloat16 true" in call for call in calls if "train.caches" in call)


@pytest.mark.parametrize("failing", ["-m pytest", "train.base", "benchmarks.drivers"])
def test_a_stage_that_fails_stops_no_other_and_keeps_its_output(tmp_path, failing):
    found = run(tmp_path, failing=failing, status=1)
    assert sorted(found) == sorted(NAMES)
    name = {"-m pytest": "tests", "train.base": "train", "benchmarks.drivers": "drivers"}[failing]
    assert found[name]["status"] != 0
    assert found["serving"]["status"] == 0
    assert f"{failing} " in (tmp_path / "out" / f"{name}.log").read_text()


def test_a_stage_that_takes_too_long_is_ended_and_the_others_share_what_is_left(tmp_path):
    found = run(tmp_path, slow="pytest", status=1, TOTAL="7", STAGES="a b")
    assert (found["tests"]["status"], found["tests"]["limit"] <= 7) == (124, True)
    assert (found["train"]["status"], found["train"]["limit"]) == (124, 0)  # no time was left
    assert "no time was left" in (tmp_path / "out" / "train.log").read_text()
    assert "second" not in found


@pytest.mark.parametrize(
    ("words", "given", "message"),
    [
        (["--help"], {}, "expected no argument, or wheels, got --help"),
        (["wheels", "now"], {}, "expected no argument, or wheels, got wheels now"),
        ([], {"STAGES": "a,b"}, "STAGES: expected letters from a to f with spaces between them, got a,b"),
        ([], {"PYTHON": "no-such-python"}, "PYTHON: expected a Python that runs, got no-such-python"),
    ],
)
def test_what_it_does_not_know_costs_no_time_of_a_gpu(tmp_path, words, given, message):
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), *words]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "OUT": str(tmp_path / "out"), **given}
    done = subprocess.run(command, env=environment, check=False, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "out").exists()


def test_wheels_that_cannot_be_had_are_an_error(tmp_path):
    (tmp_path / "python").write_text("#!/bin/bash\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": str(tmp_path / "python")}
    command = ["bash", str(ROOT / "benchmarks" / "gpu.sh"), "wheels"]
    assert subprocess.run(command, env=environment, check=False).returncode == 1


THUNKS = """
000: kCommandBuffer [source | sink]
    001: kCustomKernel [source | next=004] fusion
    004: kWhile        [prev=003 | sink]
condition:
        005: kCustomKernel [source | sink] fusion
      body:
        008: kConvolution  [source | sink] kConvolution
009: kConditional [source | sink]
  branch 0:
    010: kConvolution [source | sink]
"""


def test_what_is_indented_below_a_graph_is_captured():
    captured, outside = count_thunks(THUNKS)
    assert captured == {"kCustomKernel": 2, "kWhile": 1, "kConvolution": 1}
    assert outside == {"kCommandBuffer": 1, "kConditional": 1, "kConvolution": 1}


@pytest.mark.slow
def test_the_whole_script_runs_in_tiny_sizes(tmp_path):
    environment = os.environ | {"DRY": "1", "OUT": str(tmp_path), "PYTHON": sys.executable}
    environment |= {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    subprocess.run(["bash", "benchmarks/gpu.sh"], cwd=ROOT, env=environment, check=True, capture_output=True)
    for name in NAMES:
        stage = json.loads((tmp_path / f"{name}.json").read_text())
        assert stage["status"] == 0, (tmp_path / f"{name}.log").read_text()[-2000:]
    drivers = json.loads((tmp_path / "measured-drivers.json").read_text())
    assert {row["batch"] for row in drivers["rows"]} == {1, 4}
    named = {row["contender"] for row in drivers["rows"]}
    assert {
        f"{driver} {dtype}"
        for driver in ("loop", "nest captured", "host captured")
        for dtype in ("float32", "bfloat16")
    } <= named
    assert set(drivers["answers"]) == {"reference", "bfloat16"}
    for about in drivers["answers"].values():
        assert sum(about["exits"].values()) == pytest.approx(1)
    none = ("torch.compile full float32", "torch.compile full bfloat16", "onnxruntime full float32")  # without a GPU
    assert set(drivers["left_out"]) == {f"{name}, batch {size}" for name in none for size in (1, 4)}
    assert json.loads((tmp_path / "measured-captured.json").read_text())["rows"]
    assert json.loads((tmp_path / "measured-serving.json").read_text())["rows"]
    certified = json.loads((tmp_path / "digits" / "caches" / "caches.json").read_text())
    assert (certified["bfloat16"]["numerics"], certified["bfloat16"]["plans"]) == ("bfloat16", 2)
