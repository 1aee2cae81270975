"""The dashboard and the alert rules: every metric and label that they name is one of a real server; rules fire."""

import itertools
import json
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from prometheus_client.parser import text_string_to_metric_families

import serve
from serve import assemble
from serve.engine.records import DeadlineError, OverloadedError
from serve.protocol.messages import refusal
from serve.settings import Settings
from tests.adaptation import world
from tests.serve import fake
from tests.serve.transports import INFER

FOLDER = Path(serve.__file__).with_name("monitoring")
ALERTS, DASHBOARD = FOLDER / "alerts.yml", FOLDER / "grafana.json"
VARIABLES = {"$__rate_interval": "5m", "$instance": ".*", "$job": ".*", "$model": ".*"}
SCHEMA = Path(__file__).with_name("grafana") / "schema.json"  # Grafana's own: see the README beside it
LATER = {  # labels' values that are there once a client of gRPC has asked, or a request was refused
    "method": {"ModelInfer", "ModelStreamInfer"},
    "code": {str(refusal(error).status) for error in (OverloadedError("", 1.0), DeadlineError())},
}
OUTER = {"instance", "job"}  # labels that Prometheus adds
NAME = r"\b(?:gati|process)_\w+"
QUIET = {
    "gati_ready": "1+0x60",
    'gati_adaptation_events_total{kind="alarm"}': "2+0x60",
    'gati_adaptation_state{state="safe"}': "0+0x60",
    'gati_adaptation_state{state="failed"}': "0+0x60",
    "gati_adaptation_unsaved": "0+0x60",
    "gati_model_ready": "1+0x60",
    'gati_requests_total{method="infer",code="200"}': "0+100x60",
    'gati_requests_total{method="infer",code="429"}': "0+1x60",
    'gati_requests_total{method="ModelStreamInfer",code="200"}': "0+100x60",
    'gati_refused_total{reason="deadline"}': "0+256x60",  # images of few requests
    "gati_queue_age_seconds": "0.01+0x60",
    'gati_latency_seconds_bucket{le="0.25"}': "0+100x60",
    'gati_latency_seconds_bucket{le="0.5"}': "0+100x60",
    'gati_latency_seconds_bucket{le="+Inf"}': "0+100x60",
    'gati_failed_steps_total{plan="a",stage="0"}': "3+0x60",
}
LOUD = {
    "gati_ready": ("GatiNotReady", "0+0x60"),
    'gati_adaptation_events_total{kind="alarm"}': ("GatiDriftAlarm", "2+0x50 3+0x10"),
    'gati_adaptation_state{state="safe"}': ("GatiSafeMode", "1+0x60"),
    'gati_adaptation_state{state="failed"}': ("GatiAdaptationFailed", "1+0x60"),
    "gati_adaptation_unsaved": ("GatiStateUnsaved", "1+0x60"),
    "gati_model_ready": ("GatiModelNotReady", "0+0x60"),
    'gati_requests_total{method="infer",code="429"}': ("GatiRefusing", "0+20x60"),
    "gati_queue_age_seconds": ("GatiQueueOld", "3+0x60"),
    'gati_latency_seconds_bucket{le="0.25"}': ("GatiSlow", "0+98x60"),
    'gati_failed_steps_total{plan="a",stage="0"}': ("GatiStepsFail", "3+0x55 4+0x5"),
}
ALERT_NAMES = re.findall(r"- alert: (\w+)", ALERTS.read_text())
VARIABLE = r"\$\w+|\$\{\w+\}"
needs_promtool = pytest.mark.skipif(
    not shutil.which("promtool"), reason="needs promtool, of Debian's package prometheus"
)


