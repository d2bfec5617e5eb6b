"""Many adapters on one frozen base; every row of a batch picks its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ptkit.bank.ensemble import (
    AveragedLogProbabilities,
    EnsembleBy,
    label_votes,
    require_greedy,
    vote,
)
from ptkit.bank.resident import ResidentAdapters, RowNames, parts_of_row
from ptkit.bank.slots import SlotTable
from ptkit.data.chat_template import ChatTemplate
from ptkit.data.encode import require_apart
from ptkit.data.tokens import listed, without_lead
from ptkit.errors import DataError
from ptkit.formats.adapter_info import Asked
from ptkit.runtime.generation import generate
from ptkit.runtime.scoring import continuation_scores


class AdapterBank(ResidentAdapters):
    """Compiled adapters by name, for one base model.

    Each adapter is compiled once, when it is loaded. At request time no encoder, MLP or prompt
    token runs. Prefixes live on the model's device within `budget` bytes. The least recently used
    move to host memory within `host_budget` bytes, and from there leave memory. Their files are
    then read again when needed. Files that change on disk are noticed at most `check_every` seconds
    later. A bad file changes nothing but the adapter's `fault`.

    Raises ModelError for a classifier: its adapters bring a head each.

    budget, host_budget: bytes, None for no limit. On a CPU both are the same memory, so there
        the second tier is off unless asked for.

    Safe to use from several threads. Their batches run at the same time, in all banks of the base
    together. Only LoRA adapters are added and removed while no batch runs. A `PrefixBatch` holds
    the prefixes it was made of. So running rows finish with the version they started with, whatever
    is swapped or unloaded.
    """

    def behind(self, row: RowNames, ids: Sequence[int]) -> list[int]:
        """`ids`, those of a whole text, as they are read behind what `row` stands for: a text
        prompt begins with the begin-of-text token already."""
        begun = any(map(self._store.begins_text, parts_of_row(row)))
        return without_lead(ids, self.base.lead) if begun else list(ids)

    def asked(self, name: str) -> Asked:
        """How the adapter `name` is asked, as the files say that are in use. Raises AdapterError
        where it is unknown, or its files, needed now, are bad."""
        return self._lora[name].asked if name in self._lora else self._store.asked(name)

    def chat_template(self, row: RowNames) -> ChatTemplate:
        """The template in which `row` is asked: the one that its adapter was trained with, of
        several the first that has one. Otherwise it is the base's own."""
        for name in parts_of_row(row):
            chat = self.asked(name).chat
            if chat is not None:
                return ChatTemplate.of_record(self.base.tokenizer, chat)
        return ChatTemplate(self.base.tokenizer)

    def _encoded(self, texts: Sequence[str], names: Sequence[RowNames]) -> list[list[int]]:
        rows = zip(names, self.base.encode(texts), strict=True)
        return [self.behind(row, ids) for row, ids in rows]

    def slots(self, rows: int, *, slots: int, virtual_tokens: int) -> SlotTable:
        """Buffers of fixed shape for `rows` rows over `slots` of this bank's adapters.

        virtual_tokens: the longest adapter a slot can hold. See `SlotTable`.
        """
        return SlotTable(self.base, self.prefix, rows, slots, virtual_tokens)

    def generate(
        self, texts: str | Sequence[str], names: RowNames | Sequence[RowNames], **options: Any
    ) -> list[str]:
        """Answers to `texts`, row i under `names[i]`, all in one batch. One text, or one name, may
        be given without a list.

        options: anything transformers' `generate` takes. Greedy rows get the tokens they get
        alone.
        """
        texts, names = listed(texts), listed(names)
        if len(texts) != len(names):
            raise ValueError(f"{len(texts)} texts need as many names, found {len(names)}")
        if not texts:
            return []
        prompts = self._encoded(texts, names)
        return self.base.decode(self.generate_ids(prompts, names, **options))

    def generate_ids(
        self, prompts: list[list[int]], names: Sequence[RowNames], **options: Any
    ) -> list[list[int]]:
        """`generate` from token ids to token ids, without the end-of-text token."""
        with self.weights(names):
            return generate(
                self.base.model, prompts, self.prefixes(names, prompts),
                pad_token_id=self.base.pad_token_id, **options,
            )  # fmt: skip

    def ensemble(
        self,
        texts: str | Sequence[str],
        names: str | Sequence[RowNames],
        *,
        by: EnsembleBy = "vote",
        **options: Any,
    ) -> list[str]:
        """One answer per text from all of `names` together, in one batch (Lester et al. 2021,
        section 6: prompt ensembling).

        by: `vote` takes the most frequent of the adapters' answers (the earliest adapter's on a
            tie). `average` generates from the mean of their log-probabilities at every token,
            greedily
        options: anything transformers' `generate` takes. With `num_return_sequences` all answers
            to a text vote

        Raises UserError for `average` with beams, sampling or several answers.
        """
        texts, names = listed(texts), listed(names)
        repeated = [text for text in texts for _ in names]
        if by == "average":
            require_greedy(self.base.model, options)
            own = options.get("logits_processor") or []
            options["logits_processor"] = [*own, AveragedLogProbabilities(len(names))]
        answers = self.generate(repeated, [*names] * len(texts), **options)
        if not answers:
            return []
        count = len(answers) // len(texts)  # with `num_return_sequences` several of each adapter
        groups = [answers[i : i + count] for i in range(0, len(answers), count)]
        return [group[0] if by == "average" else vote(group) for group in groups]

    def classify(
        self,
        texts: str | Sequence[str],
        labels: Sequence[str],
        names: str | Sequence[RowNames],
        *,
        by: EnsembleBy = "vote",
    ) -> list[str]:
        """The likeliest of `labels` after each text, decided by all of `names` together.

        Every text is read once per adapter, in one batch, and all labels are scored from there.
        by: as in `ensemble`; a tied vote goes to the likelier label

        Raises DataError for labels that probabilities cannot tell apart: one begins another, say.
        """
        texts, labels, names = listed(texts), listed(labels), listed(names)
        words = [self.base.encode_part(label) for label in labels]
        if len(set(labels)) < len(labels):
            raise DataError("a label is listed twice")
        require_apart(dict(zip(labels, words, strict=True)))
        rows = [*names] * len(texts)
        contexts = self._encoded([text for text in texts for _ in names], rows)
        scores = self.continuation_scores(contexts, words, rows)
        grouped = scores.view(len(texts), len(names), len(labels))
        return [labels[i] for i in label_votes(grouped, by).tolist()]

    def continuation_scores(
        self,
        contexts: list[list[int]],
        continuations: list[list[int]],
        names: Sequence[RowNames],
    ) -> Tensor:
        """Log-probability of each continuation after each context with its row's adapters,
        `[contexts, continuations]`. contexts, continuations: token ids"""
        with self.weights(names):
            return continuation_scores(
                self.base.model, contexts, continuations, self.rows(names, contexts),
                pad_token_id=self.base.pad_token_id,
            )  # fmt: skip
