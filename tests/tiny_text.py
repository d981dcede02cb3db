"""Tiny models of transformers, built from configurations, and sequences to train them on. Nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

WORDS = 20
CLASSES = 3
SHAPE: dict[str, Any] = {
    "vocab_size": WORDS,
    "n_positions": 12,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "attn_implementation": "eager",
}


def sequences(count: int, seed: int, *, labelled: bool = False) -> datasets.Dataset:
    """Sequences of 3 to 7 tokens, of several lengths, with a column that no model takes; a class each where ``labelled``."""
    generator = torch.Generator().manual_seed(seed)
    rows: dict[str, list[Any]] = {"input_ids": [], "source": []}
    if labelled:
        rows["label"] = []
    for k in range(count):
        length = int(torch.randint(3, 8, (1,), generator=generator))
        tokens = torch.randint(1, WORDS, (length,), generator=generator)
        rows["input_ids"].append(tokens.tolist())
        rows["source"].append(f"row {k}")
        if labelled:
            rows["label"].append(int(tokens.sum()) % CLASSES)
    return datasets.Dataset.from_dict(rows)


def padded(items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Collate: pad, with -100 where there is no token; a class a sequence where items have one."""
    longest = max(len(item["input_ids"]) for item in items)
    ids = torch.zeros(len(items), longest, dtype=torch.long)
    labels = torch.full((len(items), longest), -100)
    mask = torch.zeros(len(items), longest, dtype=torch.long)
    for row, item in enumerate(items):
        assert "source" not in item
        length = len(item["input_ids"])
        ids[row, :length] = torch.tensor(item["input_ids"])
        mask[row, :length] = 1
        labels[row, :length] = ids[row, :length]
    if "label" in items[0]:
        labels = torch.tensor([item["label"] for item in items])
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


DROPS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(**SHAPE, **dict.fromkeys(DROPS, 0.0)))


def gpt2_dropout() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(**SHAPE, **dict.fromkeys(DROPS, 0.2)))


def gpt2_classifier() -> GPT2ForSequenceClassification:
    return GPT2ForSequenceClassification(GPT2Config(**SHAPE, **dict.fromkeys(DROPS, 0.0), num_labels=CLASSES))


def bert_classifier() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        num_labels=CLASSES,
        attn_implementation="eager",
    )
    return BertForSequenceClassification(config)


def llama_classifier() -> LlamaForSequenceClassification:
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=12,
        num_labels=CLASSES,
        pad_token_id=0,
        attn_implementation="eager",
    )
    return LlamaForSequenceClassification(config)


def vit_classifier() -> ViTForImageClassification:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        image_size=4,
        patch_size=2,
        num_channels=1,
        num_labels=CLASSES,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="eager",
    )
    return ViTForImageClassification(config)


def images(count: int, seed: int) -> list[dict[str, Any]]:
    """Images of 4 x 4 with a class each, as a plain list: the Trainer's own collator joins them."""
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "pixel_values": torch.randn(1, 4, 4, generator=generator),
            "label": k % CLASSES,
            "source": f"row {k}",
        }
        for k in range(count)
    ]


def arguments(folder: Path | str, **given: Any) -> TrainingArguments:
    """AdamW with decay, warm-up, clipping that bites in some steps, two batches a step."""
    usual: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "num_train_epochs": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "max_grad_norm": 0.8,
        "gradient_accumulation_steps": 2,
    }
    quiet = {"report_to": "none", "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    return TrainingArguments(output_dir=str(folder), use_cpu=True, **{**quiet, **usual, **given})
