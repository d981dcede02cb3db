"""Layers that people have, in every form: right against the oracle, and in the way that docs/layers.md says."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hydra_pipe.pipeline.plan.survey import survey
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.determinism import compiled_parts, restored_process
from hydra_pipe.workers.ekfac.curvature import CurvatureEstimate
from hydra_pipe.workers.ekfac.eigenbasis import Eigenbasis
from hydra_pipe.workers.persample.capture import Capture
from hydra_pipe.workers.persample.wide import mode_of, widened
from hydra_pipe.workers.recursion.forms import ADJOINT, EKFAC, EXACT, FAST, FORWARD
from hydra_pipe.workers.replay.make import make_replay
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.test_gradients import TestGradients
from hydra_pipe.workers.training.training import Compute, Training
from hydra_pipe.workers.training.trials import tried_ways
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations

from hydra_pipe import RunSpec, run
from tests import oracle
from tests.layer_recipes import CASES, WIDTH, Headed, Rolled, plain_recipe_of, recipe_of

PAGE = Path(__file__).parents[3] / "docs" / "layers.md"
NONE, DOUBLE, SINGLE = "refused", Compute(dtype="float64", device="cpu"), Compute(device="cpu")
TRACKED = np.array([0, 3, 7])

REFUSED = {"torch.nn.utils.weight_norm", "checkpoint, use_reentrant=True"}
NO_EXACT = {"parametrizations.spectral_norm"}
ROUNDED = {"Llama", "Llama, mask", "Llama, mask, sdpa, tied", ".float() in the loss"}
"""Part of these computes in float32 whatever the run does: so do the products, and so does the oracle."""

EXACT_QUICKLY = [
    "MultiheadAttention, dropout",
    "TransformerEncoderLayer, seq-first",
    "GPT-2, mask, sdpa",
    "Llama, mask",
    "LSTM, two layers both ways, dropout",
    "EmbeddingBag, max",
    "parametrizations.weight_norm",
    "checkpoint, attention",
    ".float() in the loss",
]
KEPT = sorted(CASES.keys() - REFUSED)
OFTEN = {"EmbeddingBag, sum", "MultiheadAttention", "RNN"}
"""Cases of which every form is tried in every test run; of the others in slow ones."""


def rows_of_the_page() -> dict[str, list[str]]:
    """Return the table of docs/layers.md: layer, then the other cells."""
    lines = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {row[0].strip("`"): row[1:] for row in cells}


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Return what gives a case's recipe and record, made once a dtype."""
    made = {}

    def get(case, compute=DOUBLE):
        if any(name in case for name in ("GPT-2", "BERT", "Llama")):
            pytest.importorskip("transformers")
        key = case, compute.dtype
        if key not in made:
            uri = str(tmp_path_factory.mktemp("layers") / "trajectory.zarr")
            recipe = recipe_of(case)
            Recorder(Training(recipe, compute), uri).run()
            made[key] = recipe, open_trajectory(uri)
        return made[key]

    return get


def coupled(compute):
    return Compute(dtype=compute.dtype, device="cpu", batch_norm="coupled")


def directions(trajectory, compute):
    width = len(trajectory.checkpoint(0).weights)
    return np.random.default_rng(0).standard_normal((3, width)).astype(compute.dtype)


def said_of_gradients(told):
    slow = {kind: len(told[kind]) for kind in ("func", "vjp") if told[kind]}
    total = told["rule"] + sum(slow.values())
    return ", ".join(f"{kind} for {count} of {total}" for kind, count in slow.items()) or "rules"


def through_training(case, trajectory, vectors):
    # Fused attention has no second derivative.
    with sdpa_kernel(SDPBackend.MATH):
        return oracle.unrolled(plain_recipe_of(case), trajectory, TRACKED).along(vectors.astype(np.float64))


def held_exactly(case, recipe, trajectory, compute, *, forward=True):
    """Hold the exact forms against autograd through the training; return what is said of the products."""
    limit = {"float64": 1e-6 if case in ROUNDED else oracle.EXACT_FLOAT64, "float32": 1e-5}[compute.dtype]
    vectors = directions(trajectory, compute)
    right = through_training(case, trajectory, vectors)
    scale = np.abs(right).max()
    back = make_replay(
        EXACT, ADJOINT, Training(recipe, coupled(compute)), trajectory, TRACKED, targets=vectors
    ).run()
    assert np.abs(-back.contributions() * recipe.count - right).max() < limit * scale
    if forward:
        rows = make_replay(EXACT, FORWARD, Training(recipe, coupled(compute)), trajectory, TRACKED).run()
        assert np.abs(vectors @ rows.numpy(0, 3).T - right).max() < limit * scale
    return "one at a time" if back.tiles.refusal else "together"


# ---------------------------------------------------------------------- gradients of samples, all


