"""A soft prompt of several tasks: one that all share, times a matrix of low rank for each.

Wang et al. 2023, "Multitask Prompt Tuning Enables Parameter-Efficient Transfer Learning", section
3.1, https://arxiv.org/abs/2303.02861; PEFT's MULTITASK_PROMPT_TUNING. Each task's product is a soft
prompt like any other, and is used as one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import Adapter, OwnRate, peft_config_dict
from ptkit.methods.multitask_prompt.settings import MultitaskSection
from ptkit.methods.peft_tensors import multitask_tensors
from ptkit.methods.prompt_tuning.adapter import PromptTuning
from ptkit.methods.prompt_tuning.settings import PromptTuningSection
from ptkit.methods.soft_prompt import prompt_learning_shape, soft_prefix
from ptkit.methods.start import rms
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base

#: Values of a task's further columns before training, where its rank is above 1.
_COLUMN_NOISE = 0.02


class MultitaskPrompt(Adapter):
    """A shared prompt `[virtual_tokens, hidden]`, and for each task columns
    `[virtual_tokens, rank]` and rows `[rank, hidden]`, whose product it is multiplied with, value
    by value.

    All products are 1 at the start, so that every task starts from the shared prompt. (PEFT draws
    both factors at 0.02: its prompts start 2,500 times too small.)
    """

    section_class = MultitaskSection
    depends_on_input = True  # on the row's task, which is not read from the input but known
    section: MultitaskSection
    start: Tensor
    unit: Tensor

    def __init__(self, section: MultitaskSection, base: Base, tasks: int, start: Tensor) -> None:
        """start: embeddings `[virtual_tokens, hidden]`; what is learnt of the shared prompt is its
        change, in units of the start's RMS"""
        super().__init__(section, base)
        tokens, hidden = start.shape
        columns = torch.randn(tasks, tokens, section.rank) * _COLUMN_NOISE
        rows = torch.zeros(tasks, section.rank, hidden)
        columns[..., 0], rows[:, 0] = 1.0, 1.0
        self.change = nn.Parameter(torch.zeros_like(start))
        self.columns, self.rows = nn.Parameter(columns), nn.Parameter(rows)
        self.register_buffer("start", start)
        self.register_buffer("unit", rms(start))
        self.to(base.model.device)

    def shared(self) -> Tensor:
        """The part all tasks share, `[virtual_tokens, hidden]`, differentiable."""
        return self.start + self.unit * self.change

    def of_task(self, task: int) -> Tensor:
        """The soft prompt `[virtual_tokens, hidden]` of the task with this number."""
        return self.shared() * (self.columns[task] @ self.rows[task])

    def of_all(self) -> Tensor:
        """The mean of the tasks' soft prompts, a start for another task."""
        return torch.stack([self.of_task(t) for t in range(len(self.columns))]).mean(0)

    def for_tasks(self, tasks: Sequence[int]) -> PrefixBatch:
        """Prefixes of a batch whose rows belong to `tasks`; each task compiles once."""
        compiled = {t: soft_prefix(self.base, self.of_task(t)) for t in sorted(set(tasks))}
        return PrefixBatch.of_rows([compiled[t] for t in tasks], self.base.layout)

    def as_prompt(self, embeddings: Tensor) -> PromptTuning:
        """A prompt-tuning adapter that holds these embeddings `[virtual_tokens, hidden]`."""
        shared = PromptTuningSection.model_fields.keys() - {"kind"}
        settings = self.section.model_dump(include=set(shared))
        section = PromptTuningSection(kind="prompt_tuning", **settings)
        return PromptTuning(section, self.base, embeddings.detach())

    @classmethod
    def create(cls, section: Any, base: Base, demonstrations: Any) -> MultitaskPrompt:
        raise AdapterError("a multi-task prompt is made for its tasks (ptkit.multitask)")

    @property
    def virtual_tokens(self) -> int:
        return len(self.start)

    def own_rates(self) -> list[OwnRate]:
        rate, section = self.section.task_learning_rate, self.section
        return [OwnRate([self.columns, self.rows], rate, section.beta2)]

    def own_files(self) -> AdapterFiles:
        from peft import MultitaskPromptTuningConfig

        config = MultitaskPromptTuningConfig(
            task_type="CAUSAL_LM",
            num_virtual_tokens=self.virtual_tokens,
            num_tasks=len(self.columns),
            num_ranks=self.section.rank,
            **prompt_learning_shape(self.base),
        )
        tensors = multitask_tensors(*(t.detach() for t in (self.shared(), self.columns, self.rows)))
        return AdapterFiles(peft_config_dict(config, self.base), tensors)
