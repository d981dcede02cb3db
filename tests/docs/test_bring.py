"""The README's table of what can be brought: every row is tried."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.storage.trajectory import open_trajectory
from hydra_pipe.workers.training.record import Recorder
from hydra_pipe.workers.training.training import Compute, Training

from hydra_pipe import InitialState, recording
from tests.docs.blocks import ROOT
from tests.recipes import Small

HEADING = "### What you can bring"


class Brought(Small):
    """The small recipe, changed by keywords."""

    epochs = 2

    def __init__(self, **changes):
        vars(self).update(changes)


def recorded(place, **changes):
    uri = str(place / "trajectory.zarr")
    Recorder(Training(Brought(**changes), Compute()), uri).run()
    return open_trajectory(uri)


def optimizers(place):
    kinds = [(torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}), (torch.optim.Adam, {}), (torch.optim.AdamW, {})]
    for k, (kind, options) in enumerate(kinds):
        for how in ({}, {"foreach": True}, {"fused": True}):
            make = lambda model, kind=kind, both=options | how: kind(model.parameters(), **both)
            record = recorded(place / f"{k}{len(how)}{list(how)}", optimizer=make)
            assert record.optimizer["class"] == kind.__name__


def clipping(place):
    assert (recorded(place, clip_grad_norm=0.1).clip_factor < 1).any()


def accumulation(place):
    assert recorded(place, accumulate=4).updates.sum() == 4


def steps(place):
    assert len(recorded(place, max_steps=5).batches) == 5


def sampling(place):
    record = recorded(place, order=lambda epoch, generator: [3, 3, 1, epoch])
    assert record.batches[:, :4].tolist() == [[3, 3, 1, 0], [3, 3, 1, 1]]


class Tokens(Brought):
    def weights(self, batch):
        return 1.0 + batch[1]


def tokens(place):
    uri = str(place / "trajectory.zarr")
    Recorder(Training(Tokens(), Compute()), uri).run()
    assert (open_trajectory(uri).divisor > 8).any()


def autocast(place):
    def losses(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            scores = model(batch[0])
        return F.cross_entropy(scores.float(), batch[1], reduction="none")

    assert len(recorded(place, losses=losses).loss) == 12


class Gated(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.late = torch.nn.Linear(6, 3), torch.nn.Linear(3, 3)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if self.training:
            self.seen += 1
        x = self.first(x)
        return self.late(x) if int(self.seen) > 4 else x


def late(place):
    assert recorded(place, model=Gated).active.sum(0).tolist() == [12, 12, 8, 8]


def given_weights(place):
    start = Brought().model().state_dict()
    record = recorded(place, initial_state=lambda: InitialState(weights=start))
    assert record.checkpoint(0).weights.tolist() == torch.cat([v.flatten() for v in start.values()]).tolist()


def own_loop(place):
    recipe = Brought()
    model = recipe.model()
    with recording(model, recipe.optimizer(model), out=place / "run", recipe=recipe) as rec:
        for indices in ([0, 1, 2], [3, 4, 2]):
            inputs, targets = recipe.train_dataset()[indices]
            rec.step(indices, F.cross_entropy(model(inputs), targets, reduction="none"))
    batches = open_trajectory(str(place / "run" / "trajectory.zarr")).batches
    assert batches.tolist() == [[0, 1, 2], [3, 4, 2]]


def trainer(place):
    pytest.importorskip("transformers")
    from transformers import TrainerCallback

    from hydra_pipe import HydraCallback

    assert issubclass(HydraCallback, TrainerCallback)  # tests/docs runs its page's script


def lightning_trainer(place):
    pytest.importorskip("lightning")
    from lightning.pytorch import Callback

    from hydra_pipe import LightningCallback

    assert issubclass(LightningCallback, Callback)  # tests/docs runs its page's script


class Attending(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.TransformerEncoderLayer(6, 2, 8, dropout=0.1, batch_first=True)
        self.last = torch.nn.Linear(6, 3)

    def forward(self, x):
        return self.last(self.layer(x[:, None, :]).mean(1))


def layers(place):
    assert len(recorded(place, model=Attending).loss) == 12


def no_rule(place):
    for make in (torch.optim.Adafactor, lambda ps: torch.optim.AdamW(ps, amsgrad=True)):
        with pytest.raises(RecipeError, match="AdamW"):
            Training(Brought(optimizer=lambda model, make=make: make(list(model.parameters()))), Compute())


def by_value(place):
    with pytest.raises(RecipeError, match="clip_grad_norm"):
        Training(Brought(clip_grad_value=1.0), Compute())


def low(place):
    with pytest.raises(RecipeError, match="autocast"):
        Training(Brought(model=lambda: torch.nn.Linear(6, 3).bfloat16()), Compute())


ROWS = {
    "SGD, Adam, AdamW": optimizers,
    "clipping by the global norm": clipping,
    "gradient accumulation": accumulation,
    "a number of steps instead of epochs": steps,
    "weighted, repeated, partial or ordered sampling": sampling,
    "losses that are means over tokens": tokens,
    "mixed precision": autocast,
    "parameters used late, or not in every step": late,
    "weights to start from, or a model trained elsewhere": given_weights,
    "a training loop of your own": own_loop,
    "a `transformers.Trainer`": trainer,
    "a `lightning.Trainer`": lightning_trainer,
    "attention, recurrent nets, GPT-2, BERT, Llama, LoRA, …": layers,
    "optimizers or options without a rule (Adafactor, Lion, 8-bit, `amsgrad`, …)": no_rule,
    "clipping by value": by_value,
    "weights in bfloat16 or float16": low,
}


def test_the_table_has_these_rows():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text[text.index(HEADING) :].split("\n\n")[1].splitlines()
    assert [row.split(" | ")[0].removeprefix("| ") for row in table[2:]] == list(ROWS)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_true(row, tmp_path):
    ROWS[row](tmp_path)
