"""AdapterHub's `adapters` with its AdapterTrainer, in an environment of its own: it needs another
transformers than ptkit. Run by `ptkit bench train --against adapters` (`ptkit.bench.adapterhub`):

    python adapterhub_peer.py

Two modules of ptkit's are copied beside it, and it imports no others: `peer_answers` and `memory`.
The latter is of `ptkit/training`, so that both sides' memory is measured alike.
"""

from __future__ import annotations

import json
import platform
import tempfile
import time
from typing import Any

import accelerate  # noqa: F401  (the Trainer needs it; better missed now than at the first step)
import adapters
import torch
import transformers
from adapters import AdapterTrainer, PrefixTuningConfig
from memory import PeakMemory
from peer_answers import Lacking, answer_requests
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

#: What the prefix is called in the model.
NAME = "bench"
#: Label of positions that are not supervised.
IGNORED = -100


class Bench:
    """The base, and what is done with it on request; one method per request."""

    model: Any

    def base(self, folder: str, device: str, dtype: str, threads: int) -> None:
        """Load the base in `folder`, to run on `threads` threads."""
        torch.set_num_threads(threads)
        loader: Any = AutoModelForCausalLM
        try:
            # PyTorch's fused attention, as on ptkit's side and PEFT's.
            self.model, found = loader.from_pretrained(
                folder, dtype=getattr(torch, dtype), attn_implementation="sdpa",
                output_loading_info=True,
            )  # fmt: skip
        except (ValueError, KeyError) as error:
            raise Lacking(f"its transformers cannot load this base: {error}") from error
        wrong = {what: names for what, names in found.items() if names}
        if wrong:
            raise Lacking(f"its transformers has this base with other weights: {wrong}")
        self.model.to(device)
        for parameter in self.model.parameters():
            # Weights that are a view of the file would be counted as what training takes.
            parameter.data = parameter.data.clone()
        for module in self.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        kind = self.model.config.model_type
        try:
            adapters.init(self.model)
        except ValueError as error:
            raise Lacking(f"adapters {adapters.__version__} has no {kind}") from error
        if not self.model.supports_adapter("prefix_tuning"):
            raise Lacking(f"adapters {adapters.__version__} has no prefix tuning for {kind}")

    def offer(self, prefix: dict[str, Any], start: str) -> None:
        """Whether there is such a prefix, which can start from these values."""
        self._add(prefix, start)
        self.model.delete_adapter(NAME)

    def train(
        self, prefix: dict[str, Any], start: str, rows: str, pad: int, settings: dict[str, Any]
    ) -> dict[str, Any]:
        """Train on the rows in file `rows`, `[[token ids, labels], ...]`, as they come.

        settings: arguments of transformers' TrainingArguments. Returns the loss and the end
        (seconds) of every step, and peak memory in bytes.
        """
        with open(rows, encoding="utf-8") as file:
            examples = json.load(file)
        self._add(prefix, start)
        self.model.train_adapter(NAME)  # freezes all else, the head too
        ends: list[float] = []
        with tempfile.TemporaryDirectory() as scratch:
            arguments = TrainingArguments(
                scratch,
                logging_steps=1,
                save_strategy="no",
                remove_unused_columns=False,
                **settings,
            )
            trainer = InOrder(
                self.model, arguments, train_dataset=examples, callbacks=[Noted(ends)],
                data_collator=lambda batch: collated(
                    batch, pad, prefix["prefix_length"], self.model.dtype
                ),
            )  # fmt: skip
            trainer.remove_callback(PrinterCallback)
            memory = PeakMemory(self.model.device)
            trainer.train()
            peak = memory.bytes()
        self.model.delete_adapter(NAME)
        losses = [float(loss) for loss in trainer.losses]
        return {"losses": losses, "ends": ends, "memory": peak}

    def _add(self, prefix: dict[str, Any], start: str) -> None:
        """Add a prefix with the values in file `start`, which PEFT's encoder has named.

        Both lay keys and values out alike: virtual tokens, then layers, in each the keys before
        the values, then heads. `adapters` keeps them in one row, or makes them with an MLP of the
        same two layers.
        """
        self.model.add_adapter(NAME, config=PrefixTuningConfig(dropout=0.0, **prefix))
        (module,) = self.model.get_adapter(NAME)[0].values()  # the first layer holds all layers'
        theirs = dict(module["prefix"].named_parameters())
        values = load_file(start)
        if prefix["flat"]:
            given = {"control_trans": values["embedding.weight"].flatten()}
        else:
            given = {"wte.weight": values.pop("embedding.weight")}
            given |= {name.replace("transform", "control_trans"): v for name, v in values.items()}
        shapes = [{name: tuple(v.shape) for name, v in of.items()} for of in (given, theirs)]
        if shapes[0] != shapes[1]:
            self.model.delete_adapter(NAME)
            raise Lacking(f"its prefix is of other parameters: {shapes[1]}, not {shapes[0]}")
        with torch.no_grad():
            for name, parameter in theirs.items():
                parameter.copy_(given[name])


class InOrder(AdapterTrainer):
    """The library's trainer, reading the rows in the order they come and keeping the losses, which
    its log rounds."""

    def __init__(self, *args: Any, **kw: Any) -> None:
        super().__init__(*args, **kw)
        self.losses: list[torch.Tensor] = []

    def _get_train_sampler(self, *args: Any, **kw: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)

    def training_step(self, *args: Any, **kw: Any) -> torch.Tensor:
        loss: torch.Tensor = super().training_step(*args, **kw)
        self.losses.append(loss)
        return loss


class Noted(TrainerCallback):
    """Notes when steps end."""

    def __init__(self, ends: list[float]) -> None:
        self.ends = ends

    def on_step_end(self, *args: Any, **kw: Any) -> None:
        self.ends.append(time.perf_counter())


def collated(
    rows: list[list[list[int]]], pad: int, virtual_tokens: int, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    """Right-padded `input_ids`, `labels` and `position_ids` `[rows, longest]`, `attention_mask`
    `[rows, 1, longest, longest]`.

    Two things are set that `adapters` 1.3 would do otherwise, so that it computes what PEFT and
    ptkit compute. Tokens are counted from after the prefix: by itself it gives the first of them
    position 0. And the mask is made here, in numbers to be added. transformers makes a boolean one,
    which the library takes for its opposite, so that it masks the whole prefix. Where no row is
    padded, transformers makes no mask. Fused attention then lets the first tokens read only the
    beginning of the prefix.
    """
    longest = max(len(own) for own, _ in rows)
    ids = torch.full((len(rows), longest), pad)
    real = torch.zeros(len(rows), longest, dtype=torch.bool)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, (own, targets) in enumerate(rows):
        ids[i, : len(own)] = torch.tensor(own)
        labels[i, : len(own)] = torch.tensor(targets)
        real[i, : len(own)] = True
    seen = torch.ones(longest, longest, dtype=torch.bool).tril() & real[:, None, None, :]
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    positions = torch.arange(virtual_tokens, virtual_tokens + longest).expand(len(rows), -1)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "position_ids": positions}


def main() -> None:
    """Answer requests until stdin ends."""
    answer_requests(
        Bench(),
        f"adapters {adapters.__version__} (transformers {transformers.__version__}, "
        f"torch {torch.__version__}, Python {platform.python_version()})",
    )


if __name__ == "__main__":
    main()
