"""A real nginx with the configuration that is shipped in deploy/, unprivileged and in a folder of its own.

    with nginx(one.port, two.port) as proxy:
        httpx.get(proxy.url)

Only what belongs to a place is replaced in it: ports, paths, the replicas' addresses. `changes` replaces more, for
tests that can't wait as long as the shipped times.
"""

import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from shutil import copytree
from tempfile import TemporaryDirectory
from typing import Final, Literal

import httpx

from tests.needs import find
from tests.serving import free_port, wait_until

__all__ = ["DEPLOY", "Nginx", "make_certificate", "nginx"]

DEPLOY: Final = Path(__file__).parent.parent / "deploy"
_NOBODY: Final = 65534


class Nginx:
    """Made by `nginx`."""

    def __init__(self, folder: Path, process: "subprocess.Popen[bytes]", port: int, tls_port: int) -> None:
        self.folder = folder  #: of its temporary files and logs
        self.process = process
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.tls_url = f"https://127.0.0.1:{tls_port}"

    def log(self) -> list[list[str]]:
        """The access log, each line in its words: address, connection, time, protocol, method, path, status, …"""
        return [line.split() for line in (self.folder / "access.log").read_text().splitlines()]

    def spooled_bytes(self) -> int:
        """What it has laid aside in files, deleted ones too."""
        size = 0
        for pid in [self.process.pid, *self._workers()]:
            for descriptor in Path(f"/proc/{pid}/fd").glob("*"):
                with suppress(OSError):
                    if str(self.folder / "tmp") in os.readlink(descriptor):
                        size += os.stat(descriptor).st_size
        return size

    def reload(self) -> None:
        """Read the configuration again. Returns when new workers are at work."""
        old = set(self._workers())
        self.process.send_signal(signal.SIGHUP)
        wait_until(lambda: set(self._workers()) - old)

    def send_workers(self, what: signal.Signals) -> None:
        for pid in self._workers():
            with suppress(ProcessLookupError):  # an old one, after a reload
                os.kill(pid, what)

    def _workers(self) -> list[int]:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return [int(pid) for pid in children.read_text().split()]


@contextmanager
def nginx(
    *ports: int,
    config: Literal["nginx.conf", "nginx-tls.conf"] = "nginx.conf",
    changes: Mapping[str, str] | None = None,
) -> Iterator[Nginx]:
    """In front of these ports of this machine. Yields when it answers."""
    with TemporaryDirectory() as name:
        folder, port, tls_port = Path(name), free_port(), free_port()
        copytree(DEPLOY / "sseapp", folder / "sseapp")
        replicas = "".join(f"server 127.0.0.1:{port} max_fails=1 fail_timeout=2s;\n" for port in ports)
        (folder / "sseapp/replicas.conf").write_text(replicas)
        places = {
            "/tmp/nginx": f"{folder}/tmp/nginx",
            "/dev/stdout": f"{folder}/access.log",
            "listen 8080": f"listen 127.0.0.1:{port}",
        }
        if config == "nginx-tls.conf":
            places |= {"listen 8443": f"listen 127.0.0.1:{tls_port}", "/etc/nginx/tls": name}
            make_certificate(folder)
        (folder / config).write_text((DEPLOY / config).read_text())
        for old, new in {**places, **(changes or {})}.items():
            paths = [path for path in (folder / config, *folder.glob("sseapp/*")) if old in path.read_text()]
            assert paths, f"{old!r} is no longer in the shipped configuration"
            for path in paths:
                path.write_text(path.read_text().replace(old, new))
        (folder / "tmp").mkdir()
        command = [find("nginx"), "-e", "stderr", "-g", "daemon off;", "-p", name, "-c", config]
        if os.geteuid() == 0:  # else the workers alone would be nobody's, and could not write into the folder
            for path in (folder, *folder.rglob("*")):
                os.chown(path, _NOBODY, _NOBODY)
            command = ["setpriv", f"--reuid={_NOBODY}", f"--regid={_NOBODY}", "--clear-groups", *command]
        process = subprocess.Popen(command)
        try:
            proxy = Nginx(folder, process, port, tls_port)
            wait_until(lambda: process.poll() is not None or _answers(proxy))
            assert process.poll() is None, "nginx doesn't start"
            yield proxy
        finally:
            process.terminate()
            process.wait(10)


def _answers(proxy: Nginx) -> bool:
    with suppress(httpx.HTTPError):
        # Anything: the replicas may be away.
        return bool(httpx.get(f"{proxy.url}/healthz", trust_env=False).status_code)
    return False


def make_certificate(folder: Path) -> None:
    """privkey.pem and fullchain.pem, for 127.0.0.1. Needs openssl."""
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2", "-nodes"]
    key = [
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:prime256v1",
        "-keyout",
        "privkey.pem",
        "-out",
        "fullchain.pem",
    ]
    command = [find("openssl"), "req", "-x509", *key, *subject]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)
