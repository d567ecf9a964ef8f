"""deploy/kubernetes.yaml and the image's labels beside the code. No cluster is started: there is none here."""

import re
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

import ssecore
from handlers import ROUTES
from ssecore.server.runner import MAX_END_S
from ssecore.settings import Settings

ROOT: Final = Path(__file__).parent.parent
OBJECTS: Final[dict[str, Any]] = {
    each["kind"]: each for each in yaml.safe_load_all((ROOT / "deploy" / "kubernetes.yaml").read_text())
}
POD: Final[dict[str, Any]] = OBJECTS["Deployment"]["spec"]["template"]["spec"]
CONTAINER: Final[dict[str, Any]] = POD["containers"][0]
ENVIRON: Final[dict[str, str]] = {each["name"]: each["value"] for each in CONTAINER["env"]}


@pytest.mark.parametrize("probe", ["readinessProbe", "livenessProbe", "startupProbe"])
def test_a_probe_asks_an_open_route_at_the_port(probe: str) -> None:
    get = CONTAINER[probe]["httpGet"]
    assert get["path"] in {route.path for route in ROUTES if route.open}
    assert {port["name"]: port["containerPort"] for port in CONTAINER["ports"]}[get["port"]] == Settings().port


def test_the_drain_fits_into_the_time_that_the_cluster_gives() -> None:
    settings = Settings.from_env(ENVIRON)
    assert settings.drain_s + MAX_END_S < POD["terminationGracePeriodSeconds"]


def test_what_is_written_is_on_the_volume_and_nothing_else_can_be() -> None:
    (mount,) = CONTAINER["volumeMounts"]
    assert mount["mountPath"] == "/data" and ENVIRON["SSEAPP_TOKENS_FILE"].startswith("/data/")
    assert f"SSEAPP_DATA_DIR={mount['mountPath']}" in (ROOT / "Dockerfile").read_text()
    assert CONTAINER["securityContext"]["readOnlyRootFilesystem"] and POD["securityContext"]["runAsNonRoot"]
    assert (
        str(POD["securityContext"]["fsGroup"]) == re.findall(r"^USER (\d+)", (ROOT / "Dockerfile").read_text(), re.M)[0]
    )


def test_the_service_finds_the_pods_and_sets_no_variable() -> None:
    labels = OBJECTS["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert OBJECTS["Service"]["spec"]["selector"] == labels
    assert POD["enableServiceLinks"] is False


def test_the_version_is_the_same_everywhere() -> None:
    label = re.search(r'image\.version="([^"]+)"', (ROOT / "Dockerfile").read_text())
    assert label and label[1] == ssecore.__version__
    assert CONTAINER["image"] == f"sseapp:{ssecore.__version__}"
