"""Layers that people have, each in a training of a few steps: attention, transformers, recurrent nets, wrappers.

``CASES`` holds one recipe a way of calling a layer. Models of ``transformers`` are built from tiny configurations; the
library is imported where one is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from hydra_pipe.workers.recipe import Recipe
from torch import nn
from torch.nn.utils import parametrizations, rnn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import Dataset, TensorDataset

from tests.recipes import gaussian

WIDTH, LENGTH, WORDS = 8, 5, 13


class LayerRecipe(Recipe):
    """One pass over ten samples, the last batch smaller; SGD with momentum and decay."""

    epochs, batch_size, seed = 1, 4, 3
    count = 10

    def __init__(self, case: str) -> None:
        self.case = case

    def arguments(self) -> dict[str, Any]:
        return {"case": self.case}

    def model(self) -> nn.Module:
        return CASES[self.case][1]()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)

    def train_dataset(self) -> Dataset[Any]:
        return self.data(self.count, 1)

    def test_dataset(self) -> Dataset[Any]:
        return self.data(4, 2)

    def data(self, count: int, seed: int) -> Dataset[Any]:
        raise NotImplementedError


class Vectors(LayerRecipe):
    """Sequences of vectors, (B, LENGTH, WIDTH), three classes."""

    shape: tuple[int, ...] = (LENGTH, WIDTH)

    def data(self, count, seed):
        return gaussian(count, self.shape, 3, seed)

    def losses(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Halved(Vectors):
    """The loss in float32 whatever the model computes in, as with mixed precision."""

    def losses(self, model, batch):
        return F.cross_entropy(model(batch[0]).float(), batch[1], reduction="none")


class Pictures(Vectors):
    shape = (3, 6, 6)


class Channels(Pictures):
    """Inputs and model in channels_last."""

    def losses(self, model, batch):
        inputs = batch[0].to(memory_format=torch.channels_last)
        return F.cross_entropy(model(inputs), batch[1], reduction="none")


class Tokens(LayerRecipe):
    """Token sequences with a class."""

    def data(self, count, seed):
        tokens = torch.randint(1, WORDS, (count, LENGTH), generator=torch.Generator().manual_seed(seed))
        return TensorDataset(tokens, tokens.sum(1) % 3)

    def losses(self, model, batch):
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


class Language(LayerRecipe):
    """Next tokens; a mapping with a padding mask."""

    masked = True

    def data(self, count, seed):
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(1, WORDS, (count, LENGTH), generator=generator)
        length = torch.randint(3, LENGTH + 1, (count, 1), generator=generator)
        mask = (torch.arange(LENGTH) < length).long()
        return Mapped({"input_ids": tokens * mask, "attention_mask": mask})

    def losses(self, model, batch):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = model(input_ids=ids, **({"attention_mask": mask} if self.masked else {})).logits
        each = F.cross_entropy(logits[:, :-1].transpose(1, 2), ids[:, 1:], reduction="none")
        weight = mask[:, 1:]
        return (each * weight).sum(1) / weight.sum(1)


class Unmasked(Language):
    masked = False


class Classified(Language):
    """A class per sequence."""

    def losses(self, model, batch):
        ids, mask = batch["input_ids"], batch["attention_mask"]
        logits = model(input_ids=ids, attention_mask=mask).logits
        return F.cross_entropy(logits, ids.sum(1) % 3, reduction="none")


class Mapped(Dataset[Any]):
    """A dataset of mappings, as ``datasets`` gives them."""

    def __init__(self, columns: dict[str, torch.Tensor]) -> None:
        self.columns = columns

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {name: values[index] for name, values in self.columns.items()}


# ---------------------------------------------------------------------- models


class Headed(nn.Module):
    """A body over (B, L, WIDTH), averaged and read out."""

    def __init__(self, body: nn.Module, *, seq_first: bool = False, out: int = WIDTH) -> None:
        super().__init__()
        self.body, self.head, self.seq_first = body, nn.Linear(out, 3), seq_first

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.seq_first:
            return self.head(self.body(x.transpose(0, 1)).mean(0))
        return self.head(self.body(x).mean(1))


class FusedAttention(nn.Module):
    """Attention by ``F.scaled_dot_product_attention``."""

    def __init__(self, drop: float = 0.0) -> None:
        super().__init__()
        self.qkv, self.out, self.drop = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), drop

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, WIDTH // 2)).permute(2, 0, 3, 1, 4)
        drop = self.drop if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=drop)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Multihead(nn.Module):
    def __init__(
        self, *, weights: bool, batch_first: bool = True, drop: float = 0.0, kdim: int | None = None
    ):
        super().__init__()
        self.attention = nn.MultiheadAttention(
            WIDTH, 2, dropout=drop, batch_first=batch_first, kdim=kdim, vdim=kdim
        )
        self.weights, self.kdim = weights, kdim

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        other = x if self.kdim is None else x[..., : self.kdim]
        return x + self.attention(x, other, other, need_weights=self.weights)[0]


class Rolled(nn.Module):
    """A recurrent layer, its outputs alone."""

    def __init__(self, kind: type[nn.RNNBase], **options: Any) -> None:
        super().__init__()
        self.layer = kind(WIDTH, 4, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


class Packed(Rolled):
    """An LSTM over sequences of different lengths."""

    def __init__(self) -> None:
        super().__init__(nn.LSTM, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        length = 1 + (7 * x[:, 0, 0]).abs().long() % LENGTH
        packed = rnn.pack_padded_sequence(x, length, batch_first=True, enforce_sorted=False)
        return rnn.pad_packed_sequence(self.layer(packed)[0], batch_first=True, total_length=LENGTH)[0]


class Decoder(nn.Module):
    """Attention to itself and, across, to something else."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(WIDTH, 2, 12, dropout=0.0, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x, x[:, :3] * 0.5)


