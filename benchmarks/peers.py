"""Peers: what attributing all test samples costs beside one plain training, ours and two peers' on one machine.

LeNet-5 on Fashion-MNIST, one thread, everything in one process and in multiples of a plain training by hand (model, optimiser,
``DataLoader``). Ours begins with a record, as the peers begin with a trained model and its checkpoints: what is counted is all
that ``run`` does afterwards (looking at the recipe, trials, test gradients, replay or adjoint, tables), reading and writing
included. Peers: captum's TracInCP at the end of every epoch and kronfluence's EKFAC influence, from the extra ``peers``; one that
is not installed is a line that says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from hydra_pipe.pipeline.drive.attribute import attribute
from hydra_pipe.pipeline.opened_run import Run, open_run
from hydra_pipe.pipeline.run import run as drive
from hydra_pipe.pipeline.spec.spec import RunSpec
from hydra_pipe.storage.trajectory import Trajectory, open_trajectory
from hydra_pipe.workers.determinism import prepare_process
from hydra_pipe.workers.model.layout import Layout, load_flat
from hydra_pipe.workers.recipes.data_images import LabelledImages
from hydra_pipe.workers.recipes.image import Part
from scipy.stats import spearmanr
from torch.utils.data import DataLoader

from .cases import Clothes
from .report import Result
from .timing import median

SIZES: Mapping[str, Any] = {
    "samples": 6400,
    "tests": 200,
    "few": 16,
    "epochs": 4,
    "rounds": 3,
    "peer_rounds": 1,
    "threads": 1,
    "batch": 64,
}
QUICK: Mapping[str, Any] = {**SIZES, "samples": 256, "tests": 12, "few": 4, "epochs": 2, "rounds": 1}

FORMS: Mapping[str, tuple[Mapping[str, Any], float | None]] = {
    "fast, rows stored and joined": ({}, None),
    "fast, adjoint, all test samples": ({"mode": "adjoint"}, 1.5),
    "fast, adjoint, {few} test samples": ({"mode": "adjoint", "few": True}, 1.3),
    "EKFAC, adjoint, all test samples": ({"mode": "adjoint", "hessian": "ekfac"}, 3.0),
    "exact, adjoint, the mean": ({"mode": "adjoint", "hessian": "exact", "targets": "mean"}, None),
    "exact, adjoint, the mean, weights of every step recorded": (
        {"mode": "adjoint", "hessian": "exact", "targets": "mean", "checkpoint_every": 1},
        2.0,
    ),
}
"""Ours: options of the run, and the most it may cost in plain trainings."""


class HeldClothes(Clothes):
    """The images are unpacked once a process: neither side pays for that again and again."""

    NAME = "held-clothes"

    def _part(self, part: Part) -> LabelledImages:
        return _unpacked(self.data_dir, part)


@cache
def _unpacked(place: str | None, part: Part) -> LabelledImages:
    return Clothes(data_dir=place)._part(part)


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What is attributed.

    Attributes:
        recipe: The recipe.
        sizes: Of the benchmark.
        folder: Where runs lie.
        trajectory: Of the record, with a checkpoint at the end of every epoch, once it is there.
    """

    recipe: Clothes
    sizes: Mapping[str, Any]
    folder: Path
    trajectory: Trajectory | None = None

    def spec(self, name: str, **options: Any) -> RunSpec:
        """Return the specification of a run that begins with the record."""
        per_epoch = -(-self.sizes["samples"] // self.recipe.batch_size)
        given = {"threads": self.sizes["threads"], "checkpoint_every": per_epoch, "device": "cpu", **options}
        return RunSpec(recipe=self.recipe, out=str(self.folder / name), executor="serial", shards=1, **given)

    def model(self, checkpoint: int) -> torch.nn.Module:
        """Return the model at a checkpoint."""
        assert self.trajectory is not None
        model = self.recipe.model()
        weights = torch.from_numpy(np.array(self.trajectory.checkpoint(checkpoint).weights))
        load_flat(Layout.of(model).parameters(model), weights)
        return model


def run(sizes: Mapping[str, Any], folder: Path) -> Result:
    """Measure all sides."""
    result = Result(name="peers", sizes=sizes)
    prepare_process(sizes["threads"])
    recipe = HeldClothes(train_size=sizes["samples"], test_size=sizes["tests"], epochs=sizes["epochs"])
    case = Case(recipe=recipe, sizes=sizes, folder=folder)
    drive(case.spec("record"), stages=("record",))
    case = replace(case, trajectory=open_trajectory(str(folder / "record" / "trajectory.zarr")))
    plain = [_seconds(lambda: train(recipe))[0]]
    scores: dict[str, Any] = {}
    for form, (options, goal) in FORMS.items():
        _ours(result, case, form.format(**sizes), dict(options), goal, plain, scores)
    _tracin(result, case, plain, scores)
    for peer, name in ((_captum, "captum"), (_kronfluence, "kronfluence")):
        version = version_of(name)
        if version is None:
            result.add(name, [float("nan")], "x", note="not installed: pip install 'hydra-pipe[peers]'")
        else:
            peer(result, case, version, plain, scores)
    _agreement(result, scores)
    result.add("plain training", plain, "s")
    return result


def version_of(name: str) -> str | None:
    """Return the version of a package; None: it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def train(recipe: Clothes) -> None:
    """Train as anyone would, by hand."""
    torch.manual_seed(recipe.seed)
    model = recipe.model().train()
    optimizer = recipe.optimizer(model)
    loader = DataLoader(recipe.train_dataset(), batch_size=recipe.batch_size, shuffle=True)
    for _epoch in range(recipe.epochs):
        for batch in loader:
            optimizer.zero_grad()
            recipe.losses(model, batch).mean().backward()
            optimizer.step()


def _seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the processor seconds of this process that a call takes, and what it returns."""
    begun = time.process_time()
    found = work()
    return time.process_time() - begun, found


def _against_plain(
    case: Case, plain: list[float], work: Callable[[int], Any], rounds: int
) -> tuple[list[float], Any]:
    """Return a call's cost in plain trainings, each between two of those, and what the last call returned."""
    shares, found = [], None
    for turn in range(rounds):
        spent, found = _seconds(lambda k=turn: work(k))
        plain.append(_seconds(lambda: train(case.recipe))[0])
        shares.append(spent / (0.5 * (plain[-1] + plain[-2])))
    return shares, found


def _ours(
    result: Result,
    case: Case,
    name: str,
    options: dict[str, Any],
    goal: float | None,
    plain: list[float],
    scores: dict[str, Any],
) -> None:
    if options.pop("few", False):
        options["test"] = case.sizes["few"]
    specs = [case.spec(f"{len(scores)}-{turn}", **options) for turn in range(case.sizes["rounds"])]
    for spec in specs:
        drive(spec, stages=("record",))
    shares, found = _against_plain(case, plain, lambda turn: drive(specs[turn]), case.sizes["rounds"])
    scores[name] = _matrix(found)
    stages = found.info["stages"]
    own = {stage: entry.get("seconds") for stage, entry in stages.items() if stage != "record"}
    spent = ", ".join(f"{stage} {seconds:.2g} s" for stage, seconds in own.items() if seconds)
    result.add(f"{name} / plain training", shares, "x", at_most=goal, note=spent)


def _matrix(found: Run, method: str | None = None) -> np.ndarray:
    """Return contributions (Q, n)."""
    name = method or found.info["method"]
    table = found.contributions(method=name).to_table().to_pandas()
    wide = table.pivot_table(index="test_index", columns="train_index", values="contribution")
    return np.asarray(wide)


def _tracin(result: Result, case: Case, plain: list[float], scores: dict[str, Any]) -> None:
    """Our own form of TracInCP, with the published weights of the checkpoints."""
    place = str(case.folder / "record")
    drive(case.spec("record"), stages=("record", "test-gradients"))
    given: dict[str, Any] = {"tracin": {"scale": "published"}}
    shares, found = _against_plain(
        case, plain, lambda turn: attribute(place, given, case.recipe, executor="serial"), 1
    )
    scores["tracin"] = _matrix(open_run(found.uri), "tracin")
    result.add("our tracin, the same checkpoints / plain training", shares, "x")


def _captum(result: Result, case: Case, version: str, plain: list[float], scores: dict[str, Any]) -> None:
    """TracInCP over the checkpoints at the ends of epochs."""
    from captum.influence import TracInCP

    trajectory, recipe = case.trajectory, case.recipe
    assert trajectory is not None
    last = range(1, len(trajectory.checkpoint_steps))

    def load(model: torch.nn.Module, name: str) -> float:
        kept = trajectory.checkpoint(int(name))
        load_flat(Layout.of(model).parameters(model), torch.from_numpy(np.array(kept.weights)))
        return float(trajectory.learning_rate[kept.step - 1, 0])

    def work(_turn: int) -> Any:
        pairs = _Pairs(recipe.train_dataset())
        tests = DataLoader(_Pairs(recipe.test_dataset()), batch_size=case.sizes["batch"])
        explainer = TracInCP(
            case.model(1).eval(),
            pairs,
            [str(k) for k in last],
            checkpoints_load_func=load,
            loss_fn=torch.nn.CrossEntropyLoss(reduction="sum"),
            batch_size=case.sizes["batch"],
            sample_wise_grads_per_batch=True,
        )
        return explainer.influence(tests)

    shares, found = _against_plain(case, plain, work, case.sizes["peer_rounds"])
    scores["captum"] = found.detach().numpy()
    result.add(f"captum {version}, TracInCP, {len(last)} checkpoints / plain training", shares, "x")


def _kronfluence(
    result: Result, case: Case, version: str, plain: list[float], scores: dict[str, Any]
) -> None:
    """EKFAC influence at the last weights."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: torch.nn.Module, sample: bool = False) -> Any:
            logits = model(batch[0])
            labels = batch[1]
            if sample:
                with torch.no_grad():
                    labels = torch.multinomial(F.softmax(logits, 1), 1).flatten()
            return F.cross_entropy(logits, labels, reduction="sum")

        def compute_measurement(self, batch: Any, model: torch.nn.Module) -> Any:
            return self.compute_train_loss(batch, model)

    def work(turn: int) -> Any:
        task = Classification()
        model = prepare_model(case.model(-1).eval(), task)
        place = str(case.folder / f"kronfluence-{turn}")
        analyzer = Analyzer("peers", model, task, cpu=True, output_dir=place, disable_tqdm=True)
        train, tests = _Pairs(case.recipe.train_dataset()), _Pairs(case.recipe.test_dataset())
        each = {"per_device_train_batch_size": case.sizes["batch"]}
        analyzer.fit_all_factors("factors", train, per_device_batch_size=case.sizes["batch"])
        analyzer.compute_pairwise_scores(
            "scores", "factors", tests, train, per_device_query_batch_size=case.sizes["batch"], **each
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"]

    shares, found = _against_plain(case, plain, work, case.sizes["peer_rounds"])
    scores["kronfluence"] = found.numpy()
    result.add(f"kronfluence {version}, EKFAC influence / plain training", shares, "x")


class _Pairs(torch.utils.data.Dataset[Any]):
    """Input and label of each sample, and no more."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        return tuple(self.dataset[index][:2])


def _agreement(result: Result, scores: Mapping[str, np.ndarray]) -> None:
    """Rank correlation over all training samples, the median over test samples."""
    pairs = [
        ("fast, adjoint, all test samples", "fast, rows stored and joined", "the same quantity", 0.9999),
        ("tracin", "captum", "the same quantity", 0.999),
        ("EKFAC, adjoint, all test samples", "kronfluence", "another quantity: no training in it", None),
    ]
    for ours, other, note, goal in pairs:
        if ours in scores and other in scores:
            found = [float(spearmanr(a, b)[0]) for a, b in zip(scores[ours], scores[other], strict=True)]
            result.add(f"{ours} and {other}: Spearman", [median(found)], "", at_least=goal, note=note)
