"""The pages agree with the code, the files of a run, and each other."""

from __future__ import annotations

import dataclasses
import importlib.util
import inspect
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import zarr
from click.testing import CliRunner
from hydra_pipe.cli import main
from hydra_pipe.storage import errors

import hydra_pipe
from hydra_pipe import Recipe, Run, RunSpec
from tests.docs.blocks import OTHERS, ROOT, blocks, made_small, pages

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCED = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """Return the anchors GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", _FENCED.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for link in _LINK.findall(_FENCED.sub("", page.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        target, _, anchor = link.partition("#")
        place = (page.parent / target).resolve() if target else page
        if place in OTHERS and not place.exists():  # written elsewhere, maybe not there yet
            continue
        assert place.exists(), f"{page.name} links to {link}, which is not there"
        if anchor:
            assert anchor in anchors(place), f"{page.name} links to {link}: no such heading"


@pytest.mark.parametrize("page", [p for p in pages() if p not in OTHERS], ids=lambda page: page.name)
def test_every_mark_stands_right_before_a_block(page):
    text = page.read_text(encoding="utf-8")
    marks = re.findall(r"^<!-- (?:file:|not run).*-->$", text, re.MULTILINE)
    assert len(marks) == sum(1 for block in blocks(page) if block.mark)
    assert text.count("\n```") + text.startswith("```") == 2 * len(blocks(page))


def test_the_two_commands_stand_at_the_top_of_the_readme():
    """Under the first heading, with what to ask next."""
    name, text = re.split(r"^## (.*)$", text_of("README.md"), flags=re.MULTILINE)[1:3]
    assert name == "Two commands"
    for command in ("make run", "make test", ".venv/bin/hydra-pipe top runs/digits"):
        assert re.search(rf"^{command}\b", text, re.MULTILINE), command


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_who_types_hydra_pipe_is_told_where_it_is(page):
    """After make run it is not on the PATH: every page says so before its first command."""
    text = page.read_text(encoding="utf-8")
    typed = [match.start() for match in re.finditer(r"^(hydra-pipe|ray|python) ", text, re.MULTILINE)]
    inside = [at for at in typed if any(m.start() < at < m.end() for m in _FENCED.finditer(text))]
    if page.name == "README.md":  # spelled out; short only after pip install
        assert len(inside) == 1
        assert "pip install ." in text[: inside[0]].rpartition("```bash")[2]
    elif inside:
        assert ".venv/bin/" in text[: inside[0]]


def test_the_index_names_every_page():
    listed = {(ROOT / "docs" / link).resolve() for link in _LINK.findall(text_of("docs/index.md"))}
    assert {page for page in pages() if page.name != "index.md"} <= listed


def test_command_reference_is_current():
    place = ROOT / "docs" / "make_reference.py"
    spec = importlib.util.spec_from_file_location("make_reference", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert text_of("docs/reference-cli.md") == module.page(), "run python docs/make_reference.py"


def test_python_reference_names_everything_public():
    text = text_of("docs/reference-python.md")
    code = [*_FENCED.findall(text), *re.findall(r"`([^`\n]+)`", _FENCED.sub("", text))]
    words = set(re.findall(r"[A-Za-z_]+", " ".join(code)))
    wanted = {field.name for field in dataclasses.fields(RunSpec)}
    for kind in (Recipe, Run, RunSpec):
        wanted |= {name for name, _ in inspect.getmembers(kind) if not name.startswith("_")}
    wanted |= {name for name in Recipe.__annotations__ if not name.startswith("_")}
    assert not wanted - words


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_pages_import_from_the_public_face_alone(page):
    text = page.read_text(encoding="utf-8")
    assert not re.findall(r"hydra_pipe\.(?:pipeline|workers|cli)\b.*", text)
    for names in re.findall(r"^from hydra_pipe import (.*)$", text, re.MULTILINE):
        assert {name.strip() for name in names.split(",")} <= set(hydra_pipe.__all__)


def test_the_python_reference_names_the_whole_face():
    words = set(re.findall(r"\w+", text_of("docs/reference-python.md")))
    assert set(hydra_pipe.__all__) - words == {"__version__"}


def test_every_error_is_explained():
    text = text_of("docs/troubleshooting.md")
    for name, kind in inspect.getmembers(errors, inspect.isclass):
        if issubclass(kind, errors.HydraError):
            assert name in text if kind is errors.HydraError else f"### {name}\n" in text, name


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("files") / "run"
    words = ["run", "digits", "--set", "label_noise=0.1", "--test", "4", "--out", str(place), "--quiet"]
    back = ["--mode", "adjoint"]
    for more in ([], [*back, "--hessian", "exact"], [*back, "--targets", "classes"]):
        done = CliRunner().invoke(main, made_small([*words, *more]))
        assert done.exit_code == 0, done.stderr
    return place


def as_hydra(path: Path) -> str:
    """The page describes method hydra and says that the others are alike."""
    return str(path).replace("hydra-exact", "hydra").replace("hydra-classes", "hydra")


def sections(page: str) -> dict[str, str]:
    """Return the text below each heading of a page."""
    parts = re.split(r"^## (.*)$", text_of(page), flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_file_reference_names_every_array_and_column(small_run):
    described = sections("docs/reference-files.md")
    for store in small_run.rglob("*.zarr"):
        text = described[as_hydra(store.relative_to(small_run))]
        group = zarr.open_group(store, mode="r")
        members = [n for n, a in group.members(max_depth=None) if isinstance(a, zarr.Array)]
        for name in [*members, *group.attrs]:
            assert f"`{name}`" in text, f"{store.name}: {name}"
    for kind in ("contributions", "samples", "interclass"):
        (part,) = (small_run / kind / "method=hydra").glob("*.parquet")
        for field in pq.read_schema(part):
            pattern = rf"^\|.*`{field.name}`.*\| {str(field.type).replace('float', 'float32').replace('double', 'float64')} \|"
            assert re.search(pattern, described[kind], re.MULTILINE), f"{kind}: {field}"
    run_json = json.loads((small_run / "run.json").read_text())
    assert {key for key in run_json if f"`{key}`" not in described["run.json"]} == set()
    top = {path.name for path in small_run.iterdir()}
    assert {name for name in top if name not in text_of("docs/reference-files.md")} == set()
    for manifest in (small_run / "manifests").rglob("*.json"):
        stage = as_hydra(manifest.parent.relative_to(small_run / "manifests"))
        unit = re.sub(r"\d{5}", "NNNNN", manifest.stem)
        assert f"`{stage}`" in described["manifests"], stage
        assert f"`{unit}`" in described["manifests"], unit
