"""How long the rows of a file are for a tokenizer, and what room a base has for them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from ptkit.data.chat_rows import ChatEncoder
from ptkit.data.dialogue import Dialogue
from ptkit.data.examples import Example
from ptkit.data.pair_rows import PairEncoder
from ptkit.data.tokens import part_ids, texts_ids
from ptkit.recipe.tasks import ChatTask, PreferenceTask

#: Rows that are tokenised.
SAMPLED = 2_000
#: Beyond these, a row costs more than it teaches; what is longer is cut.
_MOST_INPUT, _MOST_TARGET = 2_048, 512


@dataclass(frozen=True)
class Lengths:
    """Tokens of the rows. input, target: the limits that were chosen; told: why, in a line."""

    input: int
    target: int
    told: str


def text_lengths(
    inputs: Sequence[str],
    targets: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    positions: int | None,
) -> Lengths:
    """Limits for inputs and the targets after them. positions: the most of both together."""
    read = [len(ids) for ids in texts_ids(tokenizer, inputs)]
    written = [len(part_ids(tokenizer, text)) + 1 for text in targets]
    target = min(_rounded(max(written)), _MOST_TARGET)
    if positions is not None:
        target = min(target, max(1, positions // 2))
    input = min(_rounded(max(read)), _MOST_INPUT)
    if positions is not None:
        input = min(input, positions - target)
    cut = sum(length > input for length in read)
    told = f"inputs have {statistics.median(read):g} tokens in the median, at most {max(read):,}"
    if cut:
        told += f"; {cut:,} of {len(read):,} are cut to {input:,}, which keeps their end"
    return Lengths(input, target, told)


def chat_lengths(
    dialogues: Sequence[Dialogue],
    tokenizer: PreTrainedTokenizerBase,
    task: ChatTask,
    positions: int | None,
) -> Lengths:
    """Limits for whole conversations (`input`) and for the answers that are generated.

    A conversation keeps all its turns, also where its last answer is generated. One question is
    too long only for the base's positions.
    """
    unlimited = task.model_copy(update={"max_tokens": 10**9})
    encoder = ChatEncoder(tokenizer, unlimited)
    rows = encoder.rows([Example("", "", (), dialogue=d) for d in dialogues])
    whole = [len(row) for row in rows.encoded]
    answers = [len(part_ids(tokenizer, d.answer_text())) + 8 for d in dialogues]
    target = min(_rounded(max(answers)), _MOST_TARGET)
    # What a model reads before it writes an answer has to leave room for `max_target_tokens`.
    asked = [len(encoder.question(d, d.answers[-1])) for d in dialogues]
    most = wanted = max(_rounded(max(whole)), _rounded(max(asked)) + target)
    if wanted > min(_MOST_INPUT, positions or _MOST_INPUT):
        last = [_last_question(encoder, d) for d in dialogues]
        least = _rounded(max(map(sum, zip(last, answers, strict=True))))
        most = min(wanted, max(_MOST_INPUT, least), positions or wanted)
        target = max(1, min(target, most - max(last)))
    cut = sum(length > most for length in whole)
    told = f"conversations have {statistics.median(whole):g} tokens in the median"
    told += f", at most {max(whole):,}"
    if cut:
        told += f"; {cut:,} of {len(whole):,} lose early turns, to fit into {most:,}"
    return Lengths(most, target, told)


def _last_question(encoder: ChatEncoder, dialogue: Dialogue) -> int:
    """Tokens of the last question, with the system prompt and without earlier turns."""
    last = dialogue.upto(dialogue.answers[-1])
    while (shorter := last.without_first_exchange()) is not None:
        last = shorter
    return len(encoder.question(last, len(last.messages) - 1))


def pair_lengths(
    pairs: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    task: PreferenceTask,
    positions: int | None,
) -> Lengths:
    """Limits for a prompt with the longer of its answers (`input`), and for these answers."""
    unlimited = task.model_copy(update={"max_tokens": 10**9})
    rows = [row.passes() for row in PairEncoder(tokenizer, unlimited).rows(pairs).encoded]
    whole = [max(map(len, both)) for both in rows]
    target = _rounded(max(len(one.target_ids) for both in rows for one in both))
    # Answers are never cut, so the limit has room for the longest one.
    most = min(_rounded(max(whole)), max(_MOST_INPUT, target), positions or 10**9)
    cut = sum(length > most for length in whole)
    told = f"prompts with their longer answer have {statistics.median(whole):g} tokens in the"
    told += f" median, at most {max(whole):,}"
    if cut:
        told += f"; {cut:,} of {len(whole):,} prompts lose their beginning, to fit into {most:,}"
    return Lengths(most, target, told)


def _rounded(tokens: int) -> int:
    """The next multiple of 16 beyond `tokens`."""
    return (tokens // 16 + 1) * 16