class Bag(nn.Module):
    def __init__(self, mode: str, **options: Any) -> None:
        super().__init__()
        self.bag, self.out = nn.EmbeddingBag(WORDS, WIDTH, mode=mode, **options), nn.Linear(WIDTH, 3)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.out(self.bag(tokens))


class PlainBag(Bag):
    """The same without its kernel; for the oracle."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = self.bag.weight[tokens]
        mode = self.bag.mode
        return self.out(rows.sum(1) if mode == "sum" else rows.mean(1) if mode == "mean" else rows.amax(1))


class Checkpointed(nn.Module):
    """Blocks whose activations are computed again in the backward pass."""

    def __init__(self, *, reentrant: bool | None, drop: float = 0.0, attention: bool = False) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.block = nn.Sequential(
            nn.Linear(WIDTH, WIDTH),
            FusedAttention() if attention else nn.GELU(),
            nn.Dropout(drop),
            nn.Linear(WIDTH, WIDTH),
        )
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        if self.reentrant is None:  # for the oracle
            return x + self.block(x)
        return x + checkpoint(self.block, x, use_reentrant=self.reentrant)


def encoder(*, batch_first: bool, drop: float = 0.0, norm_first: bool = False) -> nn.Module:
    layer = nn.TransformerEncoderLayer(
        WIDTH, 2, 12, dropout=drop, batch_first=batch_first, norm_first=norm_first, activation="gelu"
    )
    return Headed(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), seq_first=not batch_first)


def pictures(norm: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.GroupNorm(2, 4) if norm is None else norm,
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, stride=2),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


def wrapped(wrap: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return Headed(nn.Sequential(wrap(nn.Linear(WIDTH, WIDTH)), nn.Tanh()))


def gpt2(drop: float = 0.0, attention: str = "eager") -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=WORDS,
        n_positions=8,
        n_embd=WIDTH,
        n_layer=1,
        n_head=2,
        resid_pdrop=drop,
        embd_pdrop=drop,
        attn_pdrop=drop,
        attn_implementation=attention,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def bert(drop: float = 0.0, attention: str = "eager") -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=8,
        hidden_dropout_prob=drop,
        attention_probs_dropout_prob=drop,
        num_labels=3,
        attn_implementation=attention,
    )
    return BertForSequenceClassification(config)


def llama(attention: str = "eager", *, tied: bool = False) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=8,
        attn_implementation=attention,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


CASES: dict[str, tuple[type[LayerRecipe], Callable[[], nn.Module]]] = {
    "scaled_dot_product_attention": (Vectors, lambda: Headed(FusedAttention())),
    "scaled_dot_product_attention, dropout": (Vectors, lambda: Headed(FusedAttention(0.2))),
    "MultiheadAttention": (Vectors, lambda: Headed(Multihead(weights=False))),
    "MultiheadAttention, need_weights": (Vectors, lambda: Headed(Multihead(weights=True))),
    "MultiheadAttention, dropout": (Vectors, lambda: Headed(Multihead(weights=False, drop=0.2))),
    "MultiheadAttention, kdim and vdim": (Vectors, lambda: Headed(Multihead(weights=False, kdim=6))),
    "MultiheadAttention, seq-first": (
        Vectors,
        lambda: Headed(Multihead(weights=False, batch_first=False), seq_first=True),
    ),
    "TransformerEncoderLayer": (Vectors, lambda: encoder(batch_first=True)),
    "TransformerEncoderLayer, norm first, dropout": (
        Vectors,
        lambda: encoder(batch_first=True, drop=0.1, norm_first=True),
    ),
    "TransformerEncoderLayer, seq-first": (Vectors, lambda: encoder(batch_first=False)),
    "TransformerEncoderLayer, seq-first, dropout": (Vectors, lambda: encoder(batch_first=False, drop=0.1)),
    "TransformerDecoderLayer": (Vectors, lambda: Headed(Decoder())),
    "GPT-2": (Unmasked, gpt2),
    "GPT-2, mask": (Language, gpt2),
    "GPT-2, mask, dropout": (Language, lambda: gpt2(0.1)),
    "GPT-2, mask, sdpa": (Language, lambda: gpt2(attention="sdpa")),
    "BERT, mask": (Classified, bert),
    "BERT, mask, dropout": (Classified, lambda: bert(0.1)),
    "BERT, mask, sdpa": (Classified, lambda: bert(attention="sdpa")),
    "Llama": (Unmasked, llama),
    "Llama, mask": (Language, llama),
    "Llama, mask, sdpa, tied": (Language, lambda: llama("sdpa", tied=True)),
    "LSTM": (Vectors, lambda: Headed(Rolled(nn.LSTM, batch_first=True), out=4)),
    "LSTM, two layers both ways, dropout": (
        Vectors,
        lambda: Headed(
            Rolled(nn.LSTM, batch_first=True, bidirectional=True, num_layers=2, dropout=0.2), out=8
        ),
    ),
    "LSTM, seq-first": (Vectors, lambda: Headed(Rolled(nn.LSTM), seq_first=True, out=4)),
    "LSTM, packed": (Vectors, lambda: Headed(Packed(), out=4)),
    "GRU": (Vectors, lambda: Headed(Rolled(nn.GRU, batch_first=True), out=4)),
    "RNN": (Vectors, lambda: Headed(Rolled(nn.RNN, batch_first=True), out=4)),
    "EmbeddingBag, mean": (Tokens, lambda: Bag("mean")),
    "EmbeddingBag, sum": (Tokens, lambda: Bag("sum", padding_idx=0)),
    "EmbeddingBag, max": (Tokens, lambda: Bag("max")),
    "parametrizations.weight_norm": (Vectors, lambda: wrapped(parametrizations.weight_norm)),
    "torch.nn.utils.weight_norm": (Vectors, lambda: wrapped(torch.nn.utils.weight_norm)),
    "parametrizations.spectral_norm": (Vectors, lambda: wrapped(parametrizations.spectral_norm)),
    "parametrizations.orthogonal": (Vectors, lambda: wrapped(parametrizations.orthogonal)),
    "channels_last": (Channels, lambda: pictures().to(memory_format=torch.channels_last)),
    "torch.compile": (Vectors, lambda: torch.compile(Headed(nn.Linear(WIDTH, WIDTH)))),
    "torch.compile, a part": (
        Vectors,
        lambda: Headed(nn.Sequential(torch.compile(nn.Linear(WIDTH, WIDTH)), nn.Tanh())),
    ),
    "Module.compile": (Vectors, lambda: compiled_in_place(Headed(nn.Linear(WIDTH, WIDTH)))),
    "checkpoint": (Vectors, lambda: Headed(Checkpointed(reentrant=False))),
    "checkpoint, dropout": (Vectors, lambda: Headed(Checkpointed(reentrant=False, drop=0.2))),
    "checkpoint, attention": (Vectors, lambda: Headed(Checkpointed(reentrant=False, attention=True))),
    "checkpoint, use_reentrant=True": (Vectors, lambda: Headed(Checkpointed(reentrant=True))),
    ".float() in the loss": (Halved, lambda: Headed(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()))),
}


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile()
    return model


def _weight_norm_by_formula() -> nn.Module:
    """torch's own weight normalisation has a wrong double backward (findings/weight-norm-double-backward.sh)."""
    model = wrapped(parametrizations.weight_norm)
    kind = type(model.body[0].parametrizations.weight[0])

    class Formula(kind):
        def forward(self, g, v):
            return v * (g / torch.linalg.vector_norm(v, dim=1, keepdim=True))

    model.body[0].parametrizations.weight[0].__class__ = Formula
    return model


PLAIN: dict[str, Callable[[], nn.Module]] = {
    "checkpoint": lambda: Headed(Checkpointed(reentrant=None)),
    "checkpoint, dropout": lambda: Headed(Checkpointed(reentrant=None, drop=0.2)),
    "checkpoint, attention": lambda: Headed(Checkpointed(reentrant=None, attention=True)),
    "parametrizations.weight_norm": _weight_norm_by_formula,
    "EmbeddingBag, mean": lambda: PlainBag("mean"),
    "EmbeddingBag, sum": lambda: PlainBag("sum", padding_idx=0),
    "EmbeddingBag, max": lambda: PlainBag("max"),
}
"""The same models for autograd through the whole training, where torch cannot differentiate the layer twice."""


def plain_recipe_of(case: str) -> LayerRecipe:
    """Return the recipe of a case for the oracle: the same numbers from operations that have second derivatives."""
    recipe = recipe_of(case)
    if case in PLAIN:
        recipe.model = PLAIN[case]
    return recipe


def recipe_of(case: str) -> LayerRecipe:
    """Return the recipe of a case."""
    return CASES[case][0](case)
