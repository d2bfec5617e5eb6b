"""The virtual tokens in PEFT's prompt-learning files, whichever of its types they are."""

from __future__ import annotations

from dataclasses import replace

from torch import Tensor

from ptkit.errors import AdapterError
from ptkit.formats.adapter_files import AdapterFiles

MULTITASK = "MULTITASK_PROMPT_TUNING"
_PROMPT = "prompt_embeddings"
_COLUMNS, _ROWS = "prefix_task_cols", "prefix_task_rows"


def virtual_tokens_of(files: AdapterFiles) -> Tensor:
    """What `files` hold per virtual token: `[virtual tokens, width]`.

    Raises AdapterError when there is no such matrix, or when it disagrees with the settings. It
    raises it too for adapters of several tasks, and for those that hold more than virtual tokens.
    """
    if files.peft_type == MULTITASK:
        files = task_of(files, None)
    tokens = files.tensors.get(_PROMPT)
    if tokens is None or tokens.ndim != 2 or not tokens.is_floating_point():
        found = "no such tensor" if tokens is None else f"{tokens.dtype} {list(tokens.shape)}"
        raise AdapterError(f"`{_PROMPT}` should be a matrix of numbers, found {found}")
    others = sorted(files.tensors.keys() - {_PROMPT})
    if others:
        raise AdapterError(
            f"the file holds `{others[0]}` beside its virtual tokens (a trained head, or a type "
            "of adapter ptkit does not know); only virtual tokens can be used"
        )
    said = files.config.get("num_virtual_tokens")
    if not tokens.numel() or (said is not None and said != tokens.shape[0]):
        raise AdapterError(
            f"`{_PROMPT}` has shape {list(tokens.shape)}, the settings say {said!r} virtual tokens"
        )
    return tokens


def tasks_of(files: AdapterFiles) -> int:
    """How many tasks the adapter was trained for: 1 unless it is a multi-task prompt."""
    columns = files.tensors.get(_COLUMNS)
    return 1 if columns is None or not columns.ndim else int(columns.shape[0])


def multitask_tensors(shared: Tensor, columns: Tensor, rows: Tensor) -> dict[str, Tensor]:
    """A multi-task prompt's tensors by PEFT's names.

    shared: `[virtual tokens, hidden]`; columns: `[tasks, virtual tokens, rank]`; rows:
        `[tasks, rank, hidden]`
    """
    return {_PROMPT: shared, _COLUMNS: columns, _ROWS: rows}


def task_of(files: AdapterFiles, task: int | None) -> AdapterFiles:
    """The soft prompt of one task of a multi-task prompt, as a PROMPT_TUNING adapter.

    task: its number from 0; None where there is only one

    The prompt all tasks share times the task's matrix of low rank (Wang et al. 2023, "Multitask
    Prompt Tuning Enables Parameter-Efficient Transfer Learning", section 3.1). Raises
    AdapterError when the task is not there, or has to be chosen.
    """
    parts = [files.tensors.get(name) for name in (_PROMPT, _COLUMNS, _ROWS)]
    fits = [t is not None and t.ndim == n and t.is_floating_point()
            for t, n in zip(parts, (2, 3, 3), strict=True)]  # fmt: skip
    if not all(fits):
        raise AdapterError(f"a multi-task prompt needs `{_PROMPT}`, `{_COLUMNS}` and `{_ROWS}`")
    shared, columns, rows = (t.float() for t in parts if t is not None)
    tasks = columns.shape[0]
    rank = columns.shape[2]
    expected = [(tasks, shared.shape[0], rank), (tasks, rank, shared.shape[1])]
    if [tuple(columns.shape), tuple(rows.shape)] != expected:
        raise AdapterError(
            f"the parts of this multi-task prompt do not fit together: {list(shared.shape)}, "
            f"{list(columns.shape)}, {list(rows.shape)}"
        )
    if task is None and tasks != 1:
        raise AdapterError(
            f"this prompt is for {tasks} tasks; write one of them with "
            "`ptkit convert DIR --task N --to prompt --out OUT`, and use that"
        )
    chosen = task or 0
    if not 0 <= chosen < tasks:
        raise AdapterError(f"no task {chosen}: this prompt has tasks 0 to {tasks - 1}")
    config = {**files.config, "peft_type": "PROMPT_TUNING"}
    config = {k: v for k, v in config.items() if k not in ("num_tasks", "num_ranks")}
    return replace(
        files, config=config, tensors={_PROMPT: shared * (columns[chosen] @ rows[chosen])}
    )
