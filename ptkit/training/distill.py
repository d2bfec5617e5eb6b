"""Distilling a long text into a short prefix: the base with the text in view is the teacher.

Context distillation (Askell et al. 2021, section 2, https://arxiv.org/abs/2112.00861; Snell et al.
2022, https://arxiv.org/abs/2209.15189) into keys and values instead of weights, on texts that the
teacher writes itself: a cartridge (Eyuboglu et al. 2025, https://arxiv.org/abs/2506.06266).

Folder of a distillation:
    distill.json        what it is; a resumed one must match it
    texts/              what the base wrote, one file per chunk of the document
    checkpoint-STEP/    while training
    adapter/            the result: a prefix, in PEFT's layout
    record.json         the measurements; its presence means that it is finished
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import Field, ValidationError

from ptkit.data.chat_template import with_template_read
from ptkit.data.encode import encode_examples
from ptkit.data.task import load_task
from ptkit.errors import FolderError, ModelError, UserError
from ptkit.evaluation.divergence import Divergence, measure_divergence
from ptkit.formats import atomic
from ptkit.formats.adapter_files import write_adapter
from ptkit.formats.adapter_info import (
    AdapterInfo,
    ClosenessInfo,
    DistilledInfo,
    DocumentInfo,
    MethodInfo,
)
from ptkit.formats.cell_record import CurvePoint
from ptkit.formats.folder_lock import held
from ptkit.formats.typed_file import FileKind, FileSection, unchanged
from ptkit.methods.prefix_tuning.adapter import PrefixTuning
from ptkit.methods.prefix_tuning.settings import PrefixTuningSection
from ptkit.prefix import KVPrefix
from ptkit.recipe.load import LoadedRecipe
from ptkit.recipe.schema import TrainSection
from ptkit.recipe.tasks import ConversationTask, HeadedTask, Task
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.cache import has_state
from ptkit.runtime.compile import compile_tokens
from ptkit.runtime.forward import require_embedded
from ptkit.training.adapter_trainer import Job
from ptkit.training.checkpoint import Progress, remove_checkpoints
from ptkit.training.loop import fit
from ptkit.training.observer import RunObserver
from ptkit.training.provenance import base_info, task_info, versions
from ptkit.training.run_folder import delete_run_folder, open_run_folder
from ptkit.training.self_study import (
    SPLITS,
    Document,
    Inputs,
    StudySplits,
    longest_opening,
    read_in_chunks,
    study,
)
from ptkit.training.teacher import Teacher

#: The file that says what a folder is, and what that is called.
IDENTITY, WHAT = "distill.json", "distillation"
#: What the distilled prefix is measured beside, and itself, in the order they are shown.
NOTHING, FIRST_TOKENS, DISTILLED = "nothing", "first tokens as text", "distilled prefix"


class Distilled(FileSection):
    """A finished distillation: `record.json` in its folder.

    tokens: of the prefix; document_tokens, chunks: of the text; bytes, document_bytes: of their
    keys and values in the base's precision
    texts: split -> how many
    figures: what stands before the texts -> how close the base comes to itself with the document in
        view. It is measured on the `test` texts, which were not learnt from
    curve: `{step, train_loss, validation_loss}`, KL in nats per token
    """

    folder: Path = Field(default=Path(), exclude=True)
    tokens: int
    document_tokens: int
    chunks: int
    bytes: int
    document_bytes: int
    texts: dict[str, int]
    figures: dict[str, Divergence]
    steps: int
    best_step: int
    seconds: float
    curve: list[CurvePoint]

    @property
    def adapter(self) -> Path:
        """The adapter's folder, in PEFT's layout."""
        return self.folder / "adapter"

    @property
    def ratio(self) -> float:
        """How many times smaller the prefix is than the document."""
        return self.document_bytes / self.bytes

    def as_dict(self) -> dict[str, Any]:
        """The record as JSON values, without its folder."""
        return self.model_dump(mode="json")

    @classmethod
    def read(cls, folder: Path) -> Distilled:
        """The record in `folder`. Raises FolderError where it is damaged, or of a newer version."""
        return _RECORD.read_file(folder / "record.json").updated(folder=folder)


_RECORD = FileKind(Distilled, (unchanged,), FolderError, "pass --fresh to distill again")


def distill(
    document: str,
    *,
    tokens: int,
    out: str | Path,
    model: str | None = None,
    base: Base | None = None,
    inputs: Sequence[str] | None = None,
    recipe: LoadedRecipe | None = None,
    sink: bool = True,
    chunk_tokens: int | None = None,
    texts: int = 256,
    text_tokens: int = 48,
    steps: int = 300,
    batch_size: int = 8,
    learning_rate: float = 0.1,
    seed: int = 0,
    fresh: bool = False,
    observer: RunObserver | None = None,
) -> Distilled:
    """Train a prefix of `tokens` virtual tokens to stand for `document`, as `ptkit distill` does.

    out: folder of the result; a distillation that was stopped there goes on, a finished one is
        read back
    model: the base's id, default the recipe's or `tiny-en`; base: a loaded one instead
    inputs: what the texts begin with, at least three
    recipe: take its task's inputs, and its template for the adapter; default: pieces of the
        document and a few words of none
    sink: the document is read after the base's begin-of-text token, which stays frozen as the
        first virtual token
    chunk_tokens: the most tokens of the document that are in view at a time; default: as many as
        the base has positions for
    texts: to learn from (half as many more are written to choose the best step and to judge);
        text_tokens: of each, at most
    learning_rate: AdamW's, in units of the start's size, as `prefix_tuning`'s
    fresh: delete what is in the folder and start over

    It starts from the keys and values of the document's first tokens. Raises UserError, DataError
    or ModelError, before anything is trained, for what cannot be carried out.
    """
    observer, folder = observer or RunObserver(), Path(out)
    section = _section(tokens, sink=sink, learning_rate=learning_rate)
    if inputs is not None and recipe is not None:
        raise UserError(
            "the texts begin either with inputs (--inputs) or with those of a recipe (--recipe)"
        )
    if base is None:
        named = {"id": model} if model else recipe.recipe.model.model_dump() if recipe else {}
        base = load_base(**named)
    _require_causal(base)
    beginnings = None
    if recipe is not None:
        beginnings = _of_recipe(recipe, base)
    elif inputs is not None:
        beginnings = _of_lines(inputs, base)
    room = longest_opening(base, beginnings) + text_tokens
    read = read_in_chunks(base, document, sink=sink, room=room, chunk_tokens=chunk_tokens)
    _require_shorter(read, tokens, room, base)
    settings = _settings(steps, batch_size)
    begun = read.begun(base)
    if fresh:  # not before all that may be refused
        start_over(folder)
    with held(folder):
        open_run_folder(folder / IDENTITY, {
            **({"lead": begun} if begun else {}),
            "document": hashlib.sha256(document.encode()).hexdigest(),
            "base": base.fingerprint,
            "dtype": str(base.model.dtype),
            "method": section.model_dump(),
            "inputs": hashlib.sha256(json.dumps(beginnings).encode()).hexdigest(),
            "chunks": len(read.chunks),
            "texts": texts,
            "text_tokens": text_tokens,
            "train": settings.model_dump(exclude=TrainSection.NOT_OF_RESULT),
            "seed": seed,
        }, WHAT, alone=True)  # fmt: skip
        if (folder / "record.json").exists():
            remove_checkpoints(folder)  # it may have been killed just after its record
            return Distilled.read(folder)
        teachers = read.compiled(base)
        studied = study(
            base, read, teachers, folder / "texts", texts=texts, tokens=text_tokens, seed=seed,
            inputs=beginnings, report=observer.writing,
        )  # fmt: skip
        first = compile_tokens(base.model, torch.tensor(read.ids[:tokens]))
        adapter = PrefixTuning.from_prefix(first, base, section)
        observer.cell_started(folder.name, steps)
        (progress,) = fit([
            Job(
                adapter, studied.train, studied.validation, settings, learning_rate, seed, folder,
                observer.stepped, beta2=section.beta2,
                teacher=Teacher(base, teachers, settings.context_cache_mb * 10**6, begun),
            )
        ])  # fmt: skip
        prefix = adapter.prefix().detach()
        figures = {
            name: measure_divergence(base, studied.test, teachers, student, lead=begun)
            for name, student in ((NOTHING, None), (FIRST_TOKENS, first), (DISTILLED, prefix))
        }
        record = _record(folder, read, prefix, studied, figures, progress)
        task = None if recipe is None else recipe.recipe.task
        info = _info(base, section, document, record, task, adapter, seed)
        write_adapter(record.adapter, replace(adapter.files(), info=info), replace=True)
        _RECORD.write(folder / "record.json", record)
        remove_checkpoints(folder)
        for place in (folder, folder / "texts"):
            atomic.remove_leftovers(place)
        return record


def start_over(folder: Path) -> None:
    """Delete the distillation in `folder`. Raises UserError when it holds something else."""
    delete_run_folder(folder / IDENTITY, WHAT)


def _section(tokens: int, *, sink: bool, learning_rate: float) -> PrefixTuningSection:
    with _refusing(f"a prefix of {tokens} tokens"):
        return PrefixTuningSection(
            kind="prefix_tuning",
            num_virtual_tokens=tokens,
            sink=sink,
            learning_rate=learning_rate,
        )


def _settings(steps: int, batch_size: int) -> TrainSection:
    every = max(1, min(25, steps // 4))
    with _refusing("training"):
        return TrainSection(
            steps=steps,
            batch_size=batch_size,
            warmup_steps=max(0, min(20, steps // 10)),
            eval_every=every,
            save_every=every,
        )


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Make a setting that is not allowed a UserError."""
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        where = "".join(f"`{part}`: " for part in first["loc"])
        reason = str(first["msg"]).removeprefix("Value error, ")
        raise UserError(f"{what}: {where}{reason}") from error


