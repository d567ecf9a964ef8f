"""The house keeps its plan: imports run one way, the wheel is the library alone, and no machine leaves its traces."""

import ast
import importlib
import re
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Final
from zipfile import ZipFile

import pytest

ROOT: Final = Path(__file__).parent.parent
ENGINE: Final = sorted((ROOT / "ssecore").rglob("*.py"))
SERVICE: Final = sorted((ROOT / "handlers").rglob("*.py"))
PRODUCT: Final = [ROOT / "sseapp.py", *ENGINE, *SERVICE]

#: ssecore's modules and packages, from the ground up. Each imports from its own floor and those below it.
FLOORS: Final = (
    {"", "errors"},
    {"wire", "dialects", "settings", "filelock", "workers", "metrics"},
    {"http", "client", "testing"},
    {"streaming"},
    {"log"},
    {"runs", "topics", "hosting"},
    {"server"},
)

#: What only programs import, and `server` of `client`.
OUTER: Final = {"client", "testing", "server"}

#: The command: the only modules of the engine that import the front door, and the service for what it serves.
COMMAND: Final = {"ssecore.server.cli": {"sseapp", "handlers"}}

#: What the product imports besides the standard library and itself: no web framework, no ORM, no SSE library.
DEPENDENCIES: Final = frozenset(
    ["anyio", "httptools", "httpx", "msgspec", "orjson", "prometheus_client", "redis", "uvicorn", "uvloop"]
)

#: What is imported by one file alone: a program that `handlers/local_model.py` starts, where the package is installed;
#: a plugin of pytest's; and the framework whose answers have to be of its own class, where it is installed.
PROGRAMS: Final = {
    "handlers.llama": {"xllamacpp"},
    "ssecore.testing.fixtures": {"pytest"},
    "ssecore.hosting": {"starlette"},
}

#: Hosts of package registries, and folders of whoever works on the project.
TRACES: Final = re.compile(
    r"\b(?:pypi|pythonhosted|npmjs|yarnpkg|crates)\.(?:org|com|io)\b"
    r"|\b(?:deb|archive|packages|security)\.(?:debian|ubuntu)\.(?:org|com)\b"
    r"|(?<![\w.}])/(?:home|root|Users|work)/\w"
)


