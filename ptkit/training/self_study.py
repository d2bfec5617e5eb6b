"""Self-study: what a base writes with a document in view, as texts to learn the document from.

After Cartridges (Eyuboglu et al. 2025, section 4, https://arxiv.org/abs/2506.06266). A document is
read in chunks, and each text is written with one of them in view. So a document may be longer than
the base's positions. Their openings are questions put to a chat model. Here a base model of any
kind continues pieces of the document itself, a few words of no document, or inputs of your own.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch

from ptkit.data.encoded import StudiedText
from ptkit.data.tokens import without_lead
from ptkit.errors import DataError, ModelError, UserError
from ptkit.formats import atomic
from ptkit.prefix import KVPrefix
from ptkit.prefix_batch import PrefixBatch
from ptkit.runtime.base_model import Base
from ptkit.runtime.compile import compile_tokens
from ptkit.runtime.generation import end_ids, generate

#: Openings of no document. A quarter of the texts begin with one of them.
GENERIC = (
    "In short,", "The main point is", "This is about", "For example,", "The question is",
    "First of all,", "It follows that", "According to the text,", "As was said,", "In the end,",
)  # fmt: skip
_GENERIC_SHARE = 0.25
#: Tokens of the document that other texts begin with, at least and at most.
SHORTEST, LONGEST = 2, 8
#: Texts written at the same time.
BATCH = 32
#: With fewer tokens in view than this, unless they are asked for, there is little to write about.
SMALLEST_CHUNK = 16


@dataclass(frozen=True)
class Document:
    """A text as token ids, and the chunks it is read in.

    ids: of the whole
    chunks: consecutive pieces of it
    lead: what stands before each of them and before the whole: the base's begin-of-text token as a
        sink, or nothing
    """

    ids: list[int]
    chunks: list[list[int]]
    lead: list[int]

    def begun(self, base: Base) -> list[int]:
        """What stands before every text, where the chunks begin with it: behind a chunk a text is
        read without it."""
        return base.lead if self.lead else []

    def compiled(self, base: Base) -> list[KVPrefix]:
        """Each chunk's keys and values, read once by the frozen base: what its teacher sees."""
        return [compile_tokens(base.model, torch.tensor(chunk)) for chunk in self.chunks]


