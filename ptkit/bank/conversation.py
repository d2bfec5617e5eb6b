"""A conversation of several turns with adapters of a bank, its cache kept between turns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedTokenizerBase, TextStreamer

from ptkit.bank.bank import AdapterBank
from ptkit.bank.resident import RowNames
from ptkit.data.chat_template import ChatTemplate
from ptkit.data.dialogue import Message
from ptkit.data.tokens import listed, part_ids, text_ids
from ptkit.errors import AdapterError, ModelError, UserError
from ptkit.runtime.base_model import Base
from ptkit.runtime.cache import ReservedCache, conversation_cache, layers_with_keys
from ptkit.runtime.generation import generate
from ptkit.runtime.processors import setting
from ptkit.runtime.tokenization import own_ends

#: Length of an answer unless said otherwise, in tokens.
MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class ConversationTurn:
    """A user's text and the answer to it, with the answer's token ids."""

    text: str
    answer: str
    answer_ids: list[int]


@dataclass(frozen=True)
class _Memory:
    """What one adapter has read so far: its prefix and `ids`, as keys and values in `cache`.

    versions: of the adapters that read it (`AdapterBank.versions`)
    """

    versions: tuple[object, ...]
    ids: list[int]
    cache: DynamicCache


class Conversation:
    """Turns with one adapter or several, one after the other.

    The conversation stays in memory as keys and values: a new turn reads its own tokens only. Keys
    and values depend on the prefix before them, so every adapter has its own. An adapter that joins
    later reads the conversation so far once. It answers as if it had been there from the start.

    An adapter that was trained on conversations is asked in its own chat template, with its system
    prompt; others in the tokenizer's. Without one, texts and answers follow each other line by
    line, as in the training of plain language models' adapters.

    adapter: the first speaker, None for the plain base
    system: a text before the conversation (the chat template's system message, or a first line);
        None: the adapter's

    Not for several threads at once; the bank below may be shared.
    """

    def __init__(
        self, bank: AdapterBank, *, adapter: RowNames = None, system: str | None = None
    ) -> None:
        self.bank = bank
        self.adapter: RowNames = None
        self.system = system
        self.exchanges: list[ConversationTurn] = []
        self._memories: dict[RowNames, _Memory] = {}
        self.use(adapter)

    def use(self, adapter: RowNames) -> None:
        """Let `adapter` answer from now on. Raises AdapterError when the bank has none such, and
        for one whose prefix depends on the input. Its prefix would differ at every turn, and
        nothing that was read could be kept."""
        if self.bank.depends_on_input(adapter):
            raise AdapterError(
                f"`{adapter}` makes its prefix from the input, which grows with every turn of a "
                "conversation; ask it with `generate`, or `ptkit serve`"
            )
        self.bank.rows([adapter])
        self.adapter = adapter if adapter is None or isinstance(adapter, str) else (*adapter,)

    def reset(self) -> None:
        """Forget everything said."""
        self.exchanges.clear()
        self._memories.clear()

    def say(
        self, text: str, *, on_text: Callable[[str], None] | None = None, **options: Any
    ) -> str:
        """The answer to `text` after everything said before.

        on_text: called with pieces of the answer as they come
        options: anything transformers' `generate` takes for one answer; `max_new_tokens` (256 by
            default) is lowered to the positions the model has left. After a beam search the next
            turn reads the answer again: the cache holds other beams by then

        Raises ModelError when none is left, UserError for more than one answer. Whatever is
        raised, an interruption included, the conversation is as it was before.
        """
        bank, base = self.bank, self.bank.base
        if (setting(base.model, options, "num_return_sequences") or 1) > 1:
            raise UserError(
                "a conversation goes on from one answer; leave `num_return_sequences` out, or ask "
                "with `generate`"
            )
        prompt = self._prompt(text, self.exchanges, self.adapter)
        versions = bank.versions(self.adapter)  # before the rows: never newer than what they hold
        batch = bank.rows([self.adapter])
        options = self._within_room(options, int(batch.placed.sum(-1).max()), len(prompt))
        ends = bank.chat_template(self.adapter).ends
        options = _ending(base, options, ends)
        if on_text is not None:
            options["streamer"] = _Pieces(base, on_text, ends)
        # Taken out: an interruption half-way leaves a cache nobody can trust.
        cache = self._remembered(self._memories.pop(self.adapter, None), versions, prompt)
        if cache is None:
            cache = conversation_cache(base.model, batch, len(prompt))
        with bank.weights([self.adapter]):
            (answer_ids,) = generate(
                base.model, [prompt], batch, pad_token_id=base.pad_token_id, read=cache, **options
            )
        (answer,) = base.decode([answer_ids])
        if isinstance(cache, ReservedCache):  # other kinds cannot go back to an earlier position
            read = cache.get_seq_length() - batch.longest
            if any(len(layer.keys) > 1 for layer in layers_with_keys(cache)):
                # Beams: what they share is the prompt. The best one may have ended long ago, and
                # its place was given to another.
                cache.batch_select_indices(torch.zeros(1, dtype=torch.long))
                cache.crop(len(prompt) - read)
                read = len(prompt)
            self._memories[self.adapter] = _Memory(versions, [*prompt, *answer_ids][:read], cache)
        self.exchanges.append(ConversationTurn(text, answer, answer_ids))
        return answer

    def compare(
        self,
        texts: str | Sequence[str],
        adapters: RowNames | Sequence[RowNames],
        *,
        instead: bool = False,
        **options: Any,
    ) -> list[str]:
        """What each of `adapters` would answer to its own of `texts` here, in one mixed batch.

        instead: in place of the last exchange, not after it

        Nothing is added to the conversation.
        """
        texts, adapters = listed(texts), listed(adapters)
        before = self.exchanges[:-1] if instead else self.exchanges
        prompts = [
            self._prompt(text, before, adapter)
            for text, adapter in zip(texts, adapters, strict=True)
        ]
        bank, base = self.bank, self.bank.base
        prefixes = bank.prefixes(adapters, prompts)
        longest = max((p.positions for p in prefixes if p is not None), default=0)
        options = self._within_room(options, longest, max(map(len, prompts)))
        ends = frozenset[int]().union(*(bank.chat_template(name).ends for name in adapters))
        options = _ending(base, options, ends)
        answers = bank.generate_ids(prompts, adapters, **options)
        return base.decode(answers)

    def _within_room(self, options: dict[str, Any], virtual: int, read: int) -> dict[str, Any]:
        """`options` with an answer no longer than the positions left after `read` tokens."""
        base, wanted = self.bank.base, int(options.get("max_new_tokens", MAX_NEW_TOKENS))
        if base.max_positions is not None:
            left = base.max_positions - virtual - read
            if left < 1:
                raise ModelError(
                    f"the conversation is too long: {base.id} has {base.max_positions} positions, "
                    f"it takes {read} and the adapter {virtual}; reset it to begin anew"
                )
            wanted = min(wanted, left)
        return {**options, "max_new_tokens": wanted}

    def _remembered(
        self, memory: _Memory | None, versions: tuple[object, ...], prompt: list[int]
    ) -> DynamicCache | None:
        """The cache of `memory` cut back to what it shares with `prompt`, if it is of use."""
        if memory is None or memory.versions != versions:
            return None
        shared = _shared(memory.ids, prompt[:-1])  # the last token is read to predict the next
        if shared < len(memory.ids):
            memory.cache.crop(shared - len(memory.ids))
        return memory.cache

    def _prompt(self, text: str, before: list[ConversationTurn], adapter: RowNames) -> list[int]:
        base, template = self.bank.base, self.bank.chat_template(adapter)
        if template.exists:
            ids = self._templated(template, text, before)
        else:
            ids = self._by_line(text, before)
        base.require_embedded([ids])
        return self.bank.behind(adapter, ids)

    def _by_line(self, text: str, before: list[ConversationTurn]) -> list[int]:
        tokenizer = self.bank.base.tokenizer
        lines = [] if self.system is None else [self.system]
        ids: list[int] = []
        for exchange in before:
            ids += _encoded(tokenizer, [*lines, exchange.text], start=not ids)
            ids += exchange.answer_ids
            lines = [""]  # the next text begins on a line of its own
        return ids + _encoded(tokenizer, [*lines, text], start=not ids)

    def _templated(
        self, template: ChatTemplate, text: str, before: list[ConversationTurn]
    ) -> list[int]:
        messages: list[Message] = (
            [] if self.system is None else [{"role": "system", "content": self.system}]
        )
        for exchange in before:
            messages.append({"role": "user", "content": exchange.text})
            messages.append({"role": "assistant", "content": exchange.answer})
        messages.append({"role": "user", "content": text})
        return template.ids(template.with_system(messages))


class _Pieces(TextStreamer):
    """transformers' streamer, handing whole words to a function instead of printing them."""

    def __init__(self, base: Base, on_text: Callable[[str], None], ends: frozenset[int]) -> None:
        streamer: Any = super()
        streamer.__init__(base.tokenizer, skip_prompt=True, skip_special_tokens=False)
        self._frame = torch.tensor([*base.frame, *ends])
        self._on_text = on_text

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt:
            value = value[~torch.isin(value, self._frame)]
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if text:
            self._on_text(text)


def _ending(base: Base, options: dict[str, Any], ends: frozenset[int]) -> dict[str, Any]:
    """`options` with the tokens at which a template ends answers, beside the model's own."""
    if "eos_token_id" in options or not ends - {*own_ends(base.model)}:
        return options
    return {**options, "eos_token_id": sorted({*own_ends(base.model), *ends})}


def _encoded(tokenizer: PreTrainedTokenizerBase, lines: list[str], *, start: bool) -> list[int]:
    return (text_ids if start else part_ids)(tokenizer, "\n".join(lines))


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    """How many tokens `a` and `b` begin with alike."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
