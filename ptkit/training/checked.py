"""What a run would refuse of a recipe, found without its base model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import try_to_load_from_cache
from transformers import PreTrainedTokenizerBase

from ptkit.data.encoded import EncodedExample
from ptkit.data.summary import chat_lines, data_lines
from ptkit.data.task import TaskData
from ptkit.data.token_cache import encode_cached, encode_conversations
from ptkit.errors import ModelError
from ptkit.recipe.load import LoadedRecipe
from ptkit.recipe.tasks import ConversationTask, Task
from ptkit.runtime.named_models import source_of
from ptkit.runtime.tokenization import load_tokenizer
from ptkit.training.cell_folder import named_adapters
from ptkit.training.experiment import read_data
from ptkit.training.ready import require_supported


def checked(loaded: LoadedRecipe, tokenizer: PreTrainedTokenizerBase | None = None) -> list[str]:
    """Check all of a recipe that can be checked without loading its base, as a run would.

    Files are read; their columns, labels, templates and metrics are checked, and so are adapters to
    start from. With the base's tokenizer on this machine, rows become token ids. Data of the Hub
    are not fetched. Returns what was decided, in lines. Raises UserError as a run does.

    tokenizer: the base's, where a program has loaded it
    """
    require_supported(loaded.recipe, loaded.recipe.methods)
    for method in loaded.recipe.methods:
        named_adapters(method, loaded.folder)
    hub = loaded.recipe.task.data.hub
    if hub:
        return [f"data: `{hub}` of the Hub, not read here"]
    loaded, data, _ = read_data(loaded)
    task = loaded.recipe.task
    if tokenizer is None:
        tokenizer = _tokenizer_here(loaded.recipe.model.id, loaded.recipe.model.revision)
    if tokenizer is None:
        told = f"the tokenizer of `{loaded.recipe.model.id}` is not here: lengths are not checked"
        return [*data_lines(task, data), told]
    encoded, notes = _encoded(task, data, tokenizer)
    return data_lines(task, data, encoded) + notes


def _encoded(
    task: Task, data: TaskData, tokenizer: PreTrainedTokenizerBase
) -> tuple[dict[str, Sequence[EncodedExample]], list[str]]:
    """The training and validation rows as token ids, and what was decided about conversations."""
    splits = {"train": data.train, "validation": data.validation}
    encode_cached(data.test, tokenizer, task)
    if not isinstance(task, ConversationTask):
        return {name: encode_cached(rows, tokenizer, task) for name, rows in splits.items()}, []
    encoded: dict[str, Sequence[EncodedExample]] = {}
    notes: list[str] = []
    for name, examples in splits.items():
        rows = encode_conversations(examples, tokenizer, task)
        encoded[name] = rows.encoded
        notes += chat_lines(task, name, rows.notes)
    return encoded, notes


def _tokenizer_here(id: str, revision: str | None) -> PreTrainedTokenizerBase | None:
    """The tokenizer of the model `id`, where nothing has to be fetched for it."""
    try:
        source = source_of(id, revision)
    except ModelError:  # a known name that was not fetched yet
        return None
    cached = Path(source).exists() or isinstance(
        try_to_load_from_cache(source, "tokenizer_config.json", revision=revision), str
    )
    return load_tokenizer(id, revision) if cached else None
