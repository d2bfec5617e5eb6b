"""An input-dependent prompt: a mean of several prefixes, weighed anew for every row.

A gate reads the row's input as the frozen base embeds it, and gives the weight of each prefix. Wu
et al. 2022, IDPG (https://arxiv.org/abs/2204.04497), make the prompt itself from the input. ATTEMPT
weighs whole prompts, its own or those of other tasks (Asai et al. 2022, section 3.2,
https://arxiv.org/abs/2205.11961). Here the same is done with keys and values in place of
embeddings, so a row costs what it costs with one prefix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles
from ptkit.methods.adapter import Adapter, Demonstrations, OwnRate, register
from ptkit.methods.prefix_mixture.settings import PREFIX_MIXTURE, PrefixMixtureSection
from ptkit.methods.prefix_tuning.adapter import PrefixTuning
from ptkit.methods.prefix_tuning.settings import prefix_section
from ptkit.prefix import KVPrefix
from ptkit.runtime.base_model import Base
from ptkit.runtime.mixture import MixedPrefixes

#: What PEFT calls a prefix's matrix.
_TOKENS = "prompt_embeddings"
#: Between the seeds with which the fresh prefixes draw their demonstrations.
_APART = 1000


@register
class PrefixMixture(Adapter):
    """Prefixes of one length, and a gate `[prefixes, hidden]` on the input's mean embedding."""

    section_class = PrefixMixtureSection
    encoder_decoder = True
    depends_on_input = True
    section: PrefixMixtureSection

    def __init__(
        self, section: PrefixMixtureSection, base: Base, prefixes: Sequence[PrefixTuning]
    ) -> None:
        """prefixes: those of `section.adapters`, then the others"""
        super().__init__(section, base)
        self.prefixes = nn.ModuleList(prefixes)
        for prefix in prefixes:
            prefix.head = None  # this adapter has one for all
        if not section.train_adapters:
            for prefix in prefixes[: len(section.adapters)]:
                prefix.requires_grad_(False)
        self.gate = nn.Linear(base.embedding.embedding_dim, len(prefixes))
        # Random: prefixes that start alike (the words of a task) would stay alike under equal
        # weights. What it reads has a length of 1, so its scores are of size 1.
        nn.init.normal_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        self.gate.to(base.model.device)

    @classmethod
    def create(
        cls, section: PrefixMixtureSection, base: Base, demonstrations: Demonstrations
    ) -> PrefixMixture:
        other: dict[str, Any] = {"start": "adapter", "start_text": None, "start_weights": None}
        sections = [
            *(prefix_section(section, **other, start_adapter=[a]) for a in section.adapters),
            *(prefix_section(section) for _ in range(section.prefixes)),
        ]
        prefixes = []
        for number, own in enumerate(sections, start=-len(section.adapters)):
            seed = demonstrations.seed + _APART * max(0, number)
            prefixes.append(PrefixTuning.create(own, base, replace(demonstrations, seed=seed)))
        return cls(section, base, prefixes)

    @classmethod
    def from_files(
        cls, files: AdapterFiles, section: PrefixMixtureSection, base: Base
    ) -> PrefixMixture:
        parts, weight, bias, top = _contents(files, base)
        own = prefix_section(section)
        prefixes = [PrefixTuning.from_files(part, own, base) for part in parts]
        read = {"num_virtual_tokens": prefixes[0].virtual_tokens, "top": top}
        adapter = cls(section.model_copy(update=read), base, prefixes)
        adapter.gate.weight.data.copy_(weight)
        adapter.gate.bias.data.copy_(bias)
        return adapter

    @classmethod
    def prefix_from_files(
        cls, files: AdapterFiles, section: PrefixMixtureSection, base: Base
    ) -> MixedPrefixes:
        parts, weight, bias, top = _contents(files, base)
        own, device = prefix_section(section), base.model.device
        prefixes = tuple(PrefixTuning.prefix_from_files(part, own, base) for part in parts)
        weight, bias = (t.to(device, copy=True).float() for t in (weight, bias))
        return MixedPrefixes(prefixes, weight, bias, base.embedding, top)

    def own_compiled(self) -> MixedPrefixes:
        own: list[Any] = [*self.prefixes]
        return MixedPrefixes(
            tuple(p.prefix() for p in own), self.gate.weight, self.gate.bias,
            self.base.embedding, self.section.top,
        )  # fmt: skip

    def prefix(self) -> KVPrefix | None:
        raise AdapterError(
            f"`{self.section.title}` weighs its prefixes by each row's input, so there is no one "
            "prefix that it is"
        )

    @property
    def virtual_tokens(self) -> int:
        return self.section.num_virtual_tokens

    @property
    def infix(self) -> bool:
        return self.section.position == "infix"

    def own_rates(self) -> list[OwnRate]:
        gate, section = [*self.gate.parameters()], self.section
        prefixes: list[Any] = [*self.prefixes]
        rates = [rate for prefix in prefixes for rate in prefix.own_rates()]
        trained = [rate for rate in rates if all(p.requires_grad for p in rate.parameters)]
        return [OwnRate(gate, section.gate_learning_rate, section.beta2), *trained]

    def own_files(self) -> AdapterFiles:
        own: list[Any] = [*self.prefixes]
        files = [p.own_files() for p in own]
        config = {
            "peft_type": PREFIX_MIXTURE,
            "base_model_name_or_path": self.base.id,
            "revision": self.base.revision,
            "task_type": files[0].config["task_type"],
            "num_virtual_tokens": self.virtual_tokens,
            "prefixes": len(files),
            "top": self.section.top,
            "prefix": files[0].config,
        }
        tensors = {_name(i): f.tensors[_TOKENS] for i, f in enumerate(files)}
        gate = {f"gate.{n}": p.detach() for n, p in self.gate.named_parameters()}
        return AdapterFiles(config, {**tensors, **gate})


