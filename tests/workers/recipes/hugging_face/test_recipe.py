"""A Trainer's training as a recipe: the same steps as the Trainer's, and contributions held against autograd."""

from __future__ import annotations

import math
from types import SimpleNamespace

import cloudpickle
import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("datasets")

from hydra_pipe.storage.errors import RecipeError
from hydra_pipe.workers.determinism import restored_process
from hydra_pipe.workers.training.training import Compute, Training
from torch import nn
from torch.func import functional_call
from transformers import DataCollatorForLanguageModeling, Trainer

from hydra_pipe import RunSpec, TrainerRecipe, run
from tests import tiny_text


def recipe_of(folder, *, model=tiny_text.gpt2, count=22, labelled=False, collator=tiny_text.padded, **given):
    return TrainerRecipe(
        args=tiny_text.arguments(folder, **given),
        model_init=model,
        train_dataset=tiny_text.sequences(count, 1, labelled=labelled),
        eval_dataset=tiny_text.sequences(5, 2, labelled=labelled),
        data_collator=collator,
    )


def trainer_of(recipe, folder, *, model=tiny_text.gpt2, **given):
    return Trainer(
        model_init=model,
        args=tiny_text.arguments(folder, **given),
        train_dataset=recipe.train_dataset(),
        eval_dataset=recipe.test_dataset(),
        data_collator=tiny_text.padded,
    )


def trained(recipe):
    """Train as the record does; return the training."""
    with restored_process():
        training = Training(recipe, Compute())
        scheduler = recipe.scheduler(training.optimizer)
        for step, batch in enumerate(training.loader()):
            training.step(step, batch)
            if training.updates[step]:
                scheduler.step()
    return training


def apart(training, trainer):
    """How far weights are apart, but for those without a gradient: AdamW makes steps of their rounding."""
    ours = dict(training.model.named_parameters())
    far = 0.0
    for name, theirs in trainer.model.named_parameters():
        off = (theirs - ours[name]).detach().abs()
        if name.endswith("c_attn.bias"):  # a key's bias moves no attention
            off = off.view(3, -1)[[0, 2]]
        if name.endswith(("key.bias", "k_proj.bias")):
            continue
        far = max(far, float(off.max()))
    return far


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"max_steps": 4, "optim": "sgd", "optim_args": "momentum=0.9", "dataloader_drop_last": True},
        {"num_train_epochs": 1.5, "train_sampling_strategy": "sequential", "optim": "adamw_torch"},
        {"data_seed": 5, "lr_scheduler_type": "cosine", "bf16": True},
    ],
    ids=["usual", "sgd", "sequential", "bf16"],
)
def test_the_weights_are_those_of_the_trainer(tmp_path, given):
    recipe = recipe_of(tmp_path, **given)
    training = trained(recipe)
    trainer = trainer_of(recipe, tmp_path, **given)
    trainer.train()
    assert int(training.updates.sum()) == trainer.state.global_step
    assert apart(training, trainer) < (2e-3 if given.get("bf16") else 2e-5)
    start = torch.cat([p.detach().flatten() for p in tiny_text.gpt2().parameters()])
    assert len(start) == training.layout.dimension
    if not given:
        factors = training.clips[:, 1]
        assert (factors < 1).any()
        assert (factors == 1).any()


@pytest.mark.parametrize(
    "model", [tiny_text.gpt2_classifier, tiny_text.llama_classifier], ids=["gpt2", "llama"]
)
def test_classifications_are_those_of_the_trainer(tmp_path, model):
    """Their losses do not use num_items_in_batch, and the Trainer adds the means of its batches up."""
    recipe = recipe_of(tmp_path, model=model, count=16, labelled=True)
    training = trained(recipe)
    assert recipe._known.counts == "sum"
    trainer = trainer_of(recipe, tmp_path, model=model)
    trainer.train()
    assert apart(training, trainer) < 2e-5