def read_in_chunks(
    base: Base, text: str, *, sink: bool, room: int, chunk_tokens: int | None
) -> Document:
    """`text` in as few chunks of about equal length as it takes.

    room: tokens that are read after a chunk; chunk_tokens: the most tokens of a chunk, default: as
    many as the base has positions for. Raises UserError for a text without tokens, ModelError
    where the base has too few positions for a chunk and what comes after it.
    """
    lead = (base.lead or [base.first_token_id]) if sink else []
    body = base.encode_part(text)
    if not body:
        raise UserError("the document has no tokens; give a text")
    most = base.max_positions
    free = len(lead) + len(body) if most is None else most - room
    wanted = min(free, len(lead) + len(body)) if chunk_tokens is None else chunk_tokens
    least = len(lead) + 1
    if chunk_tokens is None:
        least = min(SMALLEST_CHUNK, len(lead) + len(body))
    if wanted > free or wanted < least:
        raise ModelError(
            f"too few positions: {base.id} has {most}, and the texts it writes take up to {room}; "
            f"a chunk of the document has {max(0, free)} left (asked for: {wanted}, at least "
            f"{least}); lower the chunk's tokens or the texts' tokens"
        )
    count = -(-len(body) // (wanted - len(lead)))
    ends = [round(i * len(body) / count) for i in range(count + 1)]
    chunks = [[*lead, *body[a:b]] for a, b in pairwise(ends)]
    return Document([*lead, *body], chunks, lead)


@dataclass(frozen=True)
class StudySplits:
    """Studied texts, no two alike: to learn from, to choose the best checkpoint, to judge."""

    train: list[StudiedText] = field(default_factory=list)
    validation: list[StudiedText] = field(default_factory=list)
    test: list[StudiedText] = field(default_factory=list)


#: Split -> token ids of the inputs whose answers belong to it.
Inputs = Mapping[str, Sequence[Sequence[int]]]
SPLITS = ("test", "validation", "train")


def counts_of(texts: int) -> dict[str, int]:
    """Split -> number of texts, where `texts` are learnt from."""
    return {"test": max(1, texts // 4), "validation": max(1, texts // 8), "train": texts}


def study(
    base: Base,
    document: Document,
    prefixes: Sequence[KVPrefix],
    folder: Path,
    *,
    texts: int,
    tokens: int,
    seed: int,
    inputs: Inputs | None = None,
    report: Callable[[int, int], None] | None = None,
) -> StudySplits:
    """Let the base write about `document`; what is in `folder` already is read back.

    prefixes: `document.compiled`; folder: one file per chunk, written when it is complete
    texts: to learn from; half as many more are written for validation and test, at least one of
        each for every chunk
    tokens: of a text, at most, after its opening
    inputs: what the texts begin with; default: openings from the chunk and of no document
    report: told (texts written, texts in all) after every batch

    Sampled at temperature 1, from all tokens; torch's global generator is left alone. Raises
    DataError when so few different texts come out that a split is empty.
    """
    chunks = len(document.chunks)
    numbers = {s: max(1, -(-n // chunks)) for s, n in counts_of(texts).items()}
    each = sum(numbers.values())
    found: dict[str, list[StudiedText]] = {split: [] for split in SPLITS}
    for chunk, (ids, prefix) in enumerate(zip(document.chunks, prefixes, strict=True)):
        path = folder / f"chunk-{chunk:04d}.jsonl"
        if not path.exists():
            piece = ids[len(document.lead) :]
            openings = list(_openings(base, piece, chunk, numbers, seed, inputs))

            def told(done: int, before: int = chunk * each) -> None:
                if report is not None:
                    report(before + done, chunks * each)

            begun = document.begun(base)
            read = [(split, without_lead(opening, begun)) for split, opening in openings]
            written = _written(base, prefix, read, tokens, (seed, chunk), told)
            lines = [
                {"split": split, "input_ids": opening, "target_ids": target,
                 "text": base.tokenizer.decode([*opening, *target])}
                for (split, opening), target in zip(openings, written, strict=True)
            ]  # fmt: skip
            atomic.write_text(
                path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
            )
        with path.open(encoding="utf-8") as file:  # `splitlines` would end one within a text, too
            rows = [json.loads(line) for line in file]
        for row in rows:
            found[row["split"]].append(
                StudiedText(row["input_ids"], row["target_ids"], chunk=chunk)
            )
    return _distinct(found)


def _distinct(found: Mapping[str, list[StudiedText]]) -> StudySplits:
    """The texts that were written, each once: what is judged on is never trained on."""
    seen: set[tuple[int, ...]] = set()
    kept: dict[str, list[StudiedText]] = {}
    for split in SPLITS:
        kept[split] = []
        for text in found[split]:
            key = (*text.input_ids, *text.target_ids)
            if text.target_ids and key not in seen:
                seen.add(key)
                kept[split].append(text)
        if not kept[split]:
            raise DataError(
                "the base writes nothing, or always the same, with this document in view; write "
                "more texts (--texts), or give inputs of your own (--inputs)"
            )
    return StudySplits(**kept)


def _openings(
    base: Base,
    chunk: list[int],
    number: int,
    counts: Mapping[str, int],
    seed: int,
    inputs: Inputs | None,
) -> Iterator[tuple[str, list[int]]]:
    """Split and token ids of the opening of every text about chunk `number`."""
    generator = random.Random(f"{seed} {number}")
    if inputs is not None:
        for split, count in counts.items():
            # Each chunk goes on where the one before it ended, so that all inputs have a turn.
            own = inputs[split]
            yield from ((split, list(own[(number * count + i) % len(own)])) for i in range(count))
        return
    lead, generic = base.lead, base.encode(GENERIC)
    for split, count in counts.items():
        for _ in range(count):
            if generator.random() < _GENERIC_SHARE:
                yield split, generator.choice(generic)
                continue
            length = min(generator.randint(SHORTEST, LONGEST), len(chunk))
            start = generator.randint(0, len(chunk) - length)
            yield split, [*lead, *chunk[start : start + length]]


def longest_opening(base: Base, inputs: Inputs | None) -> int:
    """Tokens of the longest opening there can be."""
    if inputs is not None:
        return max(len(ids) for own in inputs.values() for ids in own)
    return max(len(base.lead) + LONGEST, *map(len, base.encode(GENERIC)))


def _written(
    base: Base,
    prefix: KVPrefix,
    openings: Sequence[tuple[str, list[int]]],
    tokens: int,
    seed: tuple[int, int],
    told: Callable[[int], None],
) -> list[list[int]]:
    """What the base writes after each opening, the token that ends a text included."""
    # The end that targets of a task are learnt with; the model may stop at others, too.
    end = base.tokenizer.eos_token_id
    if end is None:
        end = min(end_ids(base.model), default=None)
    written: list[list[int]] = []
    devices = [base.model.device] if base.model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed[0] * 1_000_003 + seed[1])
        for start in range(0, len(openings), BATCH):
            rows = [ids for _, ids in openings[start : start + BATCH]]
            answers = generate(
                base.model, rows, PrefixBatch.shared(prefix, len(rows)),
                pad_token_id=base.pad_token_id, do_sample=True, top_k=0, top_p=1.0,
                temperature=1.0, max_new_tokens=tokens,
            )  # fmt: skip
            # Where the teacher stops, the student learns to stop.
            written += [[*a, end] if end is not None and len(a) < tokens else a for a in answers]
            told(len(written))
    return written
