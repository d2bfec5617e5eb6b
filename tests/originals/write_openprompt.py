"""Templates as OpenPrompt's users save them, as their state; see case.py."""

from __future__ import annotations

import sys
from typing import Any

import torch
from case import WRITTEN, Cases, StandIns, randomise
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

sys.meta_path.insert(0, StandIns("datasets"))  # for reading benchmarks
from openprompt.data_utils import InputFeatures  # noqa: E402
from openprompt.prompts import (  # noqa: E402
    PrefixTuningTemplate,
    PtuningTemplate,
    SoftTemplate,
)

#: Parts of a template's state that are the base's.
BASES_OWN = ("model.", "plm.", "raw_embedding.")


class Words:
    """What templates ask of a tokenizer when they are made."""

    vocab_size = 100
    eos_token, pad_token, mask_token, unk_token = "</s>", "<pad>", "<mask>", "<unk>"
    additional_special_tokens: tuple[str, ...] = ()


def template(setting: str, model: Any) -> Any:
    made = {"model": model, "tokenizer": Words()}
    if setting == "soft":
        return SoftTemplate(num_tokens=5, initialize_from_vocab=False, **made)
    if setting == "soft1":
        return SoftTemplate(num_tokens=1, **made)
    if setting == "ptuning":
        return PtuningTemplate(text='{"soft"} {"soft"} {"placeholder": "text_a"} {"mask"}', **made)
    return PrefixTuningTemplate(num_token=3 if setting == "prefix3" else 5, mid_dim=16, **made)


@torch.no_grad()
def keep(cases: Cases, kind: str, setting: str) -> None:
    model = cases.base(kind, AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM)
    made = template(setting, model).eval()
    learnt = {n: t for n, t in made.state_dict().items() if not n.startswith(BASES_OWN)}
    randomise(t for t in learnt.values() if t.is_floating_point())
    folder = cases.folder(kind, setting)
    torch.save(made.state_dict() if setting == "soft" else learnt, folder / "template.pt")
    if setting == "ptuning":  # it is refused: where its tokens stand is not in the file
        return
    batch = {"input_ids": cases.ids.clone(), "attention_mask": torch.ones_like(cases.ids)}
    if kind == "t5":
        batch["decoder_input_ids"] = cases.ids[:, :WRITTEN].clone()
    read = made.process_batch(InputFeatures(**batch))
    names = ("input_ids", "inputs_embeds", "attention_mask", "decoder_input_ids", "past_key_values")
    call = {name: read[name] for name in names if name in read and read[name] is not None}
    cases.keep(folder, model(**call).logits)


def main() -> None:
    cases = Cases("openprompt")
    for kind in ("gpt2", "t5"):
        for setting in ("soft", "soft1", "prefix", "prefix3", "ptuning"):
            keep(cases, kind, setting)


if __name__ == "__main__":
    main()
