"""nchan, the peer in C: nginx with one worker, without privileges, in a folder of its own."""

import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

from benchmarks.process import START_S, cpu_s, pin_server

__all__ = ["MODULE", "PUBLISH", "SUBSCRIBE", "Nchan"]

MODULE = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")
PUBLISH, SUBSCRIBE = "/publish", "/subscribe"
_NOBODY = 65534
_CONFIGURATION = """
load_module {module};
daemon off;
worker_processes 1;
pid nginx.pid;
error_log stderr warn;
events {{ worker_connections 19000; }}
http {{
    access_log off;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location {publish} {{ nchan_publisher http; nchan_channel_id benchmark; }}
        location {subscribe} {{ nchan_subscriber eventsource; nchan_channel_id benchmark; }}
    }}
}}
"""


class Nchan:
    """Runs until its `with` block ends. `pid` is the worker's. Raises `RuntimeError` where it doesn't start."""

    def __init__(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port: int = free.getsockname()[1]
        self._folder = tempfile.TemporaryDirectory()
        self._log = tempfile.TemporaryFile()
        text = _CONFIGURATION.format(
            module=MODULE, folder=self._folder.name, port=self.port, publish=PUBLISH, subscribe=SUBSCRIBE
        )
        Path(self._folder.name, "nginx.conf").write_text(text)
        command = ["nginx", "-e", "stderr", "-p", self._folder.name, "-c", "nginx.conf"]
        if os.geteuid() == 0:
            shutil.chown(self._folder.name, _NOBODY, _NOBODY)
            # Whatever the configuration says, nchan 1.3.6 makes nginx look for /var/lib/nginx/body, and make it.
            # So it gets its own folder there, which nobody else sees.
            mount = f"mount --bind {self._folder.name} /var/lib/nginx"
            drop = f"setpriv --reuid={_NOBODY} --regid={_NOBODY} --clear-groups"
            command = ["unshare", "--mount", "sh", "-c", f"{mount} && exec {drop} {shlex.join(command)}"]
        self._process = subprocess.Popen(command, stdout=self._log, stderr=self._log, preexec_fn=pin_server)
        try:
            self.pid = self._wait_for_worker()
        except BaseException:
            self.__exit__()
            raise

    def _wait_for_worker(self) -> int:
        master, deadline = self._process.pid, time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            for child in Path(f"/proc/{master}/task/{master}/children").read_text().split():
                # There once the master listens; before it, what `sh` runs.
                with suppress(FileNotFoundError):
                    if Path(f"/proc/{child}/cmdline").read_bytes().startswith(b"nginx: worker"):
                        return int(child)
            time.sleep(0.02)
        raise RuntimeError(f"nginx did not start:\n{os.pread(self._log.fileno(), 1024 * 1024, 0).decode()}")

    def cpu_s(self) -> float:
        return cpu_s(self.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(15)
        self._log.close()
        self._folder.cleanup()
