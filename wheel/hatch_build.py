"""Makes a package `sseapp` of the checkout's `sseapp.py`: type checkers look for `py.typed` in packages only (PEP 561).

Not for an editable install, which would keep a copy of the file in front of the checkout's own.
"""

from typing import Any, Final

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PACKAGE: Final = {
    "sseapp.py": "sseapp/__init__.py",
    "wheel/__main__.py": "sseapp/__main__.py",
    "wheel/py.typed": "sseapp/py.typed",
}


class Package(BuildHookInterface[Any]):
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "standard":
            build_data["force_include"] |= PACKAGE
