"""Examples as token ids, and the order in which training reads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ptkit.data.chat_rows import ChatEncoder
from ptkit.data.encoded import IGNORED, EncodedExample
from ptkit.data.examples import Example
from ptkit.data.pair_rows import PairEncoder
from ptkit.data.tokens import cut_left, lead_ids, part_ids, texts_ids, whole_ids
from ptkit.errors import DataError
from ptkit.recipe.tasks import (
    ChatTask,
    ClassificationTask,
    GenerationTask,
    HeadedTask,
    PreferenceTask,
    Task,
    TokenClassificationTask,
)


def encode_examples(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    *,
    pairs: bool = False,
) -> list[EncodedExample]:
    """Tokenise inputs and targets separately, so that training sees what generation will.

    Inputs longer than `max_input_tokens` lose their left end (what is nearest to the target
    matters most), but not what the tokenizer puts before every text. Targets longer than
    `max_target_tokens` lose their right end. Generated targets end with the end-of-text token, so
    that the model learns to stop.

    pairs: for an encoder-decoder. Inputs and targets get the tokenizer's own special tokens. Inputs
        lose their right end, because the beginning matters most in a text that is summed up

    Raises DataError for a tokenizer without an end token where targets need one, and for label
    words that `require_apart` refuses.

    A conversation is one up to its last answer, which is the target. What training reads of it are
    `ptkit.data.chat_rows`. A pair of answers is as training reads it (`ptkit.data.pair_rows`).

    For a classification head, too, the tokenizer adds its special tokens and cuts at the right; a
    word's label is that of its first token. Raises DataError for a tokenizer that cannot tell
    which tokens a word has become.
    """
    if isinstance(task, ChatTask):
        encoder = ChatEncoder(tokenizer, task)
        return [encoder.asked(example) for example in examples]
    if isinstance(task, PreferenceTask):
        return [*PairEncoder(tokenizer, task).rows(examples).encoded]
    if isinstance(task, TokenClassificationTask):
        return _encoded_words(examples, tokenizer, task)
    if isinstance(task, HeadedTask):
        inputs = whole_ids(tokenizer, [e.input for e in examples], task.max_input_tokens)
        numbers = {label: number for number, label in enumerate(task.labels)}
        return [
            EncodedExample(ids, [numbers[e.target]])
            for ids, e in zip(inputs, examples, strict=True)
        ]
    if isinstance(task, ClassificationTask):
        label_token_ids(task, tokenizer)
    if pairs:
        return _encoded_pairs(examples, tokenizer, task)
    lead = lead_ids(tokenizer)
    inputs = texts_ids(tokenizer, [e.input for e in examples])
    targets = tokenizer([e.target for e in examples], add_special_tokens=False)["input_ids"]
    encoded = []
    for input_ids, target_ids in zip(inputs, targets, strict=True):
        if isinstance(task, GenerationTask):
            target_ids = [*target_ids, _end_of(tokenizer)][: task.max_target_tokens]
        kept = cut_left(input_ids, task.max_input_tokens, lead)
        encoded.append(EncodedExample(kept, target_ids))
    return encoded


def _encoded_words(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    task: TokenClassificationTask,
) -> list[EncodedExample]:
    numbers = {label: number for number, label in enumerate(task.labels)}
    encoded = []
    for example, (ids, starts) in zip(
        examples, tokens_of_words(examples, tokenizer, task), strict=True
    ):
        targets = [IGNORED] * len(ids)
        tags = example.target.split()
        for word, token in starts.items():
            targets[token] = numbers[tags[word]]
        encoded.append(EncodedExample(ids, targets))
    return encoded


def tokens_of_words(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, task: TokenClassificationTask
) -> list[tuple[list[int], dict[int, int]]]:
    """Of each example its token ids, and word -> index of its first token, for words that have
    one: those beyond `max_input_tokens` have none. Raises DataError as `encode_examples` does."""
    if not tokenizer.is_fast:
        raise DataError(
            f"{type(tokenizer).__name__} does not tell which tokens a word has become; labels of "
            "words need a model with a fast tokenizer"
        )
    encoding = tokenizer(
        [list(e.words) for e in examples],
        is_split_into_words=True, truncation=True, max_length=task.max_input_tokens,
    )  # fmt: skip
    found = []
    for row, ids in enumerate(encoding["input_ids"]):
        starts: dict[int, int] = {}
        for token, word in enumerate(encoding.word_ids(row)):
            if word is not None:
                starts.setdefault(word, token)
        found.append((ids, starts))
    return found


def _encoded_pairs(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    task: GenerationTask | ClassificationTask,
) -> list[EncodedExample]:
    inputs = whole_ids(tokenizer, [e.input for e in examples], task.max_input_tokens)
    longest = task.max_target_tokens if isinstance(task, GenerationTask) else None
    targets = tokenizer(
        text_target=[e.target for e in examples], truncation=longest is not None, max_length=longest
    )["input_ids"]
    # Some families write a language's name after the end (mBART).
    end = _end_of(tokenizer)
    ended = [t if end in t[-2:] else [*t, end][:longest] for t in targets]
    return [EncodedExample(i, t) for i, t in zip(inputs, ended, strict=True)]


def _end_of(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that targets end with. Raises DataError where the tokenizer names none."""
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the tokenizer names no end token, so a model cannot learn where an answer ends; set "
            "`eos_token` in the base's tokenizer_config.json"
        )
    return int(tokenizer.eos_token_id)


