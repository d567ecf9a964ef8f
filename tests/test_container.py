"""The image, built from the Dockerfile by buildah and run by podman: there is no Docker engine here.

The base is a Debian made by mmdebstrap in place of the official Python image, which can't be had either; docs/deploy.md
says what that leaves open. The container has no network of its own kind: the tests enter its network namespace, and so
they speak to it from outside, through its own loopback.
"""

import json
import platform
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import mkdtemp
from typing import Any, Final

import pytest

from ssecore.wire import Decoder
from tests.needs import find, needs
from tests.serving import wait_until

ROOT: Final = Path(__file__).parent.parent
SUITE, PYTHON = "bookworm", "3.11"  #: of the base
NAME: Final = "localhost/sseapp:ci"
USER: Final = 10001
OUT_OF_CONTAINER: Final = ("buildah", "podman", "runc", "mmdebstrap", "curl")


def in_a_container(test: Any) -> Any:
    for name in OUT_OF_CONTAINER:
        test = needs(name)(test)
    return test


def run(*command: object, check: bool = True, timeout_s: float = 110) -> "subprocess.CompletedProcess[str]":
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=timeout_s)
    assert not check or done.returncode == 0, f"{words} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


class Storage:
    """Images and containers in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._options = ["--storage-driver", "vfs", "--root", folder / "root", "--runroot", folder / "run"]

    def buildah(self, *words: object) -> str:
        return run(find("buildah"), *self._options, *words).stdout

    def podman(self, *words: object, check: bool = True) -> "subprocess.CompletedProcess[str]":
        return run(find("podman"), *self._options, "--runtime", find("runc"), *words, check=check)


class Container:
    def __init__(self, storage: Storage, name: str) -> None:
        self.storage, self.name = storage, name

    def inspect(self, what: str) -> str:
        return self.storage.podman("inspect", "--format", what, self.name).stdout.strip()

    def execute(self, *words: object, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
        variables = [f"--env={name}={value}" for name, value in (env or {}).items()]
        return self.storage.podman("exec", *variables, self.name, *words, check=False)

    def curl(self, *words: object) -> list[object]:
        """A command for outside, in the container's network namespace."""
        return ["nsenter", "--net", "--target", self.inspect("{{.State.Pid}}"), find("curl"), "--silent", *words]

    def get(self, path: str, *options: object) -> str:
        return run(*self.curl("--fail", "--max-time", 20, *options, f"http://127.0.0.1:8000{path}")).stdout

    def is_ready(self) -> bool:
        return run(*self.curl("--fail", "http://127.0.0.1:8000/readyz"), check=False).returncode == 0

    def log(self) -> str:
        done = self.storage.podman("logs", self.name)
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def storage() -> Iterator[Storage]:
    folder = Path(mkdtemp(prefix="ctr"))
    storage = Storage(folder)
    yield storage
    storage.podman("rm", "--all", "--force", check=False)
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def base(storage: Storage) -> str:
    """A small Debian with Python. Its packages are unpacked only: to set them up takes a minute, and adds nothing."""
    packages = "--include=base-files,base-passwd,coreutils,dash,libc-bin,python3,python3-venv"
    merged = "--hook-dir=/usr/share/mmdebstrap/hooks/merged-usr"
    context = storage.folder / "base"
    context.mkdir()
    run(find("mmdebstrap"), "--quiet", "--variant=extract", packages, merged, SUITE, context / "base.tar")
    (context / "Dockerfile").write_text("FROM scratch\nADD base.tar /\n")
    name = "localhost/base:ci"
    storage.buildah("bud", "--quiet", "--isolation", "chroot", "--tag", name, context)
    shutil.rmtree(context)
    return name


@pytest.fixture(scope="module")
def image(storage: Storage, base: str) -> str:
    """Built with no index: the locked wheels are fetched outside, in the way this machine fetches packages."""
    wheels, lock = storage.folder / "wheels", storage.folder / "lock.txt"
    # All of the lock, whatever the Python that runs the tests needs of it: its markers are for the one in the image.
    lock.write_text(re.sub(r" ; .*(?= \\$)", "", (ROOT / "requirements.txt").read_text(), flags=re.MULTILINE))
    kinds = [f"--platform={kind}_{platform.machine()}" for kind in ("manylinux2014", "manylinux_2_28")]
    options = ["--quiet", "--no-deps", "--require-hashes", "--only-binary=:all:", f"--python-version={PYTHON}", *kinds]
    run(sys.executable, "-m", "pip", "download", *options, "--dest", wheels, "--requirement", lock)
    config = storage.folder / "pip.conf"
    config.write_text("[global]\nno-index = true\nfind-links = /wheels\n")
    # Health checks are not in OCI's own format.
    how = ["--quiet", "--isolation", "chroot", "--pull-never", "--format", "docker", "--build-arg", f"BASE={base}"]
    given = ["--secret", f"id=pip.conf,src={config}", "--volume", f"{wheels}:/wheels:ro"]
    storage.buildah("bud", *how, *given, "--tag", NAME, ".")
    return NAME


