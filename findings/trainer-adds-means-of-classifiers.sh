#!/usr/bin/env bash
# transformers 5.24.0: under gradient accumulation, the Trainer's gradient of a sequence classifier is K times too large.
#
# A model whose forward takes **kwargs is taken to divide its loss by num_items_in_batch, so the Trainer does not divide by
# gradient_accumulation_steps. BERT, GPT-2 and other classifiers take **kwargs and ignore it: their loss is the mean of a batch, and the
# means of K batches are added. The same 8 sequences give K times the gradient in K batches that they give in one: SGD
# takes K times the step, max_grad_norm=1.0 clips at a K-th, and the logged loss is K times as large. GPT2LMHeadModel divides, and is right.
#
# Seen on 28 November 2026:   norm of the gradient of 8 sequences in 1 batch and in 4:
#   BertForSequenceClassification 0.124, 0.495; GPT2ForSequenceClassification 1.411, 5.642; GPT2LMHeadModel 0.968, 0.968
# Reported as github.com/huggingface/transformers/issues/47688.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/env"
"$place/env/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0
"$place/env/bin/python" - <<'PY'
import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    Trainer,
    TrainingArguments,
)

shape = {"vocab_size": 20, "pad_token_id": 0, "num_labels": 3}
still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
gpt2 = GPT2Config(**shape, **still, n_positions=8, n_embd=16, n_layer=1, n_head=2)
still = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 8}
bert = BertConfig(**shape, **still, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24)
tokens = torch.randint(1, 20, (8, 5), generator=torch.Generator().manual_seed(1))
classes = [{"input_ids": t, "labels": int(t.sum()) % 3} for t in tokens]
texts = [{"input_ids": t, "labels": t} for t in tokens]


def norm(kind, config, rows, batches):
    """Return the norm of the gradient of one step of all 8 rows, which the Trainer would clip."""
    torch.manual_seed(0)
    seen = []
    with tempfile.TemporaryDirectory() as place:
        args = TrainingArguments(
            output_dir=place, per_device_train_batch_size=8 // batches, gradient_accumulation_steps=batches, max_steps=1,
            max_grad_norm=1e9, report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, use_cpu=True,
        )
        trainer = Trainer(model=kind(config), args=args, train_dataset=rows)
        clip = trainer._clip_grad_norm
        trainer._clip_grad_norm = lambda model: seen.append(clip(model)) or seen[0]
        trainer.train()
    return float(seen[0])


ratios = {}
for kind, config, rows in ((BertForSequenceClassification, bert, classes), (GPT2ForSequenceClassification, gpt2, classes),
                           (GPT2LMHeadModel, gpt2, texts)):
    one, four = norm(kind, config, rows, 1), norm(kind, config, rows, 4)
    print(f"{kind.__name__}: in 1 batch {one:.3f}, in 4 {four:.3f}")
    ratios[kind.__name__] = four / one
assert abs(ratios["GPT2LMHeadModel"] - 1) < 1e-3, "the behaviour has changed"
assert all(abs(ratios[f"{name}ForSequenceClassification"] - 4) < 1e-3 for name in ("Bert", "GPT2")), "the behaviour has changed"
PY
