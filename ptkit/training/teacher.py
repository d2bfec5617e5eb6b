"""What a teacher makes of the texts a student learns from, read once for all epochs.

The teacher is frozen and has a document in view, so what it predicts for a text never changes. A
step then costs what it costs without a document, however long that is.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ptkit.data.encoded import StudiedText
from ptkit.prefix import KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.architecture import evaluating
from ptkit.runtime.base_model import Base
from ptkit.runtime.forward import collate, teacher_outputs

#: Texts read in one forward pass, when all are read.
BATCH = 16


class Teacher:
    """The base with one of `prefixes` in view, the one a text names (`StudiedText.chunk`).

    lead: what the prefixes begin with and every text too; the teacher reads it once

    What it makes of texts is kept while it fits into `budget` bytes. It is what its output head
    reads at every token that is learnt, where the head is a frozen matrix (else the wider logits).
    Texts that do not fit are read again each time, alone. Those that do are read in batches that
    depend on their order only. Either way what a resumed run learns from is the same.
    """

    def __init__(
        self, base: Base, prefixes: Sequence[KVPrefix], budget: int, lead: Sequence[int] = ()
    ) -> None:
        self.base, self.prefixes, self.budget, self.lead = base, prefixes, budget, lead
        self.nbytes = 0
        self._kept: dict[StudiedText, Tensor] = {}

    def study(self, texts: Sequence[StudiedText]) -> None:
        """Read `texts`, in their order, as far as the budget goes."""
        new = [text for text in dict.fromkeys(texts) if text not in self._kept]
        for start in range(0, len(new), BATCH):
            part = new[start : start + BATCH]
            for text, read in zip(part, self._read(part), strict=True):
                if self.nbytes + read.nbytes > self.budget:
                    return
                # Cloned: a part of the batch would keep all of it.
                self._kept[text] = read.clone()
                self.nbytes += read.nbytes

    def outputs(self, texts: Sequence[StudiedText]) -> Tensor:
        """`teacher_outputs` of `texts`, one after the other: `[tokens learnt, width]`."""
        found = (self._kept.get(text) for text in texts)
        return torch.cat([
            self._read([text])[0] if kept is None else kept
            for text, kept in zip(texts, found, strict=True)
        ])  # fmt: skip

    @torch.no_grad()
    def _read(self, texts: Sequence[StudiedText]) -> list[Tensor]:
        batch = PrefixBatch.of_rows([self.prefixes[t.chunk] for t in texts], self.base.layout)
        rows = [text.behind(self.lead) for text in texts]
        with evaluating(self.base.model):
            read = teacher_outputs(self.base.model, **collate(rows, self.base), batch=batch)
        return list(read.split([text.supervised for text in texts]))