@pytest.fixture(scope="module")
def container(storage: Storage, image: str) -> Iterator[Container]:
    data = storage.folder / "data"
    data.mkdir()
    shutil.chown(data, USER, USER)
    # Limits can only be lowered without CAP_SYS_RESOURCE, and podman's own are higher than some machines'.
    files = min(20_000, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    limits = ["--ulimit", f"nofile={files}:{files}", "--ulimit", "nproc=4096:4096"]
    closed = ["--read-only", "--read-only-tmpfs=false", "--cap-drop", "all", "--security-opt", "no-new-privileges"]
    how = ["--detach", "--network", "none", "--no-healthcheck", *limits, *closed, "--volume", f"{data}:/data"]
    storage.podman("run", "--name", "sseapp", *how, "--env", "SSEAPP_AUTH=off", image)
    container = Container(storage, "sseapp")
    try:
        wait_until(container.is_ready)
        yield container
    except BaseException as error:
        error.add_note(container.log())
        raise
    finally:
        storage.podman("rm", "--force", "sseapp", check=False)


def test_the_dockerfile_is_clean() -> None:
    run(Path(sys.executable).parent / "hadolint", ROOT / "Dockerfile")


@in_a_container
def test_the_image_says_how_it_is_run(storage: Storage, image: str) -> None:
    [facts] = json.loads(storage.podman("image", "inspect", image).stdout)
    config = facts["Config"]
    assert config["User"] == f"{USER}:{USER}"
    assert config["StopSignal"] == "SIGTERM"
    assert (config["Entrypoint"], config["Cmd"]) == (["python", "-m", "sseapp"], ["serve"])
    assert list(config["ExposedPorts"]) == ["8000/tcp"]
    assert facts["Healthcheck"]["Test"][0] == "CMD"
    # Nothing of where the packages came from.
    assert "find-links" not in json.dumps(facts)


@in_a_container
def test_it_serves_from_a_read_only_file_system_without_privileges(container: Container) -> None:
    assert "Hello" in container.get("/stream/hello?interval=0")
    assert container.execute("id", "--user").stdout.strip() == str(USER)
    for place in ("/srv/sseapp/x", "/srv/venv/x", "/etc/x"):
        assert "Read-only file system" in container.execute("python", "-c", f"open('{place}', 'w')").stderr
    status = container.execute("cat", "/proc/1/status").stdout
    assert re.search(r"^CapEff:\s0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s1$", status, re.MULTILINE)


@in_a_container
def test_the_image_holds_what_the_service_needs_and_no_more(container: Container) -> None:
    assert container.execute("python", "-c", "import redis, ssecore.log.redis, handlers").returncode == 0
    for absent in ("pip", "hatchling", "pytest"):
        assert container.execute("/srv/venv/bin/python", "-c", f"import {absent}").returncode != 0
    assert container.execute("sh", "-c", "command -v gcc cc make git").stdout == ""
    assert container.execute("sh", "-c", "ls -d /pip /wheels /etc/pip.conf /srv/sseapp/tests").stdout == ""
    assert container.execute("python", "-c", "import tempfile; print(tempfile.gettempdir())").stdout == "/data\n"
    # Compiled beforehand, since it can't be kept later.
    assert container.execute("sh", "-c", "ls /srv/sseapp/ssecore/__pycache__").stdout


@in_a_container
def test_the_health_check_tells_whether_it_answers(container: Container) -> None:
    [facts] = json.loads(container.storage.podman("image", "inspect", NAME).stdout)
    _, *command = facts["Healthcheck"]["Test"]
    assert container.execute(*command).returncode == 0
    assert container.execute(*command, env={"SSEAPP_PORT": "1"}).returncode != 0


@in_a_container
def test_without_credentials_it_doesnt_start_on_all_addresses(container: Container) -> None:
    done = container.execute("python", "-m", "sseapp", "serve", "--port", 8001, env={"SSEAPP_AUTH": ""})
    assert done.returncode != 0
    assert "SSEAPP_AUTH=off" in done.stderr


@in_a_container
def test_sigterm_drains_and_a_restart_has_it_all(container: Container) -> None:
    """The last of this file: the container is stopped here."""
    answer = json.loads(container.get("/chat?prompt=" + "one+" * 40, "--header", "prefer: respond-async"))
    command = [str(word) for word in container.curl("--no-buffer", f"http://127.0.0.1:8000/{answer['events']}")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        assert reader.stdout.read(1)  # it is at work
        container.storage.podman("stop", "--time", 10, "sseapp")
        rest = reader.stdout.read()
    assert reader.returncode == 0, "the body has no proper end"
    assert b"[DONE]" not in rest, "the run was over before the stop: this test shows nothing"
    assert container.inspect("{{.State.ExitCode}}") == "0"
    assert "Traceback" not in container.log()
    container.storage.podman("start", "sseapp")
    wait_until(container.is_ready)
    events = Decoder().feed(container.get(f"/{answer['events']}").encode())
    words = "".join(json.loads(event.data)["content"] for event in events[:-1])
    assert words.split()[-40:] == ["one"] * 40
    assert events[-1].data == "[DONE]"