def _name(number: int) -> str:
    return f"prefixes.{number}.{_TOKENS}"


def _contents(
    files: AdapterFiles, base: Base
) -> tuple[list[AdapterFiles], Tensor, Tensor, int | None]:
    """The prefixes in `files`, each as one of PEFT's, the gate's weight and bias, and `top`.

    Raises AdapterError when they do not belong together, or the gate reads other embeddings.
    """
    config, count, top = (files.config.get(key) for key in ("prefix", "prefixes", "top"))
    if not isinstance(config, dict) or config.get("peft_type") not in PrefixTuning.peft_types:
        raise AdapterError(
            f"the settings of a {PREFIX_MIXTURE} adapter should hold those of a prefix as "
            f"`prefix`, found {config!r:.80}"
        )
    if type(count) is not int or count < 1 or not (top is None or type(top) is int):
        raise AdapterError(f"`prefixes` and `top` should be numbers, found {count!r} and {top!r}")
    if top is not None and not 1 <= top <= count:
        raise AdapterError(f"`top` is {top}, but there are {count} prefixes")
    shapes = {"gate.weight": [count, base.embedding.embedding_dim], "gate.bias": [count]}
    # A stranger's count is not counted up to before it is known to be the file's.
    if len(files.tensors) != count + len(shapes):
        raise AdapterError(
            f"a mixture of {count} prefixes has {count + len(shapes)} tensors, found "
            f"{len(files.tensors)}"
        )
    for name in (*shapes, *map(_name, range(count))):
        tensor = files.tensors.get(name)
        if tensor is None or not tensor.is_floating_point():
            raise AdapterError(f"`{name}` is missing, or holds no numbers")
        if name in shapes and list(tensor.shape) != shapes[name]:
            raise AdapterError(
                f"`{name}` has shape {list(tensor.shape)}, expected {shapes[name]} on {base.id}"
            )
    parts = [AdapterFiles(config, {_TOKENS: files.tensors[_name(i)]}) for i in range(count)]
    if len({part.tensors[_TOKENS].shape for part in parts}) > 1:
        raise AdapterError("the prefixes of a mixture should be of one length")
    return parts, files.tensors["gate.weight"], files.tensors["gate.bias"], top
