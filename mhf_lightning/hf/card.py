"""The model card of an exported run: what it is, its figures as the run wrote them down, how to load it."""

from __future__ import annotations

from mhf_lightning.checkpoint.trained import Trained, Vocabulary
from mhf_lightning.runs import HISTORY, read_history

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- mhf-lightning
- {ffn}
---

# A language model with {ffn} feed-forward layers

Trained with mhf-lightning (feed-forward layers after arXiv 2512.06989), exported from `{checkpoint}`.

| | |
|---|---|
{figures}

## Use

The architecture is in the package mhf-lightning, not in this folder: `trust_remote_code` is not needed.

```python
import mhf_lightning.hf  # registers the model; pip install 'mhf-lightning[hf]'
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)
inputs = tokenizer(["Once upon a time"], return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=64), skip_special_tokens=True))
```

It continues text. It was not tuned to follow instructions, and says what texts like its training data might say.
"""


def model_card(trained: Trained, vocabulary: Vocabulary, dtype: str) -> str:
    """Return the Markdown text; a figure that the run did not write down is given as not recorded."""
    figures = {**_architecture(trained, vocabulary, dtype), **_training(trained)}
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    return _CARD.format(ffn=trained.config.ffn.name, checkpoint=trained.checkpoint.name, figures=rows)


def _architecture(trained: Trained, vocabulary: Vocabulary, dtype: str) -> dict[str, str]:
    config = trained.config
    # A tied head stands among the weights, but is the embedding.
    weights = {name: w for name, w in trained.weights.items() if name != "head.weight" or not config.tie_embeddings}
    total = sum(weight.numel() for weight in weights.values())
    outside = sum(weight.numel() for name, weight in weights.items() if name in ("embedding.weight", "head.weight"))
    options = {key: value for key, value in config.to_dict()["ffn"].items() if value is not None and key != "name"}
    saved = str(next(iter(weights.values())).dtype).removeprefix("torch.")
    return {
        "feed-forward layer": f"{config.ffn.name}, {', '.join(f'{key} {value}' for key, value in options.items())}",
        "size": f"{config.num_layers} layers, d_model {config.d_model}, {config.num_attention_heads} attention heads",
        "parameters": f"{total:,} ({total - outside:,} without embeddings)",
        "weights": saved if dtype == "saved" else f"{dtype}, rounded from {saved}",
        "context in training": f"{vocabulary.context_length:,} tokens",
        "vocabulary": f"{config.vocab_size:,}",
    }


def _training(trained: Trained) -> dict[str, str]:
    events, _ = read_history(trained.run_dir / HISTORY) if trained.run_dir is not None else ([], None)
    starts = [event for event in events if event["event"] == "start"]
    # Of this checkpoint's past, the last: a run that went on may have more.
    before = [event for event in events if event.get("step", 0) <= trained.step]
    losses = [event for event in before if event["event"] == "validation" and event["loss"] is not None]
    speeds = [event for event in before if event["event"] == "progress" and event["tokens_per_s"] is not None]
    of = f" of {starts[-1]['max_steps']:,}" if starts else ""
    figures = {
        "optimiser steps": f"{trained.step:,}{of}",
        "tokens seen": "not recorded" if trained.tokens_seen is None else f"{trained.tokens_seen:,}",
        "validation": "not recorded",
        "training speed": "not recorded",
    }
    if losses:
        last = losses[-1]
        perplexity = "not finite" if last["perplexity"] is None else f"{last['perplexity']:,.2f}"
        figures["validation"] = (
            f"loss {last['loss']:.4f} nats per token, perplexity {perplexity}, at step {last['step']:,}"
        )
    if speeds:
        figures["training speed"] = f"{speeds[-1]['tokens_per_s']:,.0f} tokens/s"
    return figures
