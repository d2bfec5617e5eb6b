"""The outputs of a checkpoint's classification head, by the names of their labels.

A checkpoint numbers its labels (`id2label`), and a task lists its own in any order. Where the names
are the same, an output keeps its name, whatever its number.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel


def order_of(own: Sequence[str], wanted: Sequence[str]) -> list[int]:
    """For each of the `wanted` labels, the number of the output among `own` that is to be its.

    Both are of one length. A label takes the output of its name: the exact one, else one that
    differs in upper and lower case only. The others take the outputs that are left, in order.
    """
    found: dict[str, int] = {}
    for alike in (str, str.casefold):
        names = [alike(name) for name in own]
        for label in wanted:
            name = alike(label)
            single = names.count(name) == 1 and [alike(w) for w in wanted].count(name) == 1
            if label not in found and single and names.index(name) not in found.values():
                found[label] = names.index(name)
    left = iter([number for number in range(len(own)) if number not in found.values()])
    return [found[label] if label in found else next(left) for label in wanted]


def told(id: str, own: Sequence[str], wanted: Sequence[str], *, anew: bool) -> str:
    """One sentence on what became of the head of the checkpoint `id`; empty where nothing had to
    be decided. It begins with `warning: ` where that is likely not what was meant.

    anew: the task has another number of labels, so the head was replaced
    """
    if anew:
        return (
            f"head: {id} has one for {len(own)} labels ({_few(own)}) and the task has "
            f"{len(wanted)}, so a new one starts at random"
        )
    by_name = [label.casefold() for label in wanted if label.casefold() in map(str.casefold, own)]
    if len(by_name) == len(wanted):
        if order_of(own, wanted) == [*range(len(own))]:
            return ""
        return (
            f"head: {id} numbers the task's labels in another order ({_few(own)}); its outputs "
            "are taken by name"
        )
    if not by_name and all(re.fullmatch(r"LABEL_\d+", name) for name in own):
        return f"head: {id} has no names for its labels; they are taken by position"
    shared = f"taken by name: {_few(by_name)}; the others" if by_name else "they"
    return (
        f"warning: head: {id} names its labels {_few(own)}, the task {_few(wanted)}; {shared} are "
        "taken by position and start with another meaning"
    )


@torch.no_grad()
def reorder(model: PreTrainedModel, loader: Any, order: Sequence[int]) -> None:
    """Let output i of the head of `model` be what output `order[i]` was.

    loader: transformers' class that makes such a model of its config
    """
    # What has one entry per label is what has one more where there is one more label.
    config = copy.deepcopy(model.config)
    config.num_labels = len(order) + 1
    with torch.device("meta"):
        larger = dict(loader.from_config(config).named_parameters())
    for name, parameter in model.named_parameters():
        for axis, size in enumerate(parameter.shape):
            if larger[name].shape[axis] != size:
                index = torch.tensor(order, device=parameter.device)
                parameter.copy_(parameter.index_select(axis, index))


def _few(names: Sequence[str], most: int = 6) -> str:
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown}, and {len(names) - most} more"
