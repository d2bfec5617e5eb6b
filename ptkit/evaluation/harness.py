"""Standard tasks by EleutherAI's lm-evaluation-harness, with an adapter on the base.

The harness owns tasks, prompts and metrics; here is what it asks of a model: log-probabilities of
given continuations, and generated text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ptkit.data.chat_template import ChatTemplate
from ptkit.data.encoded import EncodedExample
from ptkit.data.tokens import cut_left
from ptkit.errors import DataError, ModelError, UserError
from ptkit.extras import extra
from ptkit.methods import Adapter
from ptkit.runtime.forward import collate, rows_for, supervised_logits, token_losses
from ptkit.runtime.generation import generate
from ptkit.runtime.tokenization import own_ends

with extra("harness", "`ptkit evaluate --harness`"):
    from lm_eval import simple_evaluate
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

#: Of models whose positions are not bounded.
_UNBOUNDED = 2048


class AdapterLM(TemplateLM):
    """An adapter on its base, as the harness sees a model. Its prefix is compiled once."""

    backend = "causal"

    def __init__(self, adapter: Adapter, batch_size: int, chat: ChatTemplate | None = None) -> None:
        """chat: the template that conversations are asked in; default: the tokenizer's own."""
        super().__init__()
        if adapter.base.encoder_decoder:
            raise ModelError("the harness is asked about causal language models only, so far")
        self.adapter, self.batch_size = adapter, batch_size
        self.tokenizer: Any = adapter.base.tokenizer
        self._chat = ChatTemplate(self.tokenizer) if chat is None else chat
        compiled = adapter.compiled()
        self._compiled = None if compiled is None else compiled.detach()
        self._lead = adapter.base.lead
        self.max_length = (adapter.base.max_positions or _UNBOUNDED) - adapter.positions

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """For the harness's cache of requests."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        # As the harness's own model for transformers: a text that is told nothing of begins as the
        # tokenizer begins it, once.
        if add_special_tokens is None:
            return self.adapter.base.encode([string])[0]
        return list(self.tokenizer.encode(string, add_special_tokens=add_special_tokens))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation in the adapter's own template and with its system prompt, up to where
        the answer begins.

        add_generation_prompt: False: the last message is the beginning of the answer
        """
        messages = self._chat.with_system(chat_history)
        return self._chat.render(
            messages, ask=add_generation_prompt, go_on=not add_generation_prompt
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, for the harness's record and its cache of requests."""
        return self._chat.record.template if chat_template else None

    @torch.no_grad()
    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        """For each (context, continuation): its log-probability, and whether greedy search would
        have written it.

        A context is cut on the left to what the model has positions for, and keeps the
        begin-of-text token if it has one (the harness's own model loses it). Raises DataError for a
        continuation that leaves no position for any context.
        """
        rows = []
        for _text, context, continuation in requests:
            # The last token is predicted and not read, so it takes no position.
            kept = self.max_length + 1 - len(continuation)
            if kept < 1:
                raise DataError(
                    f"a continuation has {len(continuation)} tokens; {self.adapter.base.id} has "
                    f"{self.max_length} positions beside the adapter"
                )
            context = self.adapter.behind(cut_left(context, kept, self._lead))
            rows.append(EncodedExample(context, continuation))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        results: dict[int, tuple[float, bool]] = {}
        model = self.adapter.model
        model.eval()
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            own = [rows[i] for i in part]
            batch = rows_for(self._compiled, [row.input_ids for row in own])
            tensors = collate(own, self.adapter.base)
            for name in ("input_ids", "attention_mask"):
                tensors[name] = tensors[name][:, : self.max_length]
            logits, targets = supervised_logits(model, **tensors, batch=batch)
            counts = [len(row.target_ids) for row in own]
            losses = token_losses(logits, targets).double().split(counts)
            greedy = (logits.argmax(-1) == targets).split(counts)
            for i, nats, equal in zip(part, losses, greedy, strict=True):
                results[i] = (-float(nats.sum()), bool(equal.all()))
        return [results[i] for i in range(len(rows))]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-probability of each whole text, read in windows that do not overlap."""
        found = []
        for (text,) in (request.args for request in requests):
            windows = get_rolling_token_windows(
                self.tok_encode(text), self.prefix_token_id, self.max_length, 1
            )
            pairs = [(None, *make_disjoint_window(window)) for window in windows]
            found.append(sum(value for value, _ in self._loglikelihood_tokens(pairs)))
        return found

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each context, up to the task's stop strings."""
        order = sorted(range(len(requests)), key=lambda i: (str(requests[i].args[1]), i))
        answers: dict[int, str] = {}
        while order:
            settings = requests[order[0]].args[1]
            part = [i for i in order[: self.batch_size] if requests[i].args[1] == settings]
            order = order[len(part) :]
            answers |= zip(
                part, self._written([requests[i].args[0] for i in part], settings), strict=True
            )
        return [answers[i] for i in range(len(requests))]

    def _written(self, contexts: list[str], settings: dict[str, Any]) -> list[str]:
        options: dict[str, Any] = dict(normalize_gen_kwargs(dict(settings), 256))
        eos = self.tokenizer.decode([self.eot_token_id])
        stop = handle_stop_sequences(options.pop("until", None), eos=eos)
        longest = int(options.pop("max_gen_toks"))
        if not options.get("do_sample"):
            options.pop("temperature", None)
        if self._chat.trained and self._chat.ends:
            ends = {*own_ends(self.adapter.model), *self._chat.ends}
            options["eos_token_id"] = sorted(ends)
        room = self.max_length - longest
        if room < 1:
            raise DataError(
                f"the task generates up to {longest} tokens, {self.adapter.base.id} has "
                f"{self.max_length} positions beside the adapter"
            )
        inputs = [
            self.adapter.behind(cut_left(self.tok_encode(context), room, self._lead))
            for context in contexts
        ]
        # Stopping is an economy here: the text is cut at the stop string in any case.
        tokens = generate(
            self.adapter.model,
            inputs,
            rows_for(self._compiled, inputs),
            pad_token_id=self.adapter.base.pad_token_id,
            max_new_tokens=longest,
            stop_strings=stop,
            tokenizer=self.tokenizer,
            **options,
        )
        # As the harness's own model decodes: what it compares has no special tokens.
        texts = self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [postprocess_generated_text(text, stop, None) for text in texts]


@dataclass(frozen=True)
class KnownTasks:
    """Tasks that the harness knows, and what it knows of them. Reading that takes seconds."""

    names: tuple[str, ...]
    manager: TaskManager


def known_tasks(names: Sequence[str], include: Path | None = None) -> KnownTasks:
    """The tasks called `names`. include: a folder with tasks of your own.

    Raises UserError for one that the harness does not know.
    """
    manager = TaskManager(include_path=str(include) if include else None)
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise UserError(
            f"the harness knows no task {', '.join(f'`{t}`' for t in unknown)}; `lm-eval ls tasks` "
            "lists them, --include names a folder with your own"
        )
    return KnownTasks(tuple(names), manager)


def evaluate_tasks(
    adapter: Adapter,
    tasks: KnownTasks,
    *,
    batch_size: int = 16,
    limit: int | None = None,
    shots: int | None = None,
    chat: ChatTemplate | None = None,
) -> dict[str, dict[str, Any]]:
    """Task -> metric -> value and standard error, as the harness reports them, with `n`.

    limit: only so many examples of each task
    shots: demonstrations in the prompt, default the task's own
    chat: the template that prompts are put into as conversations; None: they stay texts

    Raises UserError for a base without a template where one is asked for.
    """
    if chat is not None and not chat.exists:
        raise UserError(
            f"{adapter.base.id} has no chat template, and the adapter was not trained with one; "
            "leave --chat out"
        )
    found: Any = simple_evaluate(
        AdapterLM(adapter, batch_size, chat), apply_chat_template=chat is not None,
        tasks=list(tasks.names), num_fewshot=shots, limit=limit, task_manager=tasks.manager,
        log_samples=False, bootstrap_iters=1000, verbosity="ERROR",
    )  # fmt: skip
    results = {}
    for task, values in found["results"].items():
        kept = {name: value for name, value in values.items() if isinstance(value, int | float)}
        results[task] = {**kept, "n": found["n-samples"].get(task, {}).get("effective")}
    return results
