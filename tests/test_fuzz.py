"""Whatever is typed or lies in a file: one named error or a result, never a traceback, never without end.

``HYDRA_PIPE_FUZZ=N`` tries N inputs of each of the seven kinds (``make fuzz``: 300); without it a few, always the same.
"""

from __future__ import annotations

import contextlib
import datetime
import gzip
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra_pipe.cli import main
from hydra_pipe.pipeline.analysis.status import status
from hydra_pipe.pipeline.opened_run import open_run
from hydra_pipe.pipeline.spec.spec import RunSpec, load_toml
from hydra_pipe.pipeline.verify.verify import verify
from hydra_pipe.storage.errors import HydraError, RecipeError
from hydra_pipe.storage.rows import RowStore
from hydra_pipe.storage.rundir import RunDirectory
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.recipes import data_cifar, data_idx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.end_to_end.support import cli, serial
from tests.recipes import Small
from tests.workers.recipes.test_datasets import write_idx
from tests.workers.recipes.test_datasets_cifar import cifar_batch, write_cifar

MANY = os.environ.get("HYDRA_PIPE_FUZZ")
fuzzed = settings(
    max_examples=int(MANY or 6),
    derandomize=MANY is None,
    database=None,
    deadline=datetime.timedelta(seconds=60),  # what hangs
    suppress_health_check=list(HealthCheck),
)

ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([0, -1, 2**31, 2**63, 10**30, 1e308, -0.0, 0.5]),
    st.text(max_size=20),
    st.sampled_from(
        ["", "..", "../../x", "/etc/passwd", "a/b", "float64", "nan", "\x00", "s3://k:s@b/c", "²"]
    ),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
    st.integers(60, 70).map(lambda depth: json.loads("[" * depth + "]" * depth)),
)
"""Values that may stand anywhere in a document."""


def named(function: Callable[[], Any]) -> None:
    """Call it; only our own errors may come, on one line."""
    said = "nothing"
    try:
        function()
    except HydraError as error:
        said = str(error)
    assert said.strip()
    assert "\n" not in said