def test_images_without_a_collator_are_those_of_the_trainer(tmp_path):
    """A list of items, and a loss that uses num_items_in_batch: uneven steps are right."""
    given = {
        "args": tiny_text.arguments(tmp_path),
        "model_init": tiny_text.vit_classifier,
        "train_dataset": tiny_text.images(21, 1),
        "eval_dataset": tiny_text.images(4, 2),
    }
    recipe = TrainerRecipe(**given)
    training = trained(recipe)
    assert recipe._known.counts == "items"
    assert list(recipe.labels(given["train_dataset"])) == [k % tiny_text.CLASSES for k in range(21)]
    trainer = Trainer(**given)
    trainer.train()
    assert apart(training, trainer) < 2e-5


def test_batches_that_a_model_adds_up_unevenly_are_refused(tmp_path):
    recipe = recipe_of(tmp_path, model=tiny_text.gpt2_classifier, count=21, labelled=True)
    with pytest.raises(RecipeError, match="21 samples in batches of 4 do not go up into equal steps"):
        recipe.order(0, torch.Generator())


def adamw_contributions(recipe):
    """C(i, j) by autograd through the whole training, written out: weights of samples, clipping, AdamW."""
    with restored_process():
        training = Training(recipe, Compute(dtype="float64"))
        scheduler = recipe.scheduler(training.optimizer)
        model, n_train = training.model, training.n_train
        held = {name: p for name, p in model.named_parameters() if p.requires_grad}
        rest = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        groups = {id(p): group for group in training.optimizer.param_groups for p in group["params"]}
        epsilon = torch.zeros(n_train, dtype=torch.float64, requires_grad=True)
        w = {name: p.detach().clone().requires_grad_() for name, p in held.items()}
        m = {name: torch.zeros_like(p) for name, p in w.items()}
        v = {name: torch.zeros_like(p) for name, p in w.items()}

        class Stand(nn.Module):
            def __init__(self, values):
                super().__init__()
                self.values = values

            def forward(self, **inputs):
                return functional_call(model, {**rest, **self.values}, kwargs=inputs)

        loss, count = torch.zeros((), dtype=torch.float64), 0
        for step, batch in enumerate(training.loader()):
            row = torch.as_tensor(training.batches[step])
            factor = 1 + n_train * epsilon[row[row >= 0].long()]
            loss = loss + (factor * recipe.losses(Stand(w), batch)).sum() / training.divisor(step)
            if not training.updates[step]:
                continue
            count += 1
            grads = dict(zip(w, torch.autograd.grad(loss, list(w.values()), create_graph=True), strict=True))
            norm = torch.sqrt(sum((g**2).sum() for g in grads.values()))
            limit = recipe.clip_grad_norm
            scale = limit / (norm + 1e-6) if norm.item() + 1e-6 > limit else 1.0
            new = {}
            for name, before in w.items():
                group = groups[id(held[name])]
                (b1, b2), rate = group["betas"], group["lr"]
                g = grads[name] * scale
                m[name] = b1 * m[name] + (1 - b1) * g
                v[name] = b2 * v[name] + (1 - b2) * g**2
                seen = v[name] > 0
                root = torch.where(seen, torch.where(seen, v[name], 1.0).sqrt(), 0.0)
                down = root / math.sqrt(1 - b2**count) + group["eps"]
                new[name] = (
                    before * (1 - rate * group["weight_decay"]) - rate / (1 - b1**count) * m[name] / down
                )
            w, loss = new, torch.zeros((), dtype=torch.float64)
            scheduler.step()
        model.eval()
        tests = recipe.test_dataset()
        losses = recipe.losses(Stand(w), recipe.collate([tests[k] for k in range(len(tests))]))
        rows = [torch.autograd.grad(one, epsilon, retain_graph=True)[0] for one in losses]
    return -torch.stack(rows, 1).numpy() / n_train


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    """An exact run forwards, one backwards, and what autograd through the training says."""
    folder = tmp_path_factory.mktemp("causal")
    recipe = recipe_of(folder, count=10, num_train_epochs=2, warmup_steps=1, max_grad_norm=0.9)
    spec = {"recipe": recipe, "dtype": "float64", "executor": "serial", "shards": 1, "hessian": "exact"}
    done = run(RunSpec(out=str(folder / "forward"), **spec))
    backward = run(RunSpec(out=str(folder / "adjoint"), mode="adjoint", **spec))
    return done, backward, adamw_contributions(recipe)


