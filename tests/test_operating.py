"""The page for operators, docs/operating.md, beside the code: nothing is missing in it, and nothing is another."""

import dataclasses
import re
from pathlib import Path
from typing import Any, Final

import pytest
from prometheus_client.parser import text_string_to_metric_families

from handlers import ROUTES
from sseapp import Settings, SSEApp
from ssecore.errors import SSEAppError

PAGE: Final = (Path(__file__).parent.parent / "docs" / "operating.md").read_text()
ROWS: Final = [line for line in PAGE.splitlines() if line.startswith("|")]


def variable(field: "dataclasses.Field[Any]") -> str:
    name = field.name.upper() if field.name.startswith("openai_") else f"SSEAPP_{field.name.upper()}"
    return name


def shown(name: str, value: Any) -> str:
    """A default as the page has it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if name.endswith("_bytes"):
        power = next(power for power in (3, 2, 1, 0) if not value % 1024**power)
        return f"{value // 1024**power:,} {('bytes', 'KiB', 'MiB', 'GiB')[power]}"
    if not name.startswith("max_") and name.endswith(("_s", "_ms")):
        return f"{value:,g} {name.rpartition('_')[2]}"
    return f"{value:,g}" if isinstance(value, int | float) and name != "port" else str(value)


@pytest.mark.parametrize("field", dataclasses.fields(Settings), ids=variable)
def test_a_setting_is_there_with_its_default(field: "dataclasses.Field[Any]") -> None:
    rows = [row for row in ROWS if f"`{variable(field)}`" in row.split("|", 3)[1] + row.split("|", 3)[2]]
    assert rows, "it is missing"
    assert any(re.search(rf"(?<![\w.,]){re.escape(shown(field.name, field.default))}(?![\w.])", row) for row in rows), (
        rows
    )


def test_nothing_else_is_called_a_setting() -> None:
    known = {variable(field) for field in dataclasses.fields(Settings)}
    assert set(re.findall(r"`((?:SSEAPP|OPENAI)_[A-Z_]+)", PAGE)) <= known


def test_a_route_that_needs_a_right_is_in_the_table_of_rights_and_no_other() -> None:
    for action in ("publish", "subscribe", "metrics"):
        (row,) = [row for row in ROWS if row.startswith(f"| `{action}` |")]
        needed = {f"{route.method} {route.path}" for route in ROUTES if route.may.partition(":")[0] == action}
        assert set(re.findall(r"`((?:GET|POST) /[^`]*)`", row)) == needed


def test_a_metric_is_there_and_no_other() -> None:
    families = {family.name for family in text_string_to_metric_families(SSEApp([]).metrics.text().decode())}
    named = set(re.findall(r"`((?:sseapp|gen_ai)_[a-z_]+?)(?:_total|_info)?`", PAGE))
    assert named == {re.sub("_info$", "", name) for name in families if not re.search("^process_|_created$", name)}


def test_a_code_is_one_that_the_code_has() -> None:
    def kinds(of: type[SSEAppError]) -> set[type[SSEAppError]]:
        return {of}.union(*map(kinds, of.__subclasses__()))

    statuses = {kind.code: kind.status for kind in kinds(SSEAppError)}
    answers = re.findall(r"(4\d\d|5\d\d) `([a-z_]+)`", PAGE)
    assert len(answers) > 10
    assert [(status, code) for status, code in answers if statuses.get(code) != int(status)] == []
