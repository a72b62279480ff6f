"""Fine-tuning of MiniLM as a workload: pretrained and on real sentences where both are installed, else its shape."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from attn_callbacks.functional import head_statistics
from attn_callbacks.metrics import HeadStatisticsMetric
from examples.sentiment_data import Sentence, TokenisedSentences, collate, minilm, sentence_splits

__all__ = ["Classifier", "Workload", "fine_tuning", "random_fine_tuning"]

BATCH, TOKENS, FROZEN_LAYERS = 16, 32, 4

Rows = Any  # a sequence, or a data set, of dicts of tensors


class Classifier(pl.LightningModule):
    """A transformer with a classification head.

    Args:
        model: A Hugging Face model for sequence classification.
        by_returned_maps: Compute head statistics in ``validation_step`` from maps that the model returns.
    """

    def __init__(self, model: Any, by_returned_maps: bool = False) -> None:
        super().__init__()
        self.model = model
        self.metric = HeadStatisticsMetric(*_layers_and_heads(model)) if by_returned_maps else None

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Return the loss."""
        loss: Tensor = self.model(**_read(batch), labels=batch["labels"]).loss
        return loss

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Return logits."""
        output = self.model(**_read(batch), output_attentions=self.metric is not None)
        if self.metric is not None:
            valid = batch["attention_mask"].bool()
            for layer, weights in enumerate(output.attentions):
                self.metric.update(layer, head_statistics(weights, valid=valid, key_valid=valid), valid.sum(dim=-1))
        return {"logits": output.logits}

    def on_validation_epoch_end(self) -> None:
        """Log the mean over heads."""
        if self.metric is not None:
            self.log("entropy", self.metric.compute().mean[..., 0].mean())
            self.metric.reset()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW((weight for weight in self.parameters() if weight.requires_grad), lr=2e-4)


class Workload:
    """A model to begin with, and data.

    Args:
        name: What it is.
        build: Returns the model on an attention implementation.
        training: Rows to train on.
        validation: Rows to validate on.
    """

    def __init__(self, name: str, build: Callable[[str], Any], training: Rows, validation: Rows) -> None:
        self.name, self.training, self.validation = name, training, validation
        self._models = {attention: build(attention).train() for attention in ("sdpa", "eager")}
        self._models["eager"].load_state_dict(self._models["sdpa"].state_dict())

    def module(self, by_returned_maps: bool = False) -> Classifier:
        """Return a module that starts from the same weights each time."""
        return Classifier(copy.deepcopy(self._models["eager" if by_returned_maps else "sdpa"]), by_returned_maps)

    def loaders(self, validation: int | None = None) -> tuple[DataLoader[Any], DataLoader[Any]]:
        """Return the batches to train on, and to validate on the first rows of; the same each time."""
        some = range(len(self.validation))[:validation]
        training: DataLoader[Any] = DataLoader(self.training, BATCH, collate_fn=collate)
        return training, DataLoader(Subset(self.validation, some), 2 * BATCH, collate_fn=collate)


def fine_tuning(training: int, validation: int) -> Workload:
    """Return the demo's fine-tuning: embeddings and four of six layers stay as they are, which makes steps cheap."""
    try:
        splits, tokenizer = sentence_splits(train=1280), AutoTokenizer.from_pretrained(minilm(), local_files_only=True)
    except FileNotFoundError:
        return random_fine_tuning(training, validation, width=384, layers=6, heads=12)

    def build(attention: str) -> Any:
        model = AutoModelForSequenceClassification.from_pretrained(
            minilm(), num_labels=2, local_files_only=True, attn_implementation=attention
        )
        return _frozen(model)

    def rows(sentences: Sequence[Sentence]) -> Rows:
        return TokenisedSentences(sentences, tokenizer, frozenset(), TOKENS)

    some = (rows(splits.train[:training]), rows(splits.validation[:validation]))
    return Workload("pretrained MiniLM, real sentences", build, *some)


def random_fine_tuning(training: int, validation: int, width: int, layers: int, heads: int) -> Workload:
    """Return a model of any size with random weights, on random tokens."""
    shape: Any = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads}
    config = BertConfig(intermediate_size=4 * width, max_position_embeddings=64, **shape)

    def build(attention: str) -> Any:
        family: Any = BertForSequenceClassification
        return _frozen(family._from_config(config, attn_implementation=attention))

    def rows(count: int) -> Rows:
        lengths = [8 + 7 * row % (TOKENS - 7) for row in range(count)]
        zeros = [torch.zeros(length, dtype=torch.long) for length in lengths]
        labels = torch.arange(count) % 2
        return [
            {
                "input_ids": row + torch.randint(1000, 30000, row.shape),
                "relevance": row,
                "labels": label,
                "group": label,
            }
            for row, label in zip(zeros, labels, strict=True)
        ]

    name = f"random weights, {layers} layers of width {width}, random tokens"
    return Workload(name, build, rows(training), rows(validation))


def _frozen(model: Any) -> Any:
    model.base_model.embeddings.requires_grad_(False)
    layers = model.base_model.encoder.layer
    layers[: min(FROZEN_LAYERS, len(layers) - 1)].requires_grad_(False)
    return model


def _read(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def _layers_and_heads(model: Any) -> tuple[int, int]:
    return model.config.num_hidden_layers, model.config.num_attention_heads
