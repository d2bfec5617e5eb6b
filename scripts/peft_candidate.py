"""PEFT behind the questions of `ptkit.families`: the same models, rows and oracles."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

from ptkit.errors import AdapterError
from ptkit.families.candidate import VIRTUAL_TOKENS, Candidate
from ptkit.families.kinds import ENCODER_DECODER, SEQUENCE_ENCODER, TOKEN_ENCODER, ModelKind
from ptkit.families.model_under_test import ModelUnderTest, NotApplicable, TokenRow
from ptkit.families.oracle import Embedded, Labelled, Merged, Oracle
from ptkit.families.prefix_oracle import prefix_oracle
from ptkit.families.property_case import Mismatch
from ptkit.prefix import KVPrefix
from ptkit.runtime.attention_sites import takes_positions
from ptkit.runtime.compile import kv_layout
from ptkit.runtime.forward import IGNORED, pad_rows

_PROMPT = {"num_virtual_tokens": VIRTUAL_TOKENS}
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "prefix": (PrefixTuningConfig, _PROMPT),
    "prefix (MLP)": (
        PrefixTuningConfig, {**_PROMPT, "prefix_projection": True, "encoder_hidden_size": 16},
    ),
    "prompt": (PromptTuningConfig, _PROMPT),
    "p-tuning": (PromptEncoderConfig, {**_PROMPT, "encoder_hidden_size": 16}),
    "lora": (LoraConfig, {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"}),
}  # fmt: skip


TASK_TYPES = {"sequence": "SEQ_CLS", "token": "TOKEN_CLS", None: "CAUSAL_LM"}


def _task_type(kind: ModelKind) -> str:
    return "SEQ_2_SEQ_LM" if kind is ENCODER_DECODER else TASK_TYPES[kind.head]


class DecoderPrefix(Oracle):
    """PEFT's prefix of an encoder-decoder, as what the decoder wrote before the row: the decoder's
    part only, and whatever PEFT makes of its parameters."""

    def __init__(self, model: PreTrainedModel, prefix: KVPrefix) -> None:
        super().__init__(model)
        self.prefix = prefix

    def logits(self, row: TokenRow) -> Tensor:
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        for layer, (key, value) in enumerate(
            zip(self.prefix.keys, self.prefix.values, strict=True)
        ):
            cache.self_attention_cache.update(key[None].clone(), value[None].clone(), layer)
        begin = [self.model.config.decoder_start_token_id, *row.answer[:-1]]
        with torch.no_grad():
            return self.model(
                input_ids=torch.tensor([row.input]), decoder_input_ids=torch.tensor([begin]),
                past_key_values=cache, use_cache=True,
            ).logits[0]  # fmt: skip


class Peft(Candidate):
    """A PEFT model used as PEFT's documentation does."""

    def __init__(self, tested: ModelUnderTest, method: str, peft: PeftModel) -> None:
        self.tested, self.method, self.peft = tested, method, peft.eval()
        self.pairs, self.head = tested.kind is ENCODER_DECODER, tested.kind.head
        self._oracle: Oracle | None = None

    @classmethod
    def made(cls, tested: ModelUnderTest, method: str) -> Peft:
        """A fresh adapter."""
        if method not in CONFIGS:
            raise NotApplicable("PEFT has no such method")
        kind, settings = CONFIGS[method]
        config = tested.base().model.config
        if method == "lora" and (tested.kind.head == "token" or config.model_type == "distilbert"):
            # PEFT leaves the head of other classifiers out of `all-linear` by itself.
            settings = {**settings, "exclude_modules": ["classifier", "pre_classifier"]}
        if method != "lora" and not {"hidden_size", "n_embd", "d_model"} & {*config.to_dict()}:
            # DistilBERT's names; PEFT asks for these.
            settings = {**settings, "token_dim": config.hidden_size,
                        "num_layers": config.num_hidden_layers,
                        "num_attention_heads": config.num_attention_heads}  # fmt: skip
        task = _task_type(tested.kind)
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(11)
            peft = get_peft_model(tested.base().model, kind(task_type=task, **settings))
            for name, parameter in peft.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.05)
            for name, parameter in peft.named_parameters():
                if tested.kind.head is not None and ".modules_to_save." in name:  # trained a bit
                    parameter.data.add_(0.1 * torch.randn_like(parameter))
        return cls(tested, method, peft)

    @property
    def oracle(self) -> Oracle:
        if self._oracle is None:
            self._oracle = self._make_oracle()
        return self._oracle

    def _make_oracle(self) -> Oracle:
        if self.method == "lora":
            return Merged(copy.deepcopy(self.peft).merge_and_unload())
        learnt = self.peft.get_prompt_embedding_to_save("default").detach()
        model = self._with_head(self.tested.base().model)
        if self.method in ("prompt", "p-tuning"):
            if self.tested.kind in (SEQUENCE_ENCODER, TOKEN_ENCODER):
                return Labelled(model, learnt, as_text=True)
            return Embedded(model, learnt[:VIRTUAL_TOKENS])
        if self.pairs:
            layers = self.peft.get_prompt(1).self_attention_cache.layers
            return DecoderPrefix(
                model,
                KVPrefix(
                    tuple(layer.keys[0].detach() for layer in layers),
                    tuple(layer.values[0].detach() for layer in layers),
                ),
            )
        layout = kv_layout(model)
        try:
            prefix = KVPrefix.from_flat(learnt, layout).to("cpu", model.dtype)
        except AdapterError as error:
            raise Mismatch("the prefix has not the shape of the model's keys and values") from error
        return prefix_oracle(model, prefix.keys, prefix.values)

    def _with_head(self, model: PreTrainedModel) -> PreTrainedModel:
        """`model`, of its own, with the head that was trained."""
        for name, module in self.peft.get_base_model().named_modules():
            if isinstance(module, ModulesToSaveWrapper):
                trained = module.modules_to_save["default"].state_dict()
                model.get_submodule(name).load_state_dict(trained)
        return model

    @property
    def model(self) -> PreTrainedModel:
        return self.peft.get_base_model()

    def parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.peft.named_parameters() if p.requires_grad}

    def _tensors(self, rows: Sequence[TokenRow], left: bool) -> dict[str, Tensor]:
        pad = self.tested.base().pad_token_id
        if self.pairs or self.head is not None:
            ids, mask = pad_rows([r.input for r in rows], pad, left=left)
            labels, written = pad_rows([r.answer for r in rows], pad, left=False)
            labels = labels.masked_fill(written == 0, IGNORED)
            labels = labels[:, 0] if self.head == "sequence" else labels
            return {"input_ids": ids, "attention_mask": mask, "labels": labels}
        ids, mask = pad_rows([r.whole for r in rows], pad, left=left)
        labels = torch.full_like(ids, IGNORED)
        for i, row in enumerate(rows):
            first = int(mask[i].argmax()) + len(row.input)
            labels[i, first : first + len(row.answer)] = torch.tensor(row.answer)
        tensors = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        if left and takes_positions(self.model):
            tensors["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        return tensors

    def logits(self, rows: Sequence[TokenRow], *, left: bool) -> list[Tensor]:
        tensors = self._tensors(rows, left)
        labels = tensors["labels"] if self.head is None else tensors.pop("labels")
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            logits = self.peft(**tensors).logits
        if self.head == "sequence":
            return list(logits.split(1))
        if self.head == "token":  # behind the virtual tokens
            logits = logits[:, -labels.shape[1] :]
        if self.pairs or self.head == "token":
            return [logits[i, : len(row.answer)] for i, row in enumerate(rows)]
        logits = logits[:, -labels.shape[1] :]  # behind the virtual tokens
        return [logits[i, :-1][labels[i, 1:] != IGNORED] for i in range(len(rows))]

    def loss(self, rows: Sequence[TokenRow]) -> Tensor:
        return self.peft(**self._tensors(rows, False)).loss

    def generate(self, inputs: Sequence[list[int]], **options: Any) -> list[list[int]]:
        pad = self.tested.base().pad_token_id
        ids, mask = pad_rows(list(inputs), pad, left=not self.pairs)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = self.peft.generate(
                input_ids=ids, attention_mask=mask, do_sample=False, eos_token_id=None,
                pad_token_id=pad, **options,
            )  # fmt: skip
        return output[:, 1 if self.pairs else ids.shape[1] :].tolist()

    def turns(self, inputs: Sequence[list[int]], tokens: int) -> list[list[int]]:
        cache = DynamicCache(config=self.model.config)
        said: list[int] = []
        answers = []
        for read in inputs:
            said += read
            (answer,) = self.generate([said], max_new_tokens=tokens, past_key_values=cache)
            said += answer
            answers.append(answer)
        return answers

    def reloaded(self, folder: Path) -> Peft:
        self.peft.save_pretrained(folder)
        base = self.tested.loaded_again().base()
        again = PeftModel.from_pretrained(base.model, str(folder))
        return Peft(self.tested, self.method, again)

    @contextmanager
    def off(self) -> Iterator[Any]:
        with self.peft.disable_adapter():
            yield self.peft

    @contextmanager
    def training(self, *, checkpointed: bool) -> Iterator[None]:
        self.peft.train()
        if checkpointed:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        try:
            yield
        finally:
            self.model.gradient_checkpointing_disable()
            self.peft.eval()
