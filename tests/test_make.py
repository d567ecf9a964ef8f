"""What `make` says and asks before it installs anything."""

import os
import pty
import shutil
import subprocess
from pathlib import Path
from typing import Final

import pytest

from tests.serving import written_on

ROOT: Final = Path(__file__).parent.parent


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A folder of programs that has hardly any, and an apt-get that only tells that it was called."""
    for name in ("id", "env", "cat"):
        (tmp_path / name).symlink_to(str(shutil.which(name)))
    (tmp_path / "apt-get").write_text(f"#!/bin/sh\necho called >> {tmp_path}/apt.log\n")
    (tmp_path / "apt-get").chmod(0o755)
    return tmp_path


def asked(bare: Path, answer: bytes) -> str:
    """What the script writes on a terminal where somebody types this."""
    terminal, screen = pty.openpty()
    environ = {"PATH": str(bare), "HOME": str(bare)}
    shell = str(shutil.which("sh"))
    with subprocess.Popen(
        [shell, "tests/system-packages.sh"], cwd=ROOT, env=environ, stdin=screen, stdout=screen, stderr=screen
    ) as process:
        os.close(screen)
        os.write(terminal, answer)
        written = written_on(terminal)
    os.close(terminal)
    assert process.returncode == 0
    return written.decode()


@pytest.mark.parametrize("answer", [b"n\n", b"\n", b"\x04"])
def test_system_packages_are_not_installed_unless_a_person_says_yes(bare: Path, answer: bytes) -> None:
    written = asked(bare, answer)
    assert "Install them with apt?" in written and "buildah" in written
    assert "not installed: buildah (the tests that need it are skipped)" in written
    assert not (bare / "apt.log").exists()


@pytest.mark.parametrize(("stage", "all_of_them"), [("test", False), ("test-all", True)])
def test_the_first_stage_installs_nothing_of_the_system_and_runs_what_needs_nothing(
    stage: str, all_of_them: bool
) -> None:
    command = ["make", "--dry-run", "--always-make", stage]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for more in ("system-packages.sh", "npm ci", "requirements-local-model.txt"):
        assert (more in printed) == all_of_them
    assert ("-m 'not needs'" in printed) != all_of_them
    assert all(check in printed for check in ("ruff check", "ruff format --check", "bin/mypy"))


def test_running_installs_no_tools_of_the_tests() -> None:
    fresh = ["make", "--dry-run", "--always-make", "run"]
    done = subprocess.run(fresh, cwd=ROOT, capture_output=True, text=True)
    assert "-r requirements.txt -r requirements-build.txt" in done.stdout
    assert "requirements-dev.txt" not in done.stdout and "installing what running needs" in done.stdout