def label_token_ids(
    task: ClassificationTask, tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[int]]:
    """Label -> token ids of its words. Raises DataError as `require_apart` does."""
    ids = {label: part_ids(tokenizer, words) for label, words in task.verbalizer.items()}
    require_apart(ids, "task.verbalizer: ")
    return ids


def require_apart(ids: Mapping[str, Sequence[int]], where: str = "") -> None:
    """Raise DataError unless labels can be told apart by the probability of their words.

    ids: label -> token ids of its words; where: put before the message

    Words without tokens have no probability. Words that begin another label's are never less
    likely than those, whatever is learnt; equal words never differ.
    """
    for label, own in ids.items():
        if not own:
            raise DataError(f"{where}the words of the label `{label}` have no tokens; give others")
    # Sorted, a row of ids comes just before those that it begins.
    ordered = sorted(ids, key=lambda label: list(ids[label]))
    for short, long in pairwise(ordered):
        if list(ids[long][: len(ids[short])]) == list(ids[short]):
            same = len(ids[long]) == len(ids[short])
            raise DataError(
                f"{where}the words of the labels `{short}` and `{long}` are the same tokens"
                if same
                else f"{where}the words of the label `{short}` begin those of `{long}`, so "
                f"`{long}` could never be chosen; give one of them words that begin otherwise"
            )


def length_grouped_batches(
    lengths: Sequence[int] | np.ndarray, batch_size: int, seed: int
) -> Iterator[list[int]]:
    """Endless batches of row indices, rows of similar length together.

    Each epoch is a fresh shuffle that depends on `seed` and the epoch only. Within pools of 50
    batches, rows are sorted by length; then the batches are shuffled. So a resumed run sees the
    same order by skipping what it has read.
    """
    known, pool = np.asarray(lengths), batch_size * 50
    epoch = 0
    while True:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(known), generator=generator).numpy()
        starts: list[int] = []
        for start in range(0, len(order), pool):
            rows = order[start : start + pool]
            # In place: what is of one length stays in its order, the longest first.
            rows[:] = rows[np.argsort(-known[rows], kind="stable")]
            starts += range(start, start + len(rows), batch_size)
        ends = [*starts[1:], len(order)]
        for i in torch.randperm(len(starts), generator=generator).tolist():
            yield order[starts[i] : ends[i]].tolist()
        epoch += 1