def panels():
    """All panels of the dashboard but the rows' titles."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def expressions():
    """Every expression of the rules and the dashboard, by where it stands."""
    rule = re.compile(r"- alert: (\w+)\n +expr: \|?(.*?)\n        (?:for|labels):", re.DOTALL)
    found: dict[str, str] = dict(rule.findall(ALERTS.read_text()))
    dashboard = json.loads(DASHBOARD.read_text())
    texts = {f"{panel['title']} {target['refId']}": target["expr"] for panel in panels() for target in panel["targets"]}
    texts |= {note["name"]: note["target"]["expr"] for note in dashboard["annotations"]["list"]}
    for name, text in texts.items():
        for variable, value in VARIABLES.items():
            text = text.replace(variable, value)  # noqa: PLW2901
        found[name] = text
    return {name: text.strip() for name, text in found.items()}


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Names of series and their labels at /metrics of a server that adapts and has answered."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(assemble.gati_jax, "load_bundle", lambda *_, **__: world.bundle())
        patch.setattr(assemble, "version_of", lambda _: "v")
        settings = Settings(bundle=tmp_path_factory.mktemp("m") / "bundle", capacity=8, adapt=True, program_cache="off")
        parts = assemble.assemble(settings)
    (entry,) = parts.service.models.entries.values()
    entry.serve(*entry.start())
    assert entry.backend is not None
    adapting: Any = entry.backend.engine
    adapting.read(lambda controller: controller.monitor.shadow_all(on=True))
    images = world.images(8, 1)
    tensor = {"name": "images", "datatype": "UINT8", "shape": list(images.shape), "data": images.ravel().tolist()}
    with fake.sockets(parts.service, parts.metrics) as (port, _):
        body = json.dumps({"inputs": [tensor]}).encode()
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{INFER}", body) as response:
            assert response.status == 200
        while adapting.statistics().slots_in_use:
            time.sleep(0.01)
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
            text = response.read().decode()
    assert entry.backend.engine.stop(60)
    return [
        (sample.name, sample.labels) for family in text_string_to_metric_families(text) for sample in family.samples
    ]


def test_every_metric_and_label_that_is_named_exists(samples):
    known: dict[str, list[dict[str, str]]] = {}
    for name, labels in samples:
        known.setdefault(name, []).append(labels)
    named = expressions()
    assert named.keys() >= {panel["title"] + " A" for panel in panels()} | set(ALERT_NAMES)
    for where, text in named.items():
        names = re.findall(NAME, text)
        assert names, where
        assert not set(names) - known.keys(), where
        labels = {label for name in names for series in known[name] for label in series} | OUTER
        for group in re.findall(r"by \(([^)]*)\)", text):
            assert {label.strip() for label in group.split(",")} <= labels, where
        for name, selector in re.findall(rf"({NAME})\{{([^}}]*)\}}", text):
            for label, how, value in re.findall(r'(\w+)(=~|=)"([^"]*)"', selector):
                seen = {series.get(label, "") for series in known[name]}
                if label in OUTER or value == VARIABLES["$model"]:
                    continue
                patterns = value.split("|") if how == "=~" else [value]
                missing = set(patterns) - seen - LATER.get(label, set())
                assert not missing, f"{where}: {name} has no {label} of {missing}"


def test_values_in_legends_are_labels(samples):
    labels = {label for _, series in samples for label in series} | OUTER
    for panel in panels():
        for target in panel["targets"]:
            assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels, panel["title"]


def test_what_is_of_a_model_is_chosen_and_told_apart_by_it(samples):
    """Of several bundles, exits and bounds of one say nothing of another's."""
    of_models = {name for name, labels in samples if "model" in labels}
    for where, text in expressions().items():
        names = set(re.findall(NAME, text))
        if not names & of_models:
            continue
        assert names - of_models <= {"gati_ready"}, where  # a model that does not answer where others do
        assert all("model" in labels for labels in re.findall(r"by \(([^)]*)\)", text)), where
        if where not in ALERT_NAMES:
            assert text.count('model=~".*"') == len(re.findall(NAME, text)), where
    for panel in panels():
        for target in panel["targets"]:
            if of_models & set(re.findall(NAME, target["expr"])):
                assert "{{model}}" in target["legendFormat"], panel["title"]
    for name, alert in re.findall(r"- alert: (\w+)(.*?)(?=- alert|\Z)", ALERTS.read_text(), re.DOTALL):
        told = "$labels.model" in alert
        assert told == bool(of_models & set(re.findall(NAME, alert.split("annotations")[0]))), name


def test_the_dashboard_fits_grafana_s_own_schema():
    schema = jsonschema_rs.validator_for(json.loads(SCHEMA.read_text()))
    assert [error.message[:200] for error in schema.iter_errors(json.loads(DASHBOARD.read_text()))] == []
    for find, other in (('"lineWidth"', '"lineWith"'), ('"refId"', '"ref"'), ('"type": "stat"', '"type": "stats"')):
        assert not schema.is_valid(json.loads(DASHBOARD.read_text().replace(find, other, 1))), find


def test_panels_lie_beside_each_other_and_ask_the_chosen_data_source():
    """What no schema says."""
    dashboard = json.loads(DASHBOARD.read_text())
    variables = {variable["name"] for variable in dashboard["templating"]["list"]}
    assert {*variables, "__rate_interval"} == {
        name.strip("${}") for name in re.findall(VARIABLE, DASHBOARD.read_text())
    }
    numbers = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(numbers)) == len(numbers)
    areas = [panel["gridPos"] for panel in dashboard["panels"]]
    for area in areas:
        assert area["x"] + area["w"] <= 24
        assert min(area.values()) >= 0
    for one, other in itertools.combinations(areas, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        assert beside or one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
    for panel in panels():
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert [target["refId"] for target in panel["targets"]] == list("ABC"[: len(panel["targets"])])
        assert panel["fieldConfig"]["defaults"]["unit"] in {
            *("short", "s", "ops", "reqps", "percentunit", "bytes"),
        }  # fmt: skip


def promtool(*words):
    done = subprocess.run(["promtool", *map(str, words)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_promtool
def test_promtool_accepts_the_rules_and_every_expression_of_the_dashboard(tmp_path):
    assert f"{len(ALERT_NAMES)} rules found" in promtool("check", "rules", ALERTS)
    rules = [{"record": f"e{i}", "expr": text} for i, text in enumerate(expressions().values())]
    file = tmp_path / "dashboard.yml"
    file.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rules}]}))  # JSON is YAML
    assert f"{len(rules)} rules found" in promtool("check", "rules", file)


@needs_promtool
def test_every_alert_fires_on_what_it_is_for_and_none_in_quiet(tmp_path):
    assert sorted(ALERT_NAMES) == sorted(alert for alert, _ in LOUD.values())

    def case(loud="", firing="", without="", values=""):
        series = {name: given for name, given in QUIET.items() if not (without and without in name)}
        series |= {loud: values} if loud else {}
        return {
            "interval": "1m",
            "input_series": [
                {"series": name.replace("{", '{instance="i",') if "{" in name else name + '{instance="i"}', "values": v}
                for name, v in series.items()
            ],
            "promql_expr_test": [
                {
                    "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
                    "eval_time": "58m",
                    "exp_samples": [{"labels": f'{{alertname="{firing}"}}', "value": 1}] if firing else [],
                }
            ],
        }

    file = tmp_path / "cases.yml"
    cases = [case(), *(case(loud, alert, values=values) for loud, (alert, values) in LOUD.items())]
    streams = 'gati_requests_total{method="ModelStreamInfer",code="429"}'
    cases.append(case(streams, "GatiRefusing", without='method="infer"', values="0+50x60"))  # no REST at all
    file.write_text(json.dumps({"rule_files": [str(ALERTS)], "evaluation_interval": "1m", "tests": cases}))
    promtool("test", "rules", file)
