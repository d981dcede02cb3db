"""The house: which room may import what, what the wheel holds, what stays light."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("storage", "workers", "pipeline", "cli")
FORBIDDEN = {
    "storage": {"torch", "ray", "click", "rich"},
    "workers": {"ray", "click", "rich"},
    "pipeline": {"ray", "click", "rich"},
    "cli": {"ray", "torch", "zarr", "pyarrow"},
}
DRAWS = ROOT / "docs" / "images" / "make_architecture.py"
MAY_IMPORT_RAY = {"workers/actor.py", "pipeline/executors/ray.py", "pipeline/executors/ray_metrics.py"}


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> list[tuple[str, int]]:
    """Every imported module of a file as (name, relative level); names under `if TYPE_CHECKING` too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, 0) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module or "", node.level))
    return found


def room_of(path: Path, module: str, level: int) -> str | None:
    """The room a relative import reaches, or None for other packages."""
    if level == 0:
        return None
    package = ("hydra_pipe", *path.relative_to(ROOT).parent.parts)
    target = [*package[: len(package) - level + 1], *module.split(".")]
    return target[1] if len(target) > 1 and target[0] == "hydra_pipe" else None


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_import_downwards_only(room):
    allowed = set(ROOMS[: ROOMS.index(room) + 1]) | ({""} if room == "cli" else set())  # the face: a version
    for path in sources(room):
        for module, level in imports(path):
            target = room_of(path, module, level)
            assert target is None or target in allowed, f"{path} imports {target}"
            assert not module.startswith("hydra_pipe") or level, f"{path} imports {module} absolutely"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_know_only_their_libraries(room):
    for path in sources(room):
        name = str(path.relative_to(ROOT))
        for module, level in imports(path):
            top = module.split(".")[0]
            if level == 0 and top in FORBIDDEN[room]:
                assert (top, name) in {("ray", allowed) for allowed in MAY_IMPORT_RAY}, (
                    f"{name} imports {top}"
                )


@pytest.mark.parametrize("room", [r for r in ROOMS if r != "cli"])
def test_only_the_cli_prints(room):
    for path in sources(room):
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id
            assert called != "print", f"{path}:{node.lineno} prints"


MAY_IMPORT = {
    "pipeline": {
        "run": "drive executors opened_run plan spec vocabulary",
        "decide": "analysis compare drive evaluate executors plan reading spec units vocabulary",
        "evaluate": "compare drive executors plan reading spec units vocabulary",
        "compare": "drive executors plan reading spec units vocabulary",
        "drive": "analysis executors opened_run plan reading spec units vocabulary",
        "verify": "executors plan reading spec vocabulary",
        "units": "executors plan reading spec vocabulary",
        "plan": "executors reading spec vocabulary",
        "opened_run": "analysis reading",
        "analysis": "reading spec vocabulary",
        "reading": "spec vocabulary",
        "executors": "spec",
        "spec": "vocabulary",
        "vocabulary": "",
    },
    "workers": {
        "estimators": "data determinism ekfac hessian model persample recipe recursion replay training",
        "replay": "determinism ekfac hessian model persample recipe recursion training",
        "reference": "data determinism model recipe training",
        "hessian": "data determinism model persample recipe training",
        "ekfac": "data determinism model persample recipe recursion training",
        "training": "data determinism model persample recipe recursion",
        "actor": "recipes",
        "persample": "data determinism model recipe",
        "recipes": "determinism recipe",
        "recipe": "data",
        "recursion": "model",
        "model": "data",
        "data": "determinism",
        "determinism": "",
        "memory": "",
    },
}
"""What each sub-room or file at the top of a room imports of its room, lazily and for type checkers too; from
the top: nothing imports what stands above it."""

LIMITS = {"pipeline": (16, 9), "workers": (16, 8)}
"""Entries at the top of a room, and floors."""

UNTYPED_AT_MOST = 140
"""``dict[str, Any]`` and ``Mapping[str, Any]`` in pipeline/; to be lowered, never to grow."""


@pytest.fixture(scope="module")
def house() -> ModuleType:
    """The script that draws the house, which reads the imports."""
    spec = importlib.util.spec_from_file_location("make_architecture", DRAWS)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_sub_rooms_import_what_their_table_says(room, house):
    inside = {name: {f"{room}/{other}" for other in found} for name, found in split(room).items()}
    graph = house.top_graph(room)
    assert {name.removeprefix(f"{room}/"): found for name, found in graph.items()} == inside


def split(room: str) -> dict[str, set[str]]:
    return {name: set(others.split()) for name, others in MAY_IMPORT[room].items()}


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_the_table_goes_downwards_only(room):
    names = list(MAY_IMPORT[room])
    for at, (name, others) in enumerate(split(room).items()):
        assert others <= set(names[at + 1 :]), f"{name} imports what stands above it"


