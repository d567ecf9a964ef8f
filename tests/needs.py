"""What a test needs of the system: a test marked `@needs("chromium")` is skipped by name where that is missing.

With SSEAPP_TEST_ALL=1, as `.ci/run` sets it, it fails instead. `tests/system-packages.sh` installs what is listed here.
"""

import importlib.util
import os
import re
import shutil
from pathlib import Path
from typing import Final

import pytest

__all__ = ["find", "needs"]

_NODE: Final = Path(__file__).parent / "node" / "node_modules"

#: Each name with the programs or files of which one has to be there. What is added here goes into
#: tests/system-packages.sh too, but for what comes from a lock (see the Makefile): the local model, and what Node runs.
_PLACES: Final = {
    "buildah": ("buildah",),
    "cc": ("cc", "gcc", "clang"),
    "chromium": ("chromium", "chromium-browser"),
    "curl": ("curl",),
    "firefox": ("firefox-esr", "firefox"),
    "java": ("javac",),
    "local-model": (),
    "mmdebstrap": ("mmdebstrap",),
    "nchan": ("/usr/lib/nginx/modules/ngx_nchan_module.so",),
    "nginx": ("nginx",),
    "node-clients": (str(_NODE / "ai" / "package.json"),),
    "openssl": ("openssl",),
    "podman": ("podman",),
    "pyright": (str(_NODE / "pyright" / "index.js"),),
    "redis": ("redis-server",),
    "runc": ("runc",),
    "tmpfs": ("mount",),
    "unshare": ("unshare",),
    "webkit": ("WebKitWebDriver",),
    "xvfb": ("Xvfb",),
}

#: nginx is where a user's own path doesn't lead.
_PATH: Final = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def needs(name: str) -> pytest.MarkDecorator:
    """The mark for a test, a class or (as `pytestmark`) a module."""
    if name not in _PLACES:
        raise ValueError(f"{name} is not in the table of tests/needs.py")
    return pytest.mark.needs(name)


def find(name: str) -> str:
    """The path of the program or file. Raises `LookupError` where there is none: mark the test with `needs`."""
    if name in ("buildah", "tmpfs", "unshare") and not _may_mount():
        raise LookupError(f"needs {name}: only root may mount, and not in every container")
    if name == "local-model" and (package := importlib.util.find_spec("xllamacpp")) and package.origin:
        return package.origin
    for place in _PLACES[name]:
        if path := shutil.which(place, mode=os.F_OK, path=_PATH):
            return path
    raise LookupError(f"needs {name}: not installed")


def _may_mount() -> bool:
    """Whether this process has CAP_SYS_ADMIN, number 21 of capabilities(7)."""
    try:
        capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    except OSError:
        return False
    return capabilities is not None and bool(int(capabilities[1], 16) >> 21 & 1)