def table(done, shape):
    rows = done.contributions().to_table()
    found = np.full(shape, np.nan)
    found[rows["train_index"].to_numpy(), rows["test_index"].to_numpy()] = rows["contribution"].to_numpy()
    return found


def test_contributions_are_those_of_autograd_through_the_training(causal):
    done, backward, truth = causal
    joined = -(done.hypergradients("hydra-exact")[:] @ done.test_gradients().read(0, 5).T) / 10
    assert np.abs(joined - truth).max() <= 1e-9 * np.abs(truth).max()
    for one in (done, backward):  # stored in float32
        assert np.abs(table(one, truth.shape) - truth).max() <= 1e-6 * np.abs(truth).max()
    clips = done.trajectory().clip_factor
    assert (clips < 1).any()


def test_a_sequence_is_shown_as_text(tmp_path):
    recipe = recipe_of(tmp_path)
    item = recipe.train_dataset()[3]
    assert recipe.show(item) == " ".join(map(str, item["input_ids"]))
    padded = {**item, "attention_mask": [1] * 2 + [0] * (len(item["input_ids"]) - 2)}
    assert recipe.show(padded) == " ".join(map(str, item["input_ids"][:2]))
    recipe._tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: f"{len(ids)} words")
    assert recipe.show(item) == f"{len(item['input_ids'])} words"


def test_a_recipe_travels(tmp_path):
    recipe = recipe_of(tmp_path)
    other = cloudpickle.loads(cloudpickle.dumps(recipe))
    batch = other.collate([other.train_dataset()[k] for k in (3, 1)])
    torch.manual_seed(0)
    model = other.model().eval()
    one = recipe.losses(model, batch)
    assert torch.equal(one, other.losses(model, batch))
    assert other.arguments() == recipe.arguments()
    both = model(**batch).loss * (batch["labels"][:, 1:] != -100).sum()
    torch.testing.assert_close(one.sum(), both)


def test_targets_are_drawn_where_tokens_count(tmp_path):
    recipe = recipe_of(tmp_path)
    batch = recipe.collate([recipe.train_dataset()[k] for k in range(6)])
    torch.manual_seed(0)
    drawn = recipe.sample_targets(recipe.model(), batch)
    assert torch.equal(drawn["labels"] == -100, batch["labels"] == -100)
    assert torch.equal(drawn["labels"][:, 0], batch["labels"][:, 0])
    assert not torch.equal(drawn["labels"], batch["labels"])
    assert drawn["input_ids"] is batch["input_ids"]


def test_classes_are_labels_and_predictions(tmp_path):
    recipe = recipe_of(tmp_path, model=tiny_text.llama_classifier, count=16, labelled=True)
    data = recipe.train_dataset()
    assert list(recipe.labels(data)) == list(data["label"])
    batch = recipe.collate([data[0], data[1]])
    model = recipe.model().eval()
    assert torch.equal(recipe.predictions(model, batch), model(**batch).logits.argmax(1))
    assert recipe_of(tmp_path).labels(tiny_text.sequences(4, 1)) is None


