"""deploy/compose.yaml keeps its word. It is read here, not run: there is no Docker engine, and no image to be had."""

import re
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

from ssecore.settings import Settings, describe
from tests.nginx import DEPLOY

COMPOSE: Final[dict[str, Any]] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES: Final[dict[str, Any]] = COMPOSE["services"]
REPLICAS: Final = ["app1", "app2"]


def seconds(text: str) -> int:
    assert text.endswith("s")
    return int(text[:-1])


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_has_no_privileges_and_a_read_only_file_system(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    # Ours says who it is in the Dockerfile, and has its check there.
    assert name in REPLICAS or service["user"] not in ("", "0", "root")
    assert name in REPLICAS or service["healthcheck"]["test"]


def test_images_are_pinned() -> None:
    images = [service["image"] for name, service in SERVICES.items() if name not in REPLICAS]
    images += re.findall(r"^ARG BASE=(.+)$", (DEPLOY.parent / "Dockerfile").read_text(), re.MULTILINE)
    assert all(re.search(r":\d+\.\d+\.\d+-", image) for image in images), images


def test_only_nginx_is_published_and_only_on_this_machine() -> None:
    published = {name: service["ports"] for name, service in SERVICES.items() if "ports" in service}
    assert published == {"nginx": ["127.0.0.1:8080:8080"]}
    assert COMPOSE["networks"]["log"]["internal"] is True
    assert SERVICES["redis"]["networks"] == ["log"]


def test_nginx_knows_the_replicas() -> None:
    listed = re.findall(r"^server (\S+):8000 ", (DEPLOY / "sseapp/replicas.conf").read_text(), re.MULTILINE)
    assert listed == REPLICAS
    assert all(SERVICES[name]["networks"]["front"]["ipv4_address"] for name in REPLICAS)
    for volume in SERVICES["nginx"]["volumes"]:
        source, target, mode = volume.split(":")
        assert (DEPLOY / source).exists()
        assert Path(target).is_relative_to("/etc/nginx")
        assert mode == "ro"


@pytest.mark.parametrize("name", REPLICAS)
def test_a_replica_has_settings_that_exist_and_the_shared_data(name: str) -> None:
    service = SERVICES[name]
    known = re.findall(r"^ *([A-Z_]+) ", describe(), re.MULTILINE)
    assert set(service["environment"]) <= set(known)
    settings = Settings.from_env(
        {key: str(value) for key, value in service["environment"].items() if "$" not in str(value)}
    )
    assert settings.log.startswith("redis://redis:")
    assert service["volumes"] == ["data:/data"]


def test_nobody_is_killed_before_it_had_time_to_end() -> None:
    drain_s = max(float(SERVICES[name]["environment"]["SSEAPP_DRAIN_S"]) for name in REPLICAS)
    # A second for the farewells, one for the server, one for the log.
    assert all(seconds(SERVICES[name]["stop_grace_period"]) > drain_s + 3 for name in REPLICAS)
    [nginx_s] = re.findall(r"^worker_shutdown_timeout (\d+)s;", (DEPLOY / "nginx.conf").read_text(), re.MULTILINE)
    assert seconds(SERVICES["nginx"]["stop_grace_period"]) > int(nginx_s)


def test_redis_writes_down_what_it_acknowledges_and_throws_nothing_away() -> None:
    command = SERVICES["redis"]["command"]
    options = dict(zip(command[1::2], command[2::2], strict=True))
    assert options["--appendonly"] == "yes"
    assert options["--maxmemory-policy"] == "noeviction"
    assert SERVICES["redis"]["volumes"] == ["redis:/data"]