def places(document: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Give the path to every value of a document."""
    if path:
        yield path
    if isinstance(document, dict | list):
        pairs = document.items() if isinstance(document, dict) else enumerate(document)
        for key, value in pairs:
            yield from places(value, (*path, key))


def changed(document: Any, path: tuple[Any, ...], value: Any) -> Any:
    """Return a copy of a document with another value at a place; ``...`` removes it."""
    document = json.loads(json.dumps(document))
    at = document
    for key in path[:-1]:
        at = at[key]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return document


@st.composite
def mangled(draw: st.DrawFn, data: bytes) -> bytes:
    """Return bytes cut off, flipped, overwritten or repeated."""
    at = draw(st.integers(0, max(0, len(data) - 1)))
    some = draw(st.binary(max_size=8))
    return draw(
        st.sampled_from(
            [
                data[:at],
                data[:at] + some + data[at:],
                data[:at] + some + data[at + len(some) :],
                data[:at] + bytes([data[at] ^ (1 << at % 8)]) + data[at + 1 :] if data else some,
                data + data[at:],
                some,
            ]
        )
    )


@contextlib.contextmanager
def replaced(path: Path, data: bytes) -> Iterator[None]:
    """Have a file hold other bytes within."""
    before = path.read_bytes()
    path.write_bytes(data)
    try:
        yield
    finally:
        path.write_bytes(before)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: Any) -> Path:
    place: Path = tmp_path_factory.mktemp("fuzz") / "run"
    serial(place, Small(), shards=2)
    return place


def documents(run: Path) -> list[str]:
    return sorted(str(p.relative_to(run)) for p in (run / "manifests").rglob("*.json"))


def look_at(run: Path) -> None:
    """Do with a run what readers do."""
    named(lambda: status(open_run(run)))
    named(lambda: verify(open_run(run)))
    named(lambda: open_run(run).top(3))
    named(lambda: open_run(run).samples())
    named(lambda: open_run(run).hypergradient_store().read(0, 2))


@st.composite
def odd_document(draw, before: bytes) -> bytes:
    """One value of a document is another or gone, or its bytes are mangled; without its seal, which alone would notice."""
    if not draw(st.booleans()):
        return draw(mangled(before))
    document = json.loads(before)
    document.pop("document_sha256", None)
    where = draw(st.sampled_from(list(places(document))))
    return json.dumps(changed(document, where, draw(st.one_of(st.just(...), ODD)))).encode()


@fuzzed
@given(data=st.data())
def test_run_json(finished, data):
    path = finished / "run.json"
    text = data.draw(odd_document(path.read_bytes()))
    with replaced(path, text):
        look_at(finished)


@fuzzed
@given(data=st.data())
def test_manifests(finished, data):
    path = finished / data.draw(st.sampled_from(documents(finished)))
    text = data.draw(odd_document(path.read_bytes()))
    with replaced(path, text):
        look_at(finished)
        assert "unexpected error" not in cli("verify", finished, "--quiet").output


@fuzzed
@given(data=st.data())
def test_metadata_of_arrays(finished, data):
    found = sorted(p for p in finished.rglob("zarr.json"))
    path = data.draw(st.sampled_from(found))
    document = json.loads(path.read_bytes())
    if data.draw(st.integers(0, 3)):
        where = data.draw(st.sampled_from(list(places(document))))
        text = json.dumps(changed(document, where, data.draw(st.one_of(st.just(...), ODD)))).encode()
    else:
        text = data.draw(mangled(path.read_bytes()))

    def record() -> None:
        read = open_trajectory(str(finished / "trajectory.zarr"))
        read.checkpoint(0)
        read.visits()

    def rows(folder: str, name: str) -> None:
        store = RowStore.open(str(finished / folder), name)
        store.read(0, min(store.rows, 3))
        for column in store.column_names():
            store.column(column)

    with replaced(path, text):
        named(record)
        named(lambda: rows("hypergradients/method=hydra.zarr", "hypergradient"))
        named(lambda: rows("test_gradients.zarr", "gradient"))


@fuzzed
@given(data=st.data())
def test_tables_and_chunks(finished, data):
    found = sorted(p for p in finished.rglob("*") if p.suffix == ".parquet" or "/c/" in str(p))
    path = data.draw(st.sampled_from([p for p in found if p.is_file()]))
    with replaced(path, data.draw(mangled(path.read_bytes()))):
        look_at(finished)
        judged = cli("verify", finished, "--quiet")
        assert judged.exit_code in (0, 1)
        assert "unexpected error" not in judged.output


KEYS = [*RunSpec.__dataclass_fields__, "set", "odd-key"]
WORDS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["all", "10%", "1:3", "-1", "9" * 400, "1e400", "nan", "4GiB", "/dev/zero", "/", "exact", "ray"]
    ),
)


def toml(value: Any) -> str:
    return json.dumps(value) if not isinstance(value, dict) else "{}"


@fuzzed
@given(
    lines=st.lists(
        st.tuples(st.sampled_from(KEYS), st.one_of(ODD, WORDS).filter(lambda value: value is not None)),
        max_size=4,
    ),
    junk=st.one_of(st.just(""), st.text(max_size=30)),
)
def test_configurations(tmp_path_factory, lines, junk):
    path = tmp_path_factory.getbasetemp() / "config.toml"
    text = "\n".join(f"{key} = {toml(value)}" for key, value in lines)
    path.write_bytes((text + "\n" + junk).encode("utf-8", "surrogatepass"))
    named(lambda: RunSpec(**load_toml(str(path))).identity())


def options() -> list[tuple[str, str]]:
    """Every option of every command."""
    return [
        (name, option)
        for name, command in main.commands.items()
        for parameter in command.params
        if parameter.param_type_name == "option"
        for option in parameter.opts
    ]


@fuzzed
@given(data=st.data())
def test_command_lines(finished, tmp_path_factory, data):
    def none(*given: Any, **more: Any) -> Any:
        raise RecipeError("no recipe is loaded in this test")

    command = data.draw(st.sampled_from(list(main.commands)))
    own = [option for name, option in options() if name == command and option != "--debug"]
    words = data.draw(st.lists(st.one_of(WORDS, st.sampled_from(own)), max_size=5))
    first = data.draw(st.sampled_from([["nowhere"], [str(finished)], []]))
    if command in ("detect", "clean", "report", "explain", "evaluate", "attribute") and first == [
        str(finished)
    ]:
        first = ["nowhere"]  # these write
    place = tmp_path_factory.mktemp("line")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hydra_pipe.workers.recipes.loading.load_recipe", none)
        patch.chdir(place)
        found = cli(command, *first, *words)
    assert found.exit_code in (0, 1, 2), found.output
    assert not re.search(r"Traceback|unexpected error", found.output), (words, found.output)
    assert found.exception is None or isinstance(found.exception, SystemExit)
    shutil.rmtree(place)


@fuzzed
@given(data=st.data())
def test_data_sets(tmp_path_factory, data):
    place = tmp_path_factory.getbasetemp() / "data"
    if not place.exists():
        write_idx(place / "plain", train=20, test=10)
        write_idx(place / "zipped", train=20, test=10, zipped=True)
        write_cifar(place / "cifar", count=10)
    folder = data.draw(st.sampled_from(["plain", "zipped", "cifar"]))
    path = data.draw(st.sampled_from(sorted(p for p in (place / folder).rglob("*") if p.is_file())))
    read = data_cifar.read_images if folder == "cifar" else data_idx.read_images
    content = path.read_bytes()
    if folder == "zipped" and data.draw(st.booleans()):
        content = gzip.compress(data.draw(mangled(gzip.decompress(content))))
    elif folder == "cifar" and data.draw(st.booleans()):
        odd: dict[Any, Any] = {
            **cifar_batch(10, 0),
            data.draw(st.sampled_from([b"data", b"labels", 3])): data.draw(ODD),
        }
        content = pickle.dumps(odd, protocol=data.draw(st.integers(0, 5)))
    else:
        content = data.draw(mangled(content))
    with replaced(path, content):
        for train in (True, False):
            named(lambda train=train: read(place / folder, train=train))


def test_a_run_is_whole_after_all_that(finished):
    assert verify(open_run(finished)).ok
    assert RunDirectory(finished).litter() == []
