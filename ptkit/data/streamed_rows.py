"""Rows drawn from a stream of the Hub: as many as the recipe limits, kept on this machine.

`datasets` streams the files and shuffles them through its buffer. What was drawn lies in
`$PTKIT_CACHE/streamed`. So every epoch, and a resumed run, reads the same rows. The draw depends
on the files' revision and the recipe only. A file that was deleted is streamed again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from typing import Any

import datasets
import pyarrow as pa
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.arrow_writer import ArrowWriter

from ptkit.data.splits import SEED
from ptkit.formats import atomic
from ptkit.formats.cache_home import cache_home, make_room
from ptkit.recipe.tasks import DataSection

SPLITS = ("train", "validation", "test")
#: Rows among which the next one is drawn.
SHUFFLE_BUFFER = 10_000
#: The least recently used files go when all take more bytes than this.
MOST_BYTES = 20_000_000_000


def streamed(builder: Any, section: DataSection) -> DatasetDict:
    """The rows of each split that `section` names and the data set of `builder` has, up to
    `section.limits`. Raises what `datasets` and the network raise."""
    streams = builder.as_streaming_dataset()
    found = {}
    for split in SPLITS:
        name = getattr(section.splits, split)
        if name in streams:
            # Splits of one name are read from one stream: as many rows as one of them needs.
            named = [s for s in SPLITS if getattr(section.splits, s) == name]
            limits = [getattr(section.limits, s) for s in named]
            limit = None if None in limits else max(limits)
            found[name] = _drawn(streams[name], builder, name, limit, section.draw == "first")
    # Messages list the splits of the source, those that are not read too.
    others = {str(name): Dataset.from_dict({}) for name in streams if name not in found}
    return DatasetDict({**found, **others})


def _drawn(
    stream: IterableDataset, builder: Any, split: str, limit: int | None, in_order: bool
) -> Dataset:
    """The first rows of the stream, in its own order or shuffled."""
    # The names of files have their revision.
    source = [builder.hash, builder.config_id, repr(builder.config.data_files), split]
    told = json.dumps([*source, limit, in_order, SEED, SHUFFLE_BUFFER, datasets.__version__])
    path = cache_home() / "streamed" / f"{hashlib.sha256(told.encode()).hexdigest()[:32]}.arrow"
    with contextlib.suppress(OSError, pa.ArrowInvalid):
        kept = Dataset.from_file(str(path))
        path.touch()  # used just now
        return kept
    if not in_order:
        stream = stream.shuffle(seed=SEED, buffer_size=SHUFFLE_BUFFER)
    if limit is not None:
        stream = stream.take(limit)
    with atomic.file(path) as file:
        writer: Any = ArrowWriter(features=stream.features, stream=file)
        for row in stream:
            writer.write(row)
        writer.finalize(close_stream=False)
    make_room(path, MOST_BYTES)
    return Dataset.from_file(str(path))