def test_masked_tokens_are_not_shifted(tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    config = tiny_text.bert_classifier().config.to_dict()

    def masked(items):
        found = tiny_text.padded(items)
        found["labels"][:, ::2] = -100
        return found

    recipe = recipe_of(
        tmp_path,
        model=lambda: BertForMaskedLM(BertConfig(**config)),
        collator=masked,
        gradient_accumulation_steps=1,
    )
    batch = recipe.collate([recipe.train_dataset()[k] for k in range(4)])
    model = recipe.model().eval()
    own = model(**batch).loss * (batch["labels"] != -100).sum()
    torch.testing.assert_close(recipe.losses(model, batch).sum(), own)


def test_a_loss_without_a_form_is_refused(tmp_path):
    class Odd(tiny_text.GPT2LMHeadModel):
        def forward(self, input_ids, attention_mask, labels=None, **kwargs):
            found = super().forward(input_ids, attention_mask=attention_mask, labels=labels, **kwargs)
            found["loss"] = found["loss"] * 1.5
            return found

    recipe = recipe_of(tmp_path, model=lambda: Odd(tiny_text.gpt2().config))
    with pytest.raises(RecipeError, match=r"Odd has a loss of .* write a Recipe with losses"):
        recipe.model()
    headless = recipe_of(tmp_path, model=lambda: tiny_text.gpt2().transformer)
    with pytest.raises(RecipeError, match="GPT2Model"):
        headless.model()
    bare = recipe_of(tmp_path, collator=lambda items: [1, 2])
    with pytest.raises(RecipeError, match="the data collator returned list"):
        bare.model()


def test_low_precision_weights_are_refused(tmp_path):
    recipe = recipe_of(tmp_path, model=lambda: tiny_text.gpt2().to(torch.bfloat16))
    with pytest.raises(RecipeError, match=r"'transformer\.wte\.weight' is bfloat16"):
        recipe.model()


def test_what_a_trainer_decides_itself_is_refused(tmp_path):
    recipe = recipe_of(tmp_path)

    class Own(Trainer):
        def compute_loss(self, *args, **kwargs):
            return super().compute_loss(*args, **kwargs)

    def of(kind, **given):
        return TrainerRecipe.of(
            kind(
                model=tiny_text.gpt2(),
                args=tiny_text.arguments(tmp_path),
                train_dataset=recipe.train_dataset(),
                eval_dataset=recipe.test_dataset(),
                data_collator=tiny_text.padded,
                **given,
            )
        )

    assert of(Trainer).arguments() == recipe.arguments()
    with pytest.raises(RecipeError, match=r"Own has compute_loss\(\) of its own"):
        of(Own)
    with pytest.raises(RecipeError, match="compute_loss_func"):
        of(Trainer, compute_loss_func=lambda *args, **kwargs: None)
    with pytest.raises(RecipeError, match="given an optimizer"):
        of(Trainer, optimizer_cls_and_kwargs=(torch.optim.SGD, {"lr": 0.1}))


def test_model_and_test_samples_must_be_given(tmp_path):
    given = {"args": tiny_text.arguments(tmp_path), "train_dataset": tiny_text.sequences(4, 1)}
    with pytest.raises(RecipeError, match="model or model_init"):
        TrainerRecipe(**given, eval_dataset=tiny_text.sequences(4, 2))
    with pytest.raises(RecipeError, match="eval_dataset must be one dataset"):
        TrainerRecipe(**given, eval_dataset=None, model=tiny_text.gpt2())


def test_adapters_alone_are_trained(tmp_path):
    peft = pytest.importorskip("peft")

    def lora():
        config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, lora_dropout=0.0)
        return peft.get_peft_model(tiny_text.gpt2(), config)

    recipe = recipe_of(tmp_path, model=lora, count=10, num_train_epochs=1, max_grad_norm=0.05)
    training = trained(recipe)
    assert training.layout.dimension == 2 * (2 * 16 + 2 * 48)
    trainer = trainer_of(recipe, tmp_path, model=lora, num_train_epochs=1, max_grad_norm=0.05)
    trainer.train()
    assert apart(training, trainer) < 2e-5
    truth = adamw_contributions(recipe)
    spec = {"recipe": recipe, "dtype": "float64", "executor": "serial", "shards": 1, "hessian": "exact"}
    done = run(RunSpec(out=str(tmp_path / "run"), mode="adjoint", **spec))
    assert np.abs(table(done, truth.shape) - truth).max() <= 1e-6 * np.abs(truth).max()


def test_the_usual_collator_of_language_models_is_taken(tmp_path):
    class Tokenizer:
        pad_token_id, pad_token, padding_side = 0, "<pad>", "right"
        mask_token = None

        def pad(self, items, **_given):
            found = tiny_text.padded(items)
            return {"input_ids": found["input_ids"], "attention_mask": found["attention_mask"]}

    collator = DataCollatorForLanguageModeling.__new__(DataCollatorForLanguageModeling)
    collator.tokenizer, collator.mlm, collator.pad_to_multiple_of, collator.return_tensors = (
        Tokenizer(),
        False,
        None,
        "pt",
    )
    recipe = recipe_of(tmp_path, collator=collator.torch_call)
    batch = recipe.collate([recipe.train_dataset()[0], recipe.train_dataset()[1]])
    assert set(batch) >= {"input_ids", "labels"}
