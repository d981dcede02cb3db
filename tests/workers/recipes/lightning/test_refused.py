"""What a record of a Trainer cannot follow is refused by name, and the documentation's table of it."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("lightning")

from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.workers.recipes.lightning.refused import REFUSALS, refuse
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy

from hydra_pipe import LightningCallback
from tests.tiny_lightning import Net, loader, net, some, trainer

PAGE = Path(__file__).parents[4] / "docs" / "lightning.md"


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Iterates(Net):
    def training_step(self, dataloader_iter: Any) -> Any:
        return None


class Backward(Net):
    def backward(self, loss: Any) -> None:
        loss.backward()


class Clips(Net):
    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        torch.nn.utils.clip_grad_norm_(self.parameters(), 1.0)


class Augments(LightningDataModule):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return batch


def compiled() -> Net:
    module = Net()
    module._compiler_ctx = {"compiler": "dynamo"}
    return module


ASKED: dict[str, dict[str, Any]] = {
    "strategy": {"strategy": DDPStrategy()},
    "accelerator": {"strategy": SingleDeviceStrategy(torch.device("meta"))},
    "precision=16-mixed": {"precision": "16-mixed"},
    "precision": {"precision": "bf16-true"},
    "gradient_clip_algorithm": {"gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
    "reload_dataloaders_every_n_epochs": {"reload_dataloaders_every_n_epochs": 1},
    "callbacks": {"callbacks": [EMAWeightAveraging()]},
    "automatic_optimization": {"lightning_module": Manual()},
    "torch.compile": {"lightning_module": compiled()},
    "training_step": {"lightning_module": Iterates()},
    "backward": {"lightning_module": Backward()},
    "configure_gradient_clipping": {"lightning_module": Clips()},
    "batch transfer hooks": {"datamodule": Augments()},
}
PLAIN: dict[str, Any] = {
    "strategy": SingleDeviceStrategy(torch.device("cpu")),
    "world_size": 1,
    "precision": "32-true",
    "gradient_clip_val": 1.0,
    "gradient_clip_algorithm": None,
    "reload_dataloaders_every_n_epochs": 0,
    "callbacks": [],
    "lightning_module": net(),
    "datamodule": None,
}
"""What `refuse` looks at, as a Trainer has it; some of what is asked cannot be made on a machine without a GPU."""


def test_a_plain_trainer_is_followed():
    refuse(SimpleNamespace(**PLAIN))


@pytest.mark.parametrize("one", REFUSALS, ids=lambda one: one.name)
def test_it_is_refused_by_name(one):
    told = rf"^{re.escape(one.name)}: .+ is not supported: {re.escape(one.why)}; {re.escape(one.remedy)}$"
    with pytest.raises(RecipeError, match=told):
        refuse(SimpleNamespace(**{**PLAIN, **ASKED[one.name]}))


@pytest.mark.parametrize("name", ["automatic_optimization", "backward", "gradient_clip_algorithm"])
def test_a_trainer_is_refused_before_it_trains(name, tmp_path):
    given = dict(ASKED[name])
    module = given.pop("lightning_module", net())
    hydra = LightningCallback(losses=Net.losses, out=tmp_path / "run", test_dataset=some(3, 2))
    made = trainer(callbacks=[hydra], **given)
    with pytest.raises(RecipeError, match=f"^{name}: "):
        made.fit(module, loader())
    assert made.global_step == 0
    assert not (tmp_path / "run").exists()


def test_the_page_lists_them_all():
    text = PAGE.read_text(encoding="utf-8")
    for one in REFUSALS:
        assert f"| `{one.name}` | {one.why} | {one.remedy} |" in text, one.name
    rows = re.findall(r"^\| `([^`]+)` \|", text[text.index("## What is refused") :], re.MULTILINE)
    assert rows == [one.name for one in REFUSALS]