@pytest.mark.parametrize("case", KEPT)
def test_gradients_are_right_and_come_by_the_way_that_the_page_says(case, recorded):
    recipe, trajectory = recorded(case)
    right = oracle.dense(recipe, trajectory, TRACKED).hypergradient
    replay = make_replay(FAST, FORWARD, Training(recipe, DOUBLE), trajectory, TRACKED).run()
    rows, told = replay.numpy(0, 3).copy(), replay.told()["ways"]
    replay.close()
    assert oracle.relative_error(rows, right) < oracle.DENSE_FLOAT64
    assert not told["repaired"]
    assert not told["untried"]
    assert rows_of_the_page()[case][0] == said_of_gradients(told)


def test_the_page_has_a_row_for_every_layer():
    assert rows_of_the_page().keys() == CASES.keys()
    assert {case for case, row in rows_of_the_page().items() if row[0] == NONE} == REFUSED
    assert {case for case, row in rows_of_the_page().items() if row[1] == NONE} == REFUSED | NO_EXACT


@pytest.mark.parametrize(
    "case",
    ["MultiheadAttention, dropout", "TransformerEncoderLayer, seq-first", "LSTM", "GPT-2, mask, dropout"],
)
def test_any_subset_gives_the_same_bits(case, recorded):
    recipe, trajectory = recorded(case, SINGLE)

    def rows(tracked):
        replay = make_replay(FAST, FORWARD, Training(recipe, SINGLE), trajectory, np.asarray(tracked)).run()
        found = replay.numpy(0, len(tracked)).copy()
        replay.close()
        return found

    whole = rows(range(10))
    for tracked in ([7], [0, 4, 9]):
        assert rows(tracked).tobytes() == whole[tracked].tobytes()


@pytest.mark.parametrize(
    "case", ["TransformerEncoderLayer, norm first, dropout", "LSTM, seq-first", "BERT, mask", "Llama, mask"]
)
def test_test_gradients_go_the_same_ways(case, recorded):
    recipe, trajectory = recorded(case)
    found = TestGradients(Training(recipe, DOUBLE), trajectory)
    assert set(found.engine.strategies) <= {"outer", "rule", "second", "lent"}
    assert found.derivative is True
    rows = found.rows(np.arange(4)).gradient
    right = oracle.test_gradients(recipe, oracle.dense(recipe, trajectory, [0]).model, range(4))
    assert np.abs(rows - right).max() < 1e-12 * np.abs(right).max()


def test_a_trial_in_float64_is_one_throughout_and_else_the_recipe():
    recipe = recipe_of(".float() in the loss")
    recipe.seed, recipe.note = 77, "kept"
    other = widened(recipe)
    assert (other.seed, other.note, other.arguments()) == (77, "kept", recipe.arguments())
    assert other.collate.__func__ is recipe.collate.__func__
    model, batch = recipe.model().double(), next(iter(Training(recipe, DOUBLE).loader()))
    assert recipe.losses(model, batch).dtype == torch.float32
    assert other.losses(model, batch).dtype == torch.float64
    assert torch.allclose(other.losses(model, batch), recipe.losses(model, batch).double(), rtol=1e-6)
    x = torch.ones(3, dtype=torch.float64) / 3
    with mode_of(other):
        for cast in (
            x.float(),
            x.half(),
            x.bfloat16(),
            x.to(torch.float32),
            x.to("cpu", torch.float16),
            x.to(torch.ones(1)),
            x.type_as(torch.ones(1)),
            x.type(torch.float32),
            torch.softmax(x, 0, dtype=torch.float32),
            torch.arange(3).float(),
        ):
            assert cast.dtype == torch.float64
        assert torch.equal(x.float(), x)
    with mode_of(recipe):
        assert x.float().dtype == torch.float32


# ---------------------------------------------------------------------- the exact form, and all forms


@pytest.mark.parametrize("case", EXACT_QUICKLY)
def test_exact_products_are_right(case, recorded):
    recipe, trajectory = recorded(case)
    said = held_exactly(case, recipe, trajectory, DOUBLE, forward=False)
    assert rows_of_the_page()[case][1] == said