def module_name(path: Path) -> str:
    """`ssecore/log/sqlite.py` is `ssecore.log.sqlite`, and `ssecore/log/__init__.py` is `ssecore.log`."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports(path: Path) -> Iterator[str]:
    """What the file imports when it runs, wherever the statement stands, as full names of modules."""
    tree = ast.parse(path.read_bytes())
    for_types = {
        statement
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for statement in node.body
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}:{node.lineno}: write the full name, not a relative import"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                yield submodule if is_module(submodule) else node.module


def is_module(name: str) -> bool:
    place = ROOT.joinpath(*name.split("."))
    return place.with_suffix(".py").is_file() or place.is_dir()


def imported_packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


def engine_imports(path: Path) -> set[str]:
    return {name for name in imports(path) if name.partition(".")[0] == "ssecore"}


def entry(module: str) -> str:
    """`ssecore.log.sqlite` stands in the table as `log`."""
    return module.partition(".")[2].partition(".")[0]


def floor(module: str) -> int:
    for number, names in enumerate(FLOORS):
        if entry(module) in names:
            return number
    raise AssertionError(f"{module} has no floor: put it into the table of tests/test_house.py")


@pytest.mark.parametrize("path", ENGINE, ids=module_name)
def test_a_module_of_the_engine_imports_from_below(path: Path) -> None:
    module = module_name(path)
    from_above = {name for name in engine_imports(path) if floor(name) > floor(module)}
    assert not from_above
    if entry(module) != "server":
        assert not {entry(name) for name in engine_imports(path)} & OUTER - {entry(module)}


def test_the_engine_has_no_import_cycle() -> None:
    graph = {module_name(path): engine_imports(path) - {module_name(path)} for path in ENGINE}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"imported by each other: {', '.join(error.args[1])}")


@pytest.mark.parametrize("path", ENGINE, ids=module_name)
def test_the_engine_knows_nothing_of_the_service(path: Path) -> None:
    wrong = imported_packages(path) & {"handlers", "sseapp"} - COMMAND.get(module_name(path), set())
    assert not wrong


@pytest.mark.parametrize("path", SERVICE, ids=module_name)
def test_handlers_import_neither_the_front_door_nor_what_serves_it(path: Path) -> None:
    assert not [name for name in imports(path) if name == "sseapp" or entry(name) in ("server", "testing")]


@pytest.mark.parametrize("path", PRODUCT, ids=module_name)
def test_the_product_imports_nothing_but_the_chosen_dependencies(path: Path) -> None:
    known = sys.stdlib_module_names | DEPENDENCIES | {"handlers", "sseapp", "ssecore"}
    unknown = imported_packages(path) - known - PROGRAMS.get(module_name(path), set())
    assert not unknown


@pytest.mark.parametrize("path", ENGINE, ids=module_name)
def test_what_a_module_makes_public_is_there_and_has_a_docstring(path: Path) -> None:
    module = importlib.import_module(module_name(path))
    public = set(getattr(module, "__all__", ()))
    absent = {name for name in public if not hasattr(module, name)}
    assert not absent

    # By the syntax tree, because a dataclass without a docstring gets one made up.
    statements = ast.parse(path.read_bytes()).body
    definitions = [n for n in statements if isinstance(n, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)]
    explained = {node.name for node in definitions if ast.get_docstring(node)}
    unexplained = {node.name for node in definitions} & public - explained
    assert not unexplained


def run(*command: str | Path, cwd: Path) -> str:
    """What the command prints. The test fails where the command does."""
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZipFile]:
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (path,) = folder.iterdir()
    with ZipFile(path) as file:
        yield file


def test_the_wheel_holds_the_library_only(wheel: ZipFile) -> None:
    library = {path.relative_to(ROOT).as_posix() for path in ENGINE} | {"ssecore/py.typed"}
    library |= {f"sseapp/{name}" for name in ("__init__.py", "__main__.py", "py.typed")}
    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == library


def installed(wheel: ZipFile, environment: Path, *more: str) -> Path:
    """An environment that has the wheel, its dependencies, and more that is installed here. Gives its packages."""
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment.parent)
    (packages,) = environment.glob("lib/python*/site-packages")
    wheel.extractall(packages)
    locked = re.findall(r"^[\w.-]+(?===)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    for name in {*locked, *more}:
        link_distribution(name, packages)
    return packages


def test_the_wheel_imports_where_only_its_dependencies_are(wheel: ZipFile, tmp_path: Path) -> None:
    environment = tmp_path / "environment"
    packages = installed(wheel, environment)
    program = """if True:
        import importlib.util, ssecore.wire
        from sseapp import SSEApp, create_app
        print(ssecore.wire.__file__, [importlib.util.find_spec(name) for name in ("handlers", "tests", "pytest")])
    """
    printed = run(environment / "bin" / "python", "-I", "-c", program, cwd=tmp_path)
    assert printed == f"{packages / 'ssecore' / 'wire.py'} [None, None, None]\n"
    assert run(environment / "bin" / "python", "-m", "sseapp", "--version", cwd=tmp_path).startswith("sseapp ")


def link_distribution(name: str, packages: Path) -> None:
    """Make an installed distribution importable from another environment."""
    try:
        installed = distribution(name)
    except PackageNotFoundError:  # locked for other platforms
        return
    for top in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
        (packages / top).symlink_to(str(installed.locate_file(top)))


LOCKS: Final = [f"requirements{name}.txt" for name in ("", "-build", "-dev", "-local-model")]


@pytest.mark.parametrize("lock", LOCKS)
def test_a_lock_holds_versions_and_hashes_and_no_address(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert "://" not in text
    for requirement in re.split(r"\n(?=\S)", text):
        assert re.match(r"[\w.-]+==\d", requirement)
        assert "--hash=sha256:" in requirement


def test_no_file_names_a_registry_or_a_folder_of_a_developer() -> None:
    listing = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    files = [path for name in listing.split("\0") if (path := ROOT / name).is_file()]
    assert files
    traces = [f"{path}: {match}" for path in files for match in TRACES.findall(path.read_text(errors="replace"))]
    assert not traces


@pytest.mark.parametrize("parts", [("py", "pi.org"), ("registry.npm", "js.org"), ("'/ho", "me/ann"), ("=/ro", "ot/x")])
def test_a_trace_is_recognised(parts: tuple[str, str]) -> None:
    assert TRACES.search("".join(parts))
