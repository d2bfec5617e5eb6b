"""Continuous batching (Yu et al. 2022, "Orca", section 4): sequences that begin and end between
tokens, each behind its own prefix, over blocks of keys and values.

Prefill reads the inputs of sequences, decode adds a token to each. What sequences have in common at
their beginning (a prefix, a system prompt) is read once and is in blocks that they share.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ptkit.prefix import KVPrefix
from ptkit.runtime.block_pool import BlockPool, BlockTable
from ptkit.runtime.infix import placed_before_last
from ptkit.runtime.paged_attention import ApartPass, TogetherPass, reads_tokens_apart
from ptkit.runtime.paged_groups import Chunk, grouped, of_one_length
from ptkit.runtime.placement import own_part
from ptkit.runtime.runner import ModelRunner, Tokens, Want

#: A context in which rows run with these LoRA adapters, e.g. that of `AdapterBank.weights`.
Weights = Callable[[Sequence[str | None]], AbstractContextManager[None]]


@dataclass(frozen=True)
class SequenceInput:
    """What a sequence reads before its first new token.

    prompt: at least one id
    lora: name and version of the LoRA adapter it runs with; the name is what `Weights` is told
    """

    prompt: list[int]
    prefix: KVPrefix | None
    lora: tuple[str, object] | None = None


class PagedSequence:
    """A sequence of a `PagedBatch`: its input, how much of it has been read, and its blocks."""

    def __init__(self, given: SequenceInput, table: BlockTable, digests: list[bytes]) -> None:
        """digests: of its prompt up to the end of each full block, and of all of it"""
        self.given = given
        self.table = table
        self.digests = digests
        self.read = 0
        #: `[vocabulary]`, after the last token of the input; None until that has been read.
        self.logits: Tensor | None = None

    @property
    def lora(self) -> str | None:
        """The LoRA adapter it runs with."""
        return None if self.given.lora is None else self.given.lora[0]

    @property
    def infix(self) -> bool:
        """Whether its virtual tokens stand before the last token of its input."""
        return self.given.prefix is not None and self.given.prefix.infix

    @property
    def placeless(self) -> int:
        """How many virtual tokens it begins with that take no position."""
        prefix = self.given.prefix
        return 0 if prefix is None else prefix.virtual_tokens - prefix.positions

    @property
    def length(self) -> int:
        """Slots it takes."""
        return self.table.length


class PagedBatch:
    """The running sequences over one pool of blocks.

    weights: what a forward pass runs within

    Not thread-safe: it belongs to the loop that runs its sequences.
    """

    def __init__(
        self, model: PreTrainedModel, pool: BlockPool, weights: Weights | None = None
    ) -> None:
        self._model, self.pool = model, pool
        self._weights: Weights = weights or (lambda _: nullcontext())
        self._apart = reads_tokens_apart(model)
        self._last: ApartPass | None = None  # the last pass, which the next one may go on from
        #: Numbers of what sequences begin with, given once: contents are named by them.
        self._numbers: WeakKeyDictionary[KVPrefix, int] = WeakKeyDictionary()
        self._given = 0

    # Sequences

    def begin(self, given: SequenceInput, reserved: int = 0) -> PagedSequence:
        """A sequence to `prefill`. Raises NoBlocksError when its prefix has no room.

        reserved: positions after those of a shared prefix whose blocks it takes at once
        """
        table = BlockTable(self.pool)
        try:
            if given.prefix is not None and not given.prefix.infix:
                self._take_prefix(table, given.prefix)
            table.reserve(reserved)
            return PagedSequence(given, table, self._digests(given))
        except BaseException:
            table.release()
            raise

    def end(self, sequence: PagedSequence) -> None:
        """Give up the blocks of `sequence`."""
        sequence.table.release()

    def fork(self, sequence: PagedSequence) -> PagedSequence:
        """Another sequence with the input of `sequence`, which has been read and to which nothing
        was added."""
        assert sequence.logits is not None
        other = PagedSequence(sequence.given, sequence.table.fork(), sequence.digests)
        other.read, other.logits = sequence.read, sequence.logits
        return other

    # Passes

    def prefill(self, sequences: Sequence[PagedSequence], tokens: int) -> None:
        """Read at most so many tokens of the inputs, those of earlier sequences first. A sequence
        with `logits` has read all of its own.

        Of equal inputs one is read, and the others take it over when it is done. When it fails, the
        sequences are as they were.
        """
        self.step([], [], [(sequences, tokens)])

    def decode(self, sequences: Sequence[PagedSequence], tokens: Sequence[int]) -> Tensor:
        """Logits `[sequences, vocabulary]` after one more token in every sequence.

        When it fails, the sequences are as they were, so it may be tried again.
        """
        return self.step(sequences, tokens, [])

    @torch.no_grad()
    def step(
        self,
        decoding: Sequence[PagedSequence],
        tokens: Sequence[int],
        prefilling: Sequence[tuple[Sequence[PagedSequence], int]],
    ) -> Tensor:
        """`decode` and `prefill` in one pass, which reads the model's weights once.

        tokens: one more for each of `decoding`
        prefilling: sequences to read the inputs of, and how many tokens at most

        Returns logits `[decoding, vocabulary]`. When it fails, all sequences are as they were.
        """
        reading = [sequence for group, _ in prefilling for sequence in group]
        marks = [(s, s.table.mark, s.read, s.logits) for s in (*decoding, *reading)]
        published: list[int] = []
        try:
            sequences = [*decoding]
            chunks: list[Chunk] = []
            for number, (sequence, token) in enumerate(zip(decoding, tokens, strict=True)):
                sequence.table.extend(1)
                chunks.append(Chunk(number, (token,), sequence.table, sequence.placeless))
            leaders: dict[bytes, PagedSequence] = {}
            for group, left in prefilling:
                for sequence in group:
                    if leaders.setdefault(sequence.digests[-1], sequence) is not sequence:
                        continue  # it takes over what its leader has read
                    if left > 0 and sequence.logits is None:
                        chunk = self._chunk(sequence, len(chunks), left, published)
                        left -= len(chunk.ids)
                        chunks.append(chunk)
                        sequences.append(sequence)
            logits = self._read(sequences, chunks, len(decoding))
            for sequence in reading:
                leader = leaders[sequence.digests[-1]]
                if leader.logits is not None and sequence.logits is None:
                    self._follow(sequence, leader)
        except BaseException:
            self._last = None
            for block in published:
                self.pool.withdraw(block)
            for sequence, mark, read, own in marks:
                sequence.table.back_to(mark)
                sequence.read, sequence.logits = read, own
            raise
        return logits

    def _read(
        self, sequences: Sequence[PagedSequence], chunks: Sequence[Chunk], decoding: int
    ) -> Tensor:
        """Run `chunks`, which are of `sequences`, the first `decoding` of them decode. Returns the
        logits of these."""
        if not chunks:
            return torch.empty(0)
        wanted = [
            number for number, (sequence, chunk) in enumerate(zip(sequences, chunks, strict=True))
            if number < decoding or sequence.read + len(chunk.ids) == len(sequence.given.prompt)
        ]  # fmt: skip
        logits = self._run(sequences, chunks, frozenset(wanted))
        for sequence, chunk in zip(sequences[decoding:], chunks[decoding:], strict=True):
            sequence.read += len(chunk.ids)
        for row, number in enumerate(wanted[decoding:], decoding):
            sequences[number].logits = logits[row]
        return logits[:decoding]

    def _run(
        self, sequences: Sequence[PagedSequence], chunks: Sequence[Chunk], wanted: frozenset[int]
    ) -> Tensor:
        """Logits `[wanted, vocabulary]` after the last token of the wanted chunks, in the order of
        their numbers."""
        passes: list[ApartPass] | list[TogetherPass]
        if self._apart:
            if self._last is None or not self._last.goes_on(chunks):
                self._last = ApartPass(self._model, self.pool, chunks)
            passes = [self._last]
        else:
            passes = [
                TogetherPass(self._model, self.pool, part)
                for group in grouped(chunks)
                for part in of_one_length(group)
            ]
        found: list[Tensor] = []
        order: list[int] = []
        for one in passes:
            found.append(self._forward(one, sequences, wanted))
            order += [chunk.number for chunk in one.chunks if chunk.number in wanted]
        logits = found[0] if len(found) == 1 else torch.cat(found)
        if order == sorted(order):
            return logits
        index = sorted(range(len(order)), key=order.__getitem__)
        return logits.index_select(0, torch.tensor(index, device=logits.device))

    def _forward(
        self,
        one: ApartPass | TogetherPass,
        sequences: Sequence[PagedSequence],
        wanted: frozenset[int],
    ) -> Tensor:
        tokens = Tokens(one.ids, one.mask, one.positions)
        loras, ends = [], []
        for chunk in one.chunks:
            rows = len(chunk.ids) if isinstance(one, ApartPass) else 1
            loras += [sequences[chunk.number].lora] * rows
            ends += [False] * (len(chunk.ids) - 1) + [chunk.number in wanted]
        with self._weights(loras):
            runner = ModelRunner(self._model)
            if one.ids.shape[1] == 1 and all(ends):  # decode: the head reads all there is
                return runner.forward(tokens, kv=one)[:, 0]
            at = torch.tensor(ends, device=self._model.device).view(one.ids.shape)
            return runner.forward(tokens, kv=one, want=Want("logits", at))

    # What is read once

    def _chunk(
        self, sequence: PagedSequence, number: int, tokens: int, published: list[int]
    ) -> Chunk:
        """The next tokens of `sequence` to be read, after what others have read already."""
        given, table, size = sequence.given, sequence.table, self.pool.block_size
        whole = len(given.prompt) - 1  # the last token is read by every sequence
        while sequence.read % size == 0 and sequence.read + size <= whole:
            block = self.pool.found(sequence.digests[sequence.read // size])
            if block is None:
                break
            table.take_over(block)
            sequence.read += size
        start = sequence.read
        end = min(start + tokens, whole if sequence.infix and start < whole else whole + 1)
        if sequence.infix and start == whole:
            self._put_infix(sequence)
        table.extend(end - start)
        for index in range(start // size, end // size):  # blocks that are full now
            if sequence.infix and (index + 1) * size > whole:
                break
            block = int(table.slots[len(table.slots) - end + index * size]) // size
            self.pool.publish(block, sequence.digests[index])
            published.append(block)
        return Chunk(number, given.prompt[start:end], table, sequence.placeless)

    def _follow(self, sequence: PagedSequence, leader: PagedSequence) -> None:
        """Let `sequence` take over what `leader` has read."""
        table = leader.table.fork()
        sequence.table.release()
        sequence.table, sequence.read, sequence.logits = table, leader.read, leader.logits

    def _take_prefix(self, table: BlockTable, prefix: KVPrefix) -> None:
        """Begin `table` with the blocks of `prefix`, which are written once."""
        size, name = self.pool.block_size, self._name(prefix, None)
        own = own_part(self._model, prefix.alone)  # on the devices of the layers
        keys, values = [k[0] for k in own.keys], [v[0] for v in own.values]
        for start in range(0, prefix.virtual_tokens, size):
            end = min(start + size, prefix.virtual_tokens)
            content = hashlib.blake2b(b"prefix %d" % start + name, digest_size=16).digest()
            block = self.pool.found(content)
            if block is None:
                (block,) = self.pool.allocate(1)
                table.take_over(block, end - start)
                self._write(keys, values, table, start, end)
                self.pool.publish(block, content)
            else:
                table.take_over(block, end - start)

    def _put_infix(self, sequence: PagedSequence) -> None:
        """Put the virtual tokens of an infix behind what `sequence` has read."""
        prefix, device = sequence.given.prefix, self._model.device
        assert prefix is not None
        mask = torch.ones(1, sequence.read + 1, dtype=torch.long, device=device)
        last = torch.tensor([sequence.read], device=device)
        moved = own_part(self._model, placed_before_last(self._model, prefix.alone, mask, last))
        sequence.table.extend(prefix.virtual_tokens)
        keys, values = [k[0] for k in moved.keys], [v[0] for v in moved.values]
        self._write(keys, values, sequence.table, 0, prefix.virtual_tokens)

    def _write(
        self,
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        table: BlockTable,
        start: int,
        end: int,
    ) -> None:
        """Positions `start` to `end` of `keys` and `values`, `[heads, positions, dim]` per layer,
        into the last positions of `table`."""
        slots = torch.from_numpy(table.slots[table.length - (end - start) :].copy())
        for layer, (k, v) in enumerate(zip(keys, values, strict=True)):
            self.pool.write(
                layer, slots, k[:, start:end].transpose(0, 1), v[:, start:end].transpose(0, 1)
            )

    def _name(self, prefix: KVPrefix | None, lora: object) -> bytes:
        """A name of what a sequence begins with, of this object and of no other."""
        number = 0
        if prefix is not None and not prefix.infix:
            if prefix not in self._numbers:
                self._given += 1
                self._numbers[prefix] = self._given
            number = self._numbers[prefix]
        return f"{number} {lora!r}".encode()

    def _digests(self, given: SequenceInput) -> list[bytes]:
        """What names the content of each full block of the prompt, and all of it."""
        size, digest, found = self.pool.block_size, self._name(given.prefix, given.lora), []
        for start in range(0, len(given.prompt), size):
            part = given.prompt[start : start + size]
            digest = hashlib.blake2b(
                digest + b"".join(id.to_bytes(8, "little") for id in part), digest_size=16
            ).digest()
            found.append(digest)
        if given.prefix is not None and given.prefix.infix:
            # What is read is the base's, but for the last token.
            digest = hashlib.blake2b(digest + b"%d" % id(given.prefix), digest_size=16).digest()
        return [*found, hashlib.blake2b(digest + b"all", digest_size=16).digest()]