def test_no_files_import_each_other(house):
    """Lazily neither; what only type checkers import may go both ways inside a sub-room."""
    assert house.circles(house.files_graph(typing_too=False)) == []


@pytest.mark.parametrize("room", LIMITS)
def test_a_room_is_taken_in_at_a_glance(room, house):
    entries = [path for path in (ROOT / room).iterdir() if path.name != "__pycache__"]
    assert len(entries) <= LIMITS[room][0]
    assert max(house.floors(house.top_graph(room)).values()) <= LIMITS[room][1]


def test_imports_are_read_as_python_does(house, tmp_path, monkeypatch):
    """Lazy ones, names that are modules, packages, and blocks for type checkers."""
    texts = {
        "cli/__init__.py": "from ..pipeline import a\n",
        "pipeline/__init__.py": "",
        "pipeline/a.py": "import torch\nfrom . import b\n",
        "pipeline/b/__init__.py": "def f():\n    from ..c import g\n    from .d import h\n",
        "pipeline/b/d.py": "if TYPE_CHECKING:\n    from ..a import i\nelse:\n    from ..c import j\n",
        "pipeline/c.py": "from ..workers.e import k\n",
        "workers/e.py": "",
    }
    for name, text in texts.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(house, "ROOT", tmp_path)
    house.files_graph.cache_clear()
    files, run = house.files_graph(), house.files_graph(typing_too=False)
    assert files == {
        "cli": {"pipeline/a"},
        "pipeline": set(),
        "pipeline/a": {"pipeline/b"},
        "pipeline/b": {"pipeline/c", "pipeline/b/d"},
        "pipeline/b/d": {"pipeline/a", "pipeline/c"},
        "pipeline/c": {"workers/e"},
        "workers/e": set(),
    }
    assert run == {**files, "pipeline/b/d": {"pipeline/c"}}
    assert house.circles(files) == [["pipeline/a", "pipeline/b", "pipeline/b/d"]]
    assert house.circles(run) == []
    graph = house.top_graph("pipeline")
    assert house.circles(graph) == [["pipeline/a", "pipeline/b"]]
    with pytest.raises(ValueError, match="import each other"):
        house.floors(graph)
    assert house.reduced({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == {"a": {"b"}, "b": {"c"}, "c": set()}
    house.files_graph.cache_clear()


def test_the_picture_of_the_house_is_current(house):
    drawn = house.picture()
    assert house.PICTURE.read_text(encoding="utf-8") == drawn, "run python docs/images/make_architecture.py"


def test_the_map_names_what_is_there():
    """Every path on the page exists, and every sub-room and file at the top of a room is on it."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    named = set(re.findall(rf"`((?:{'|'.join(ROOMS)}|tests|docs)/[^`]*)`", text))
    assert {name for name in named if not (ROOT / name).exists()} == set()
    for room, names in MAY_IMPORT.items():
        wanted = {f"{room}/{name}{'/' if (ROOT / room / name).is_dir() else '.py'}" for name in names}
        assert wanted <= named


def test_every_sub_room_says_what_it_holds():
    for room, names in MAY_IMPORT.items():
        for name in names:
            if (ROOT / room / name).is_dir():
                said = ast.get_docstring(ast.parse((ROOT / room / name / "__init__.py").read_text()))
                assert said is not None, f"{room}/{name}"
                assert len(said) > 40, f"{room}/{name}"


def test_what_crosses_rooms_has_a_type():
    untyped = {"dict[str, Any]", "Mapping[str, Any]"}
    found = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in sources("pipeline")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Subscript) and ast.unparse(node) in untyped
    ]
    assert len(found) <= UNTYPED_AT_MOST, "\n".join(["give these a type:", *found])


PATHS = re.compile(r"\.zarr|\.parquet|\b(method|targets|seed)=")
SPELLS_PATHS = "storage/layout.py"


def texts(path: Path) -> list[tuple[int, str]]:
    """Every text constant of a file but docstrings; of an f-string what is constant in it, in one."""
    tree = ast.parse(path.read_text())
    skipped = {id(n.value) for n in ast.walk(tree) if isinstance(n, ast.Expr)}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [n for n in node.values if isinstance(n, ast.Constant)]
            skipped |= {id(part) for part in parts}
            found.append((node.lineno, "_".join(part.value for part in parts)))
    plain = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and id(n) not in skipped)
    found += [(n.lineno, n.value) for n in plain if isinstance(n.value, str)]
    return found


@pytest.mark.parametrize("room", ROOMS)
def test_only_the_layout_spells_paths_inside_a_run(room):
    spelled = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in sources(room)
        if str(path.relative_to(ROOT)) != SPELLS_PATHS
        for line, text in texts(path)
        # Messages and help, which are sentences, may mention such a path; FILE.… is a file of the user's own.
        if PATHS.search(text) and " " not in text and not text.startswith("FILE.")
    ]
    assert spelled == []


def test_paths_are_found_in_texts_and_not_in_docstrings(tmp_path):
    file = tmp_path / "m.py"
    file.write_text(
        '"""x.zarr"""\nNAME = "a"\n"""y.zarr"""\n'
        'def f(m):\n    """z.parquet"""\n    return f"samples/method={m}/part.parquet", "t.zarr"\n'
    )
    assert [text for _, text in texts(file) if PATHS.search(text)] == [
        "samples/method=_/part.parquet",
        "t.zarr",
    ]


def vocabulary_words() -> dict[str, str]:
    """The stages, modes and forms that a text could spell again: those that are no everyday word or key."""
    from hydra_pipe.pipeline import vocabulary

    names = (
        "TEST_GRADIENTS",
        "RETRAIN",
        "EVALUATE_SCORES",
        "BY_EPOCH",
        "BY_EPOCH_SCORES",
        "EKFAC",
        "EXACT",
        "ADJOINT",
    )
    return {getattr(vocabulary, name): name for name in names}


def test_only_the_vocabulary_spells_stages_modes_and_forms():
    words = vocabulary_words()
    spelled = [
        f"{path.relative_to(ROOT)}:{line}: {text}, which is vocabulary.{words[text]}"
        for path in sources("pipeline")
        if path.name != "vocabulary.py"
        for line, text in texts(path)
        if text in words
    ]
    assert spelled == []


def test_the_vocabulary_declares_what_nothing_else_in_the_pipeline_does():
    """No second ``RECORD = "record"``; a name for something else, such as a schema, may be the same."""
    from hydra_pipe.pipeline import vocabulary

    for path in sources("pipeline"):
        for node in ast.parse(path.read_text()).body:
            if path.name != "vocabulary.py" and isinstance(node, ast.Assign | ast.AnnAssign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for target in targets:
                    same = isinstance(node.value, ast.Constant) and hasattr(
                        vocabulary, getattr(target, "id", "")
                    )
                    assert not same, f"{path}:{node.lineno} declares {ast.unparse(target)} again"


def test_every_package_is_listed_for_the_wheel():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    there = {"hydra_pipe"}
    for room in ROOMS:
        there |= {".".join(("hydra_pipe", *p.parent.relative_to(ROOT).parts)) for p in sources(room)}
    assert set(listed) == there


def test_type_checkers_see_every_room():
    for room in ROOMS:
        assert (ROOT / ".typing" / "hydra_pipe" / room).resolve() == ROOT / room


def test_the_public_face():
    import hydra_pipe

    classes = [
        "Cleaned",
        "Course",
        "Decision",
        "DeepVerification",
        "DetectOptions",
        "Detection",
        "Explanation",
        "HydraCallback",
        "HydraError",
        "InitialState",
        "LightningCallback",
        "LightningRecipe",
        "Questions",
        "Recipe",
        "Recording",
        "Run",
        "RunSpec",
        "TrainerRecipe",
        "Verification",
    ]
    functions = [
        "attribute",
        "attribute_checkpoint",
        "by_epoch",
        "clean",
        "compare",
        "detect",
        "evaluate",
        "explain",
        "open_run",
        "recording",
        "report",
        "run",
    ]
    functions += ["verify", "verify_deep", "load_decision", "read_decision", "with_columns"]
    assert sorted(hydra_pipe.__all__) == sorted([*classes, *functions, "__version__", "events"])
    assert all(isinstance(getattr(hydra_pipe, name), type) for name in classes)
    assert all(inspect.isfunction(getattr(hydra_pipe, name)) for name in functions)
    with pytest.raises(AttributeError, match="nothing_here"):
        hydra_pipe.nothing_here  # noqa: B018
    for name in hydra_pipe.__all__:
        assert getattr(hydra_pipe, name) is not None
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert hydra_pipe.__version__ == project["version"]


def test_help_and_import_stay_light():
    code = (
        "import sys, hydra_pipe, hydra_pipe.cli, hydra_pipe.pipeline.vocabulary\n"
        "heavy = {'torch', 'ray', 'zarr', 'pyarrow', 'numpy', 'sklearn'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_the_rooms_and_nothing_else(tmp_path):
    """Built from a copy without build/, so that deleted modules cannot hide in it."""
    copy = tmp_path / "source"
    wanted = [*ROOMS, "hydra_pipe", "pyproject.toml", "README.md", "LICENSE"]
    for name in wanted:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(copy)],
        check=True,
        capture_output=True,
        env={**os.environ, "SETUPTOOLS_SCM_PRETEND_VERSION": "0"},
    )
    (wheel,) = tmp_path.glob("*.whl")
    held = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    expected = {"hydra_pipe/__init__.py", "hydra_pipe/py.typed"}
    for room in ROOMS:
        expected |= {f"hydra_pipe/{p.relative_to(ROOT)}" for p in sources(room)}
    assert held == expected