def _require_causal(base: Base) -> None:
    if base.encoder_decoder or base.head is not None:
        raise ModelError(
            f"{base.id} is no causal language model; a document is distilled for models that go "
            "on with a text"
        )
    if has_state(base.model):
        raise ModelError(
            f"{base.id} has layers that keep a running state; what a document leaves there is not "
            "in keys and values, so the teacher would not have it in view"
        )


def _require_shorter(document: Document, tokens: int, room: int, base: Base) -> None:
    """Raise UserError for a prefix longer than the document, ModelError for one the base has not
    the positions for."""
    if tokens > len(document.ids):
        raise UserError(
            f"the document has {len(document.ids)} tokens, a prefix of {tokens} would be longer: "
            "lower --tokens"
        )
    most = base.max_positions
    if most is not None and tokens + room > most:
        raise ModelError(
            f"too few positions: {base.id} has {most}, a prefix of {tokens} tokens leaves "
            f"{max(0, most - tokens)}, and the texts take up to {room}; lower --tokens"
        )


def _of_lines(lines: Sequence[str], base: Base) -> Inputs:
    """The lines as token ids; of every ten, one is kept to validate and two to judge."""
    ids = base.encode(lines)
    if len(ids) < 3 or not all(ids):
        raise UserError(
            f"found {sum(map(bool, ids))} inputs; at least three are needed, one to learn from, "
            "one to choose the best step, one to judge"
        )
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0)).tolist()
    mixed = [ids[i] for i in order]
    test, validation = max(1, len(ids) // 5), max(1, len(ids) // 10)
    return {
        "test": mixed[:test],
        "validation": mixed[test : test + validation],
        "train": mixed[test + validation :],
    }


def _of_recipe(loaded: LoadedRecipe, base: Base) -> Inputs:
    """The inputs of a recipe's rows, in its template, by its splits."""
    task = loaded.recipe.task
    if isinstance(task, HeadedTask):
        raise UserError(
            f"the recipe `{loaded.recipe.name}` has a task of `kind: {task.kind}`, whose model "
            "writes no text; use a recipe that answers in words"
        )
    if isinstance(task, ConversationTask):
        task = with_template_read(task, loaded.folder)
    data = load_task(task, loaded.folder)
    found = {}
    for split in SPLITS:
        rows = encode_examples(getattr(data, split), base.tokenizer, task)
        require_embedded(base, rows, task)
        found[split] = [row.input_ids for row in rows if row.input_ids]
    return found


def _record(
    folder: Path,
    document: Document,
    prefix: KVPrefix,
    texts: StudySplits,
    figures: dict[str, Divergence],
    progress: Progress,
) -> Distilled:
    return Distilled(
        folder=folder,
        tokens=prefix.virtual_tokens,
        document_tokens=len(document.ids),
        chunks=len(document.chunks),
        bytes=prefix.nbytes,
        document_bytes=prefix.nbytes // prefix.virtual_tokens * len(document.ids),
        texts={name: len(getattr(texts, name)) for name in ("train", "validation", "test")},
        figures=figures,
        steps=progress.step,
        best_step=progress.best_step,
        seconds=progress.seconds,
        curve=[CurvePoint.model_validate(point) for point in progress.curve],
    )


def _info(
    base: Base,
    section: PrefixTuningSection,
    document: str,
    record: Distilled,
    task: Task | None,
    adapter: PrefixTuning,
    seed: int,
) -> AdapterInfo:
    """What `ptkit.json` says; the document itself is not part of it."""
    settings = section.model_dump(mode="json", exclude={"start", "start_text", "start_adapter"})
    info = AdapterInfo(
        base=base_info(base),
        method=MethodInfo.model_validate(settings),
        distilled=DistilledInfo(
            document=DocumentInfo(
                sha256=hashlib.sha256(document.encode()).hexdigest(),
                tokens=record.document_tokens,
                chunks=record.chunks,
            ),
            texts=record.texts,
            bytes=record.bytes,
            document_bytes=record.document_bytes,
            figures={
                name: ClosenessInfo(
                    kl=d.kl.recorded, agreement=d.agreement.recorded, tokens=d.tokens
                )
                for name, d in record.figures.items()
            },
        ),
        seed=seed,
        trainable_parameters=adapter.trainable_parameters,
        train_steps=record.steps,
        dtype="float32",
        versions=versions(),
    )
    return info if task is None else info.updated(task=task_info(task))
