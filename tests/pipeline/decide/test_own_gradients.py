"""Detectors that look at gradients: against autograd a sample at a time, and scikit-learn on those gradients."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra_pipe.pipeline.decide.case import Case, Options
from hydra_pipe.pipeline.decide.gradient_rows import LastLayer, rows_of
from hydra_pipe.pipeline.decide.passes import Passes
from hydra_pipe.pipeline.decide.scorers import SCORERS
from hydra_pipe.storage.errors import IncompleteStage, InputError, NonFiniteTangents, SpecError
from hydra_pipe.workers.model.layout import load_flat
from hydra_pipe.workers.training import own_gradients
from sklearn.ensemble import IsolationForest
from sklearn.random_projection import SparseRandomProjection
from torch import nn

from tests.end_to_end.support import serial
from tests.recipes import Images, Small, gaussian

PLACE = {"executor": "serial", "device": "cpu"}
LIMIT = {"float32": 1e-6, "float64": 1e-10}


def case(run, recipe, *, method="hydra", given=None, tracked=None, **options):
    samples = run.samples()
    index = samples["train_index"].to_numpy().astype(np.int64) if tracked is None else np.asarray(tracked)
    labels = samples["label"].to_numpy().astype(np.int64)[np.searchsorted(samples["train_index"], index)]
    return Case(
        run=run,
        tracked=index,
        given=labels if given is None else np.asarray(given),
        method=method,
        selecting=None,
        passes=Passes(run, recipe, given=PLACE),
        options=Options(**options),
    )


def score(name, *args, **kwargs):
    found = SCORERS[name].score(case(*args, **kwargs))
    assert (found.suggested == -1).all()
    return found


def brute(recipe, run, k=-1):
    """Return d loss_i / d w of every training sample at a checkpoint, by autograd one by one, (N, D), and (start, stop) by name."""
    dtype = torch.float64 if run.info["spec"]["dtype"] == "float64" else torch.float32
    model = recipe.model().to(dtype).eval()
    parameters = dict(model.named_parameters())
    load_flat(list(parameters.values()), torch.from_numpy(run.trajectory().checkpoint(k).weights))
    rows = []
    for x, y in recipe.train_dataset():
        loss = recipe.losses(model, [x[None].to(dtype), torch.as_tensor(y)[None]])[0]
        found = torch.autograd.grad(loss, list(parameters.values()))
        rows.append(torch.cat([g.reshape(-1) for g in found]).double().numpy())
    stops = np.cumsum([p.numel() for p in parameters.values()])
    spans = {n: (int(s) - p.numel(), int(s)) for (n, p), s in zip(parameters.items(), stops, strict=True)}
    return np.stack(rows), spans


def close(found, right, limit=1e-10):
    return np.abs(found - right).max() <= limit * np.abs(right).max()


def forest(rows, seed=0):
    rows = rows.astype(np.float32)
    return -IsolationForest(random_state=seed).fit(rows).score_samples(rows)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """A run with dropout and convolutions in float64, with checkpoints on the way, and its gradients by brute force."""
    place = tmp_path_factory.mktemp("own") / "r"
    run = serial(place, Images(), dtype="float64", checkpoint_every=5)
    gradients, spans = brute(Images(), run)
    return run, gradients, spans


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return serial(tmp_path_factory.mktemp("single") / "r", Small())


# ---------------------------------------------------------------------- the last layer


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_closed_form_is_the_gradient_of_the_last_layer(dtype, done, single):
    run, recipe, last = (
        (done[0], Images(), "8.weight") if dtype == "float64" else (single, Small(), "2.weight")
    )
    gradients, spans = brute(recipe, run)
    right = gradients[:, slice(*spans[last])]
    rows = rows_of(case(run, recipe))
    assert isinstance(rows, LastLayer)
    found = np.concatenate([block for _, block in rows.blocks()])
    assert found.shape == right.shape
    assert close(found, right, LIMIT[dtype])
    absolute, length = rows.norms()
    assert close(absolute, np.abs(right).sum(1), LIMIT[dtype])
    assert close(length, np.linalg.norm(right, axis=1), LIMIT[dtype])
    for name, values in (("l1", absolute), ("l2", length)):
        assert np.array_equal(score("outlier-gradient", run, recipe, scorer=name).suspicion, values)


def test_the_forest_is_scikit_learns_on_those_gradients(done):
    run, gradients, spans = done
    rows = gradients[:, slice(*spans["8.weight"])]
    found = score("outlier-gradient", run, Images(), scorer="iforest", seed=4)
    assert found.notes == {"way": "closed form", "dimensions": rows.shape[1]}
    assert np.allclose(found.suspicion, forest(rows, 4), atol=1e-12)
    unit = rows / np.linalg.norm(rows, axis=1)[:, None]
    found = score("outlier-gradient", run, Images(), scorer="iforest", normalise="unit")
    assert np.allclose(found.suspicion, forest(unit), atol=1e-12)


def test_a_forest_a_class_and_ranks_within_a_class(done):
    run, gradients, spans = done
    rows, label = gradients[:, slice(*spans["8.weight"])], run.samples()["label"].to_numpy()
    found = score("outlier-gradient", run, Images(), scorer="iforest", per_class=True).suspicion
    ranked = score("outlier-gradient", run, Images(), scorer="l2", per_class=True).suspicion
    for one in np.unique(label):
        mine = label == one
        assert np.allclose(found[mine], forest(rows[mine]), atol=1e-12)
        order = np.argsort(np.linalg.norm(rows[mine], axis=1))
        assert np.allclose(ranked[mine][order], np.arange(1, mine.sum() + 1) / mine.sum())
    alone = case(run, Images(), given=[7, *label[1:]], scorer="iforest", per_class=True)
    assert np.flatnonzero(np.isnan(SCORERS["outlier-gradient"].score(alone).suspicion)).tolist() == [0]


class Smoothed(Small):
    """Its loss is not the cross entropy of its outputs."""

    def losses(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none", label_smoothing=0.2)


class _Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(torch.tanh(self.first(x))).mul_(2)  # the layer's output itself, changed


class Doubled(Small):
    def model(self):
        return _Doubled()


@pytest.mark.parametrize(("recipe", "last"), [(Smoothed, "2.weight"), (Doubled, "last.weight")])
def test_where_the_closed_form_is_not_the_gradient_it_is_not_used(recipe, last, tmp_path):
    run = serial(tmp_path / "r", recipe(), dtype="float64", epochs=1)
    gradients, spans = brute(recipe(), run)
    rows = gradients[:, slice(*spans[last])]
    found = score("outlier-gradient", run, recipe(), scorer="l1")
    assert found.notes["way"] == "per-sample gradients"
    assert close(found.suspicion, np.abs(rows).sum(1))


# ---------------------------------------------------------------------- other layers, projections


@pytest.mark.parametrize(
    ("layer", "names"), [("all", None), ("0", ("0.weight", "0.bias")), ("5.weight", ("5.weight",))]
)
def test_norms_and_forests_by_layer(layer, names, done):
    run, gradients, spans = done
    chosen = [np.arange(*spans[name]) for name in names or spans]
    rows = gradients[:, np.concatenate(chosen)]
    found = score("outlier-gradient", run, Images(), layer=layer)
    assert found.notes == {"way": "per-sample gradients", "dimensions": rows.shape[1]}
    assert close(found.suspicion, np.linalg.norm(rows, axis=1))
    assert close(
        score("outlier-gradient", run, Images(), layer=layer, scorer="l1").suspicion, np.abs(rows).sum(1)
    )
    ratio = score("outlier-gradient", run, Images(), layer=layer, scorer="l1", normalise="unit").suspicion
    assert close(ratio, np.abs(rows).sum(1) / np.linalg.norm(rows, axis=1))
    found = score("outlier-gradient", run, Images(), layer=layer, scorer="iforest").suspicion
    assert np.allclose(found, forest(rows), atol=1e-12)


def test_long_rows_are_projected_with_the_seed(done, monkeypatch):
    run, gradients, spans = done
    monkeypatch.setattr(own_gradients, "MOST_DIMENSIONS", 20)

    def projected(rows, seed):
        made = SparseRandomProjection(n_components=20, dense_output=True, random_state=seed)
        return made.fit_transform(rows.astype(np.float32))

    last = gradients[:, slice(*spans["8.weight"])]
    for layer, rows in (("last", last), ("all", gradients)):
        for seed in (1, 2):
            asked = case(run, Images(), layer=layer, scorer="iforest", seed=seed)
            found = rows_of(asked).matrix(seed, unit=False)
            assert found.dtype == np.float32
            assert np.allclose(found, projected(rows, seed), atol=1e-5 * np.abs(rows).max())
            unit = rows_of(asked).matrix(seed, unit=True)
            lengths = np.linalg.norm(rows, axis=1)[:, None]
            assert np.allclose(unit, projected(rows / lengths, seed), atol=1e-5)
        assert SCORERS["outlier-gradient"].score(asked).notes["projected_to"] == 20


def test_how_long_rows_may_be():
    assert own_gradients.projected_width(5120, 10**6) == 5120
    assert own_gradients.projected_width(6000, 10**6) == 5120
    assert own_gradients.projected_width(6000, 20) == 2567  # Johnson and Lindenstrauss, eps 0.1
    assert own_gradients.projected_width(6000, 1) == 1


def test_hypergradients_need_no_recipe(done):
    run, _, spans = done
    stored = run.hypergradients()[:]
    found = score("outlier-gradient", run, None, rows="hypergradients", layer="all")
    assert close(found.suspicion, np.linalg.norm(stored, axis=1))
    last = stored[:, slice(*spans["8.weight"])]
    found = score("outlier-gradient", run, None, rows="hypergradients", scorer="iforest")
    assert np.allclose(found.suspicion, forest(last), atol=1e-12)
    some = score("outlier-gradient", run, None, rows="hypergradients", scorer="l1", tracked=[3, 4, 40])
    assert close(some.suspicion, np.abs(last).sum(1)[[3, 4, 40]])


# ---------------------------------------------------------------------- self-influence


def test_self_influence_is_the_own_contribution(done):
    run, gradients, _ = done
    right = -(gradients * run.hypergradients()[:]).sum(1) / len(gradients)
    assert close(score("self-influence", run, Images()).suspicion, right)
    assert close(score("self-influence", run, Images(), tracked=[2, 44]).suspicion, right[[2, 44]])


def test_self_tracin_is_the_closed_form_over_checkpoints(done):
    run, _, _ = done
    steps = run.trajectory().checkpoint_steps.tolist()
    assert steps == [0, 5, 10, 12]
    right = np.zeros(45)
    for k in (1, 2, 3):
        moved = (steps[k] - steps[k - 1]) * 0.1 / (1 - 0.9)  # learning rate and momentum of the recipe
        right += moved / 45 * np.square(brute(Images(), run, k)[0]).sum(1)
    assert close(score("self-tracin", run, Images()).suspicion, right)


# ---------------------------------------------------------------------- what cannot be asked


def test_what_an_option_may_be(done):
    run = done[0]
    with pytest.raises(InputError, match=r"layer 'head': .*it has last, all, 0, .*8.weight, 8.bias"):
        score("outlier-gradient", run, Images(), layer="head")
    with pytest.raises(InputError, match=r"layer 'head'"):
        score("outlier-gradient", run, None, layer="head", rows="hypergradients")
    with pytest.raises(SpecError, match=r"normalise unit: makes every L2 norm 1 .*use scorer l1"):
        score("outlier-gradient", run, Images(), normalise="unit")
    for name in ("scorer", "normalise", "rows"):
        with pytest.raises(SpecError, match=rf"{name} 'x': must be one of "):
            score("outlier-gradient", run, Images(), **{name: "x"})
    with pytest.raises(InputError, match=r"45 of 45 samples have no label .*leave per_class out"):
        score("outlier-gradient", run, Images(), given=[-1] * 45, per_class=True)
    with pytest.raises(InputError, match=r"1 sample is judged, and a forest takes at least 2"):
        score("outlier-gradient", run, Images(), tracked=[3], scorer="iforest")
    with pytest.raises(InputError, match=r"samples are judged that the run does not track"):
        SCORERS["self-tracin"].score(replace(case(run, Images()), tracked=np.array([3, 99])))


class Unlabelled(Small):
    def train_dataset(self):
        return gaussian(12, self.shape, self.classes, 1)

    def labels(self, dataset):
        return None


def test_a_run_without_hypergradients_labels_or_by_another_recipe(tmp_path):
    run = serial(tmp_path / "r", Unlabelled(), mode="adjoint", epochs=1, dtype="float64")
    for name, options in (("self-influence", {}), ("outlier-gradient", {"rows": "hypergradients"})):
        with pytest.raises(
            IncompleteStage, match=r"method hydra has no hypergradients; run it with --mode forward"
        ):
            score(name, run, Unlabelled(), **options)
    with pytest.raises(InputError, match=r"is not imported unasked.*hydra-pipe detect"):
        score("self-tracin", run, None)
    with pytest.raises(InputError, match=r"knn: 12 of 12 samples have no label"):
        score("knn", run, Unlabelled())
    with pytest.raises(InputError, match=r"was made from something else; what differs: .*training samples"):
        score("self-tracin", run, Small())
    found = score("outlier-gradient", run, Unlabelled())  # without labels autograd still knows
    assert found.notes["way"] == "per-sample gradients"
    gradients, spans = brute(Unlabelled(), run)
    assert close(found.suspicion, np.linalg.norm(gradients[:, slice(*spans["2.weight"])], axis=1))
    both = serial(tmp_path / "r", Unlabelled(), hessian="ekfac", epochs=1, dtype="float64")
    with pytest.raises(
        IncompleteStage, match=r"no hypergradients; name one that has with --method: hydra-ekfac$"
    ):
        score("self-influence", both, Unlabelled())


class Steep(Small):
    """In eval mode the loss of train_index 7 has a finite value and no derivative."""

    def train_dataset(self):
        dataset = super().train_dataset()
        dataset.tensors[0][7, 0] = 1.25
        return dataset

    def losses(self, model, batch):
        output = model(batch[0])
        loss = F.cross_entropy(output, batch[1], reduction="none")
        at = torch.nonzero(batch[0][:, 0] == 1.25).flatten()
        return loss if model.training else loss.index_add(0, at, (0 * output[at, 0]).sqrt())


def test_a_gradient_that_is_not_finite_names_its_sample(tmp_path):
    run = serial(tmp_path / "r", Steep(), epochs=1)
    with pytest.raises(NonFiniteTangents, match=r"train_index 7 is not finite .*leave them out with --track"):
        score("outlier-gradient", run, Steep(), layer="all")
