"""The container's files: what they name is there, and the server has the flags, paths, ports and metrics they use."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from serve.protocol.http import HEALTH
from serve.settings import REPOSITORY_TOKEN, TOKEN, Settings, parse
from tests.serve import fake
from tests.serve.transports import ask

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
MANIFESTS = [*sorted((DEPLOY / "kubernetes").glob("*.yaml")), *sorted((DEPLOY / "kserve").glob("*.yaml"))]
DEFAULTS = parse(["--bundle", "b"], {})
UID = 10001
"""Of the image's user, as the manifests name it, too."""


def read(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


def documents(kind: str) -> list[Any]:
    return [found for path in MANIFESTS if (found := read(path)).get("kind") == kind]


def instruction(name: str) -> list[str]:
    """What follows an instruction of the Dockerfile, wherever it stands, in order."""
    return re.findall(rf"^ *{name} +(.*)$", DOCKERFILE.replace("\\\n", " "), flags=re.MULTILINE)


def words(name: str) -> list[str]:
    """An instruction in the form of a list, the last one of its name."""
    return yaml.safe_load(re.sub(r"^[^\[]*", "", instruction(name)[-1]))


def started(arguments: list[str], environ: dict[str, str] | None = None) -> Settings:
    """The settings of a container with these arguments: the server's own parser refuses what it does not know."""
    (service,) = documents("InferenceService")
    arguments = [word.replace("{{.Name}}", service["metadata"]["name"]) for word in arguments]  # as KServe does
    command, subcommand, *always = words("ENTRYPOINT")
    assert (command, subcommand) == ("gati-jax", "serve")
    return parse([*always, *arguments], environ or {})


@pytest.fixture(scope="module")
def server():
    """A server with one model."""
    front = fake.Front()
    yield front
    front.engine.stop()


def containers() -> dict[str, tuple[Any, Any]]:
    """Every container of the manifests, and the pod's specification around it."""
    (deployment,), (runtime,) = documents("Deployment"), documents("ServingRuntime")
    pods = {"deployment": deployment["spec"]["template"]["spec"], "runtime": runtime["spec"]}
    return {name: (pod["containers"][0], pod) for name, pod in pods.items()}


def test_every_path_that_is_copied_or_mounted_is_in_a_clone():
    copied = {word for line in instruction("COPY") if "--from" not in line for word in line.split()[:-1]}
    for path in copied:
        assert (ROOT / path).exists(), path
    shown = {line[1:] for line in (DEPLOY / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    assert shown == copied
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel["force-include"], project["project"]["readme"], "pyproject.toml"}
    assert needed | {*project["project"]["license-files"], "constraints.txt"} == copied
    (extras,) = (line.partition("=")[2] for line in instruction("ARG") if line.startswith("EXTRAS"))
    given = re.findall(r"EXTRAS=(\S+)", DOCKERFILE)
    assert extras in given
    assert {extra for each in given for extra in each.split(",")} <= project["project"]["optional-dependencies"].keys()
    compose = read(DEPLOY / "compose.yaml")
    binds = [v for s in compose["services"].values() for v in s["volumes"] if isinstance(v, str) and v[0] == "."]
    assert len(binds) == 5
    for bind in binds:
        assert (DEPLOY / bind.split(":")[0]).is_file(), bind
    build = compose["services"]["server"]["build"]
    assert (DEPLOY / build["context"] / build["dockerfile"]).is_file()
    assert {*read(DEPLOY / "kubernetes" / "kustomization.yaml")["resources"]} == {
        path.name for path in MANIFESTS if path.parent.name == "kubernetes" and "kind" in read(path)
    } - {"kustomization.yaml"}


def test_the_image_starts_the_server_where_others_can_reach_it():
    settings = started(words("CMD"))
    assert settings.host == "0.0.0.0"
    assert not settings.loopback
    ports = {settings.http_port, settings.grpc_port, settings.admin_port}
    assert {int(port) for port in instruction("EXPOSE")[0].split()} == ports
    assert instruction("USER") == [f"{UID}:{UID}"]


def test_the_image_s_health_check_asks_the_admin_port():
    program, flag, code = words("HEALTHCHECK")
    assert (program, flag) == ("python", "-c")
    port, path = re.findall(r"http://127\.0\.0\.1:(\d+)(/\S+?)'", code)[0]
    assert int(port) == DEFAULTS.admin_port
    assert path in HEALTH


@pytest.mark.parametrize("name", ["deployment", "runtime"])
def test_probes_ask_paths_that_the_server_has_on_ports_that_it_opens(name, server):
    container, _ = containers()[name]
    settings = started(container["args"])
    named = {port.get("name"): port["containerPort"] for port in container["ports"]}
    opened = {settings.http_port, settings.admin_port}
    assert set(named.values()) <= opened | {settings.grpc_port}
    probes = {key: value["httpGet"] for key, value in container.items() if key.endswith("Probe")}
    assert probes["readinessProbe"]["path"] == "/v2/health/ready"
    assert probes["livenessProbe"]["path"] == "/v2/health/live"
    for probe in probes.values():
        assert named.get(probe["port"], probe["port"]) in opened
        assert ask(server, "GET", probe["path"]).status_code == httpx.codes.OK


def test_pods_may_finish_their_requests_before_they_are_killed():
    _, pod = containers()["deployment"]
    settings = started(containers()["deployment"][0]["args"])
    assert settings.grace + settings.drain < pod["terminationGracePeriodSeconds"] - 5
    compose = read(DEPLOY / "compose.yaml")["services"]["server"]
    assert int(compose["stop_grace_period"].removesuffix("s")) == pod["terminationGracePeriodSeconds"]


def test_containers_are_not_root_and_write_only_to_their_volumes():
    caches = re.findall(r"XDG_CACHE_HOME=(\S+)", DOCKERFILE)[0]
    for container, pod in containers().values():
        own = container["securityContext"]
        assert {**pod.get("securityContext", {}), **own}["runAsUser"] == UID
        assert own["readOnlyRootFilesystem"] is True
        assert own["allowPrivilegeEscalation"] is False
        assert own["capabilities"] == {"drop": ["ALL"]}
        volumes = {volume["name"] for volume in pod["volumes"]}
        mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert set(mounted.values()) <= volumes
        assert {caches, "/tmp"} <= mounted.keys()
    server = read(DEPLOY / "compose.yaml")["services"]["server"]
    assert server["read_only"] is True
    assert server["tmpfs"] == ["/tmp"]
    assert any(str(volume).endswith(f":{caches}") for volume in server["volumes"])


def test_compose_starts_a_server_that_prometheus_and_grafana_find():
    compose = read(DEPLOY / "compose.yaml")
    services = compose["services"]
    settings = started(services["server"]["command"], {TOKEN: "t"})
    assert {TOKEN, REPOSITORY_TOKEN} == {*services["server"]["environment"]}
    inside = {int(port.split(":")[-1]) for port in services["server"]["ports"]}
    assert inside == {settings.http_port, settings.grpc_port}
    (job,) = read(DEPLOY / "compose" / "prometheus.yml")["scrape_configs"]
    assert job["static_configs"] == [{"targets": [f"server:{settings.admin_port}"]}]
    mounts = dict(str(v).split(":")[:2] for s in ("prometheus", "grafana") for v in services[s]["volumes"])
    assert mounts["../serve/monitoring/alerts.yml"] in read(DEPLOY / "compose" / "prometheus.yml")["rule_files"]
    (source,) = read(DEPLOY / "compose" / "grafana" / "datasources.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["isDefault"]
    (provider,) = read(DEPLOY / "compose" / "grafana" / "dashboards.yml")["providers"]
    assert str(Path(mounts["../serve/monitoring/grafana.json"]).parent) == provider["options"]["path"]


def test_the_service_sends_to_the_pods_ports():
    (service,), (deployment,) = documents("Service"), documents("Deployment")
    container, _ = containers()["deployment"]
    assert service["spec"]["selector"] == deployment["spec"]["template"]["metadata"]["labels"]
    names = {port["name"] for port in container["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} <= names
    (budget,) = documents("PodDisruptionBudget")
    assert budget["spec"]["selector"] == deployment["spec"]["selector"]


def test_the_autoscaler_s_metric_is_one_of_the_server_s(server):
    (scaler,), (deployment,) = documents("HorizontalPodAutoscaler"), documents("Deployment")
    target = scaler["spec"]["scaleTargetRef"]
    assert (target["kind"], target["name"]) == (deployment["kind"], deployment["metadata"]["name"])
    assert "replicas" not in deployment["spec"]
    families = text_string_to_metric_families(server.metrics.page().decode())
    series = {sample.name for family in families for sample in family.samples}
    (rule,) = read(DEPLOY / "kubernetes" / "adapter-values.yaml")["rules"]["custom"]
    for metric in scaler["spec"]["metrics"]:
        name = metric["pods"]["metric"]["name"]
        assert name in series
        assert rule["name"]["as"] == name
        assert rule["seriesQuery"].startswith(f"{name}{{")


def test_scrapes_are_told_where_the_metrics_are(server):
    (deployment,), (runtime,) = documents("Deployment"), documents("ServingRuntime")
    metadata = deployment["spec"]["template"]["metadata"]
    pairs = [
        (metadata["annotations"], "prometheus.io", started(containers()["deployment"][0]["args"]).admin_port),
        (runtime["spec"]["annotations"], "prometheus.kserve.io", started(containers()["runtime"][0]["args"]).http_port),
    ]
    for annotations, prefix, port in pairs:
        assert annotations[f"{prefix}/port"] == str(port)
        assert ask(server, "GET", annotations[f"{prefix}/path"]).status_code == httpx.codes.OK


def test_kserve_s_service_is_one_that_the_runtime_serves():
    (service,), (runtime,) = documents("InferenceService"), documents("ServingRuntime")
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"].items() <= runtime["spec"]["supportedModelFormats"][0].items()
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert started(runtime["spec"]["containers"][0]["args"]).bundles == {
        service["metadata"]["name"]: Path("/mnt/models")
    }


CHECKERS = {
    "hadolint": [DEPLOY / "Dockerfile"],
    "promtool": ["check", "config", "--syntax-only", DEPLOY / "compose" / "prometheus.yml"],
    "kubectl": ["kustomize", DEPLOY / "kubernetes"],
}


@pytest.mark.parametrize("name", CHECKERS)
def test_checkers_accept_them(name):
    program = shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if program is None:
        pytest.skip(f"needs {name}")
    done = subprocess.run([program, *CHECKERS[name]], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