@pytest.mark.parametrize(
    ("case", "compute"),
    [
        pytest.param(
            case,
            compute,
            id=f"{case}-{name}",
            marks=() if compute is DOUBLE and case in OFTEN else pytest.mark.slow,
        )
        for name, compute in (("float64", DOUBLE), ("float32", SINGLE))
        for case in KEPT
    ],
)
def test_every_form_is_right(case, compute, recorded):
    recipe, trajectory = recorded(case, compute)
    vectors, page = directions(trajectory, compute), rows_of_the_page()[case]
    if case in NO_EXACT:
        with pytest.raises(RecipeError, match="use --hessian none or ekfac"):
            held_exactly(case, recipe, trajectory, compute)
    else:
        assert held_exactly(case, recipe, trajectory, compute) == page[1]
    curvature = CurvatureEstimate(Training(recipe, compute), trajectory, checkpoints=2).run()
    training = Training(recipe, DOUBLE)
    basis = Eigenbasis(curvature.blocks, training.layout, torch.float64, torch.device("cpu"), curvature.core)
    replay = make_replay(
        EKFAC, FORWARD, Training(recipe, compute), trajectory, TRACKED, curvature=curvature
    ).run()
    values = replay.sink.coefficients.bent.curvature

    def bend(step, du):
        turned = basis.to_eigen(torch.from_numpy(du)[None])
        return basis.to_parameters(turned * values(step))[0].numpy()

    for form, options, curved in ((EKFAC, {"curvature": curvature}, bend), (FAST, {}, None)):
        right = oracle.dense(recipe, trajectory, TRACKED, curvature=curved).hypergradient
        forward = make_replay(form, FORWARD, Training(recipe, compute), trajectory, TRACKED, **options).run()
        limit = 1e-11 if compute is DOUBLE else oracle.DENSE_FLOAT32
        assert oracle.relative_error(forward.numpy(0, 3), right) < limit
        back = make_replay(
            form, ADJOINT, Training(recipe, compute), trajectory, TRACKED, targets=vectors, **options
        ).run()
        expected = -(vectors @ right.T) / recipe.count
        assert np.abs(back.contributions() - expected).max() < limit * np.abs(expected).max()
    axes = [
        i for block in curvature.blocks if block.left is None and block.right is None for i in block.entries
    ]
    assert page[2] == f"{len(training.layout.entries) - len(axes)} of {len(training.layout.entries)}"


# ---------------------------------------------------------------------- what is refused, what is said


@pytest.mark.parametrize(
    ("case", "hessian", "message"),
    [
        (
            "torch.nn.utils.weight_norm",
            "none",
            r"layer 'body.0' is under torch.nn.utils.weight_norm, whose weight is no parameter .* use torch.nn.utils.parametrizations.weight_norm",
        ),
        ("checkpoint, use_reentrant=True", "none", "use torch.utils.checkpoint with use_reentrant=False"),
        ("parametrizations.spectral_norm", "exact", "_SpectralNorm._u.*use --hessian none or ekfac"),
    ],
)
def test_what_cannot_be_traced_is_refused_by_name(case, hessian, message, tmp_path):
    spec = RunSpec(
        recipe=recipe_of(case), out=str(tmp_path / "run"), executor="serial", device="cpu", hessian=hessian
    )
    with pytest.raises(RecipeError, match=message) as caught:
        run(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["torch.compile", "torch.compile, a part", "Module.compile"])
def test_a_compiled_model_is_traced_uncompiled_and_that_is_said(case, tmp_path):
    spec = RunSpec(recipe=recipe_of(case), out=str(tmp_path / "run"), executor="serial", device="cpu")
    with restored_process():
        notes = survey(spec, trial=False).notes
    assert [note for note in notes if "is recorded and replayed as it is written, uncompiled" in note]
    assert not compiled_parts(nn.Linear(2, 2))


def test_a_run_gives_a_compiled_model_its_own_way_back(tmp_path):
    from torch._dynamo import eval_frame

    with torch.compiler.set_stance("default"):
        run(RunSpec(recipe=recipe_of("torch.compile"), out=str(tmp_path), executor="serial", device="cpu"))
        assert eval_frame._stance.stance == "default"


@pytest.mark.parametrize(
    "layer",
    [
        parametrizations.weight_norm(nn.LSTM(WIDTH, 4), "weight_ih_l0"),
        parametrizations.weight_norm(nn.MultiheadAttention(WIDTH, 2), "in_proj_weight"),
        nn.LSTM(WIDTH, 4, proj_size=2),
    ],
    ids=["LSTM", "attention", "projections"],
)
def test_what_no_rule_knows_is_left_alone(layer):
    capture = Capture(layer, {id(p): "first" for p in layer.parameters()})
    weights = {id(p) for module in capture.rules for p in module.parameters(recurse=False)}
    own = {id(p) for name, p in layer.named_parameters() if "original" in name or "weight_hr" in name}
    assert not weights & own
    capture.close()


def test_linear_is_as_it_was_after_a_pass_that_failed():
    plain = torch.nn.functional.linear
    layer = nn.MultiheadAttention(WIDTH, 2)
    capture = Capture(layer, {id(p): "first" for p in layer.parameters()})
    with pytest.raises((AssertionError, RuntimeError)), capture.listen():
        layer(torch.zeros(2, 3, WIDTH), torch.zeros(2, 3, WIDTH + 1), torch.zeros(2, 3, WIDTH))
    assert torch.nn.functional.linear is plain
    capture.close()


def test_a_state_that_is_handed_on_has_the_right_gradients(recorded):
    """An LSTM whose last state is what is read out, begun with a state of its own."""

    class Last(Rolled):
        def forward(self, x):
            start = torch.full((1, len(x), 4), 0.3, dtype=x.dtype)
            outputs, (h, c) = self.layer(x, (start, -start))
            return outputs[:, :1] + (h * c).transpose(0, 1)

    recipe = recipe_of("LSTM")
    recipe.model = lambda: Headed(Last(nn.LSTM, batch_first=True), out=4)
    training = Training(recipe, DOUBLE)
    assert set(tried_ways(training).strategies) <= {"outer", "rule"}
