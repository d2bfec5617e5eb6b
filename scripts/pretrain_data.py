"""Data of the pre-training of `tiny-en`: split of the corpus, tokenizer, token caches, batches."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import text_to_text_mix as mix
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END, PAD = "<|endoftext|>", "<|pad|>"
VOCAB, WINDOW = 8192, 512
BLOCK_BYTES, HELD_OUT_EVERY, HELD_OUT_AT = 4096, 100, 50

# Words with their leading space, English contractions, single digits, runs of other signs.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def blocks_of(text: str) -> list[str]:
    """Cuts a text at line ends into blocks of at least 4096 bytes."""
    blocks: list[str] = []
    lines: list[str] = []
    size = 0
    for line in io.StringIO(text):  # `splitlines` would also end one at a U+2028 within a text
        lines.append(line)
        size += len(line.encode())
        if size >= BLOCK_BYTES:
            blocks.append("".join(lines))
            lines, size = [], 0
    if lines:
        blocks.append("".join(lines))
    return blocks


def split_corpus(directory: Path) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(training runs, held-out blocks) by file name; a run lies between two held-out blocks."""
    train: dict[str, list[str]] = {}
    held: dict[str, list[str]] = {}
    for path in sorted(directory.glob("*.txt")):
        blocks = blocks_of(path.read_text(encoding="utf-8"))
        at = HELD_OUT_AT if len(blocks) > HELD_OUT_AT else len(blocks) // 2
        runs: list[list[str]] = [[]]
        held[path.stem] = []
        for index, block in enumerate(blocks):
            if index % HELD_OUT_EVERY == at:
                held[path.stem].append(block)
                runs.append([])
            else:
                runs[-1].append(block)
        train[path.stem] = ["".join(run) for run in runs if run]
    if not train:
        raise SystemExit(f"no *.txt in {directory}")
    return train, held


def mix_lines(train: dict[str, list[str]]) -> list[str]:
    """The lines that the corpus-based tasks of the mix may use: training part only."""
    return mix.usable_lines(
        line
        for name, runs in train.items()
        if any(part in name for part in mix.CORPUS_FILES)
        for run in runs
        for line in run.split("\n")
    )


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        model_max_length=WINDOW,
        clean_up_tokenization_spaces=False,
    )


def encode_all(tokenizer: PreTrainedTokenizerFast, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """Token ids of each text with the end-of-text token after it."""
    source = iter(texts)
    end = tokenizer.eos_token_id
    while batch := list(islice(source, 2000)):
        encoded = tokenizer.backend_tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        for item in encoded:
            yield np.array([*item.ids, end], dtype=np.uint16)


def write_bin(path: Path, parts: Iterable[np.ndarray], limit: int | None = None) -> None:
    """Writes token ids one after the other, up to `limit` of them, in one atomic step."""
    partial, size = path.with_suffix(".partial"), 0
    with partial.open("wb") as file:
        for part in parts:
            file.write(part.tobytes())
            size += len(part)
            if limit is not None and size >= limit:
                break
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def with_random_ids(parts: Iterable[np.ndarray], seed: int) -> Iterator[np.ndarray]:
    """Adds, for one document in sixty, a run of random token ids that is repeated."""
    rng = np.random.default_rng(seed)
    for part in parts:
        yield part
        if rng.random() < 1 / 60:
            run = rng.integers(2, VOCAB, rng.integers(10, 130)).astype(np.uint16)
            yield np.concatenate([run] * (2 if len(run) > 60 else 3) + [part[-1:]])


def prepare(corpus: Path, work: Path, mix_tokens: int, seed: int) -> None:
    """Makes the tokenizer and the token caches in the work directory; keeps what is there."""
    work.mkdir(parents=True, exist_ok=True)
    train, _ = split_corpus(corpus)
    lines = mix_lines(train)
    if not (work / "tokenizer" / "tokenizer.json").exists():
        sample = islice(mix.documents(seed + 2, lines), 8000)
        pieces = (piece for runs in train.values() for run in runs for piece in blocks_of(run))
        train_tokenizer((*pieces, *sample)).save_pretrained(work / "tokenizer")
    tokenizer = load_tokenizer(work)
    if not (work / "corpus.bin").exists():
        # Cut only at block borders for speed; the end token stands between runs alone.
        def runs() -> Iterator[np.ndarray]:
            for texts in train.values():
                for run in texts:
                    parts = [p[:-1] for p in encode_all(tokenizer, blocks_of(run))]
                    yield np.append(np.concatenate(parts), np.uint16(tokenizer.eos_token_id))

        write_bin(work / "corpus.bin", runs())
    for name, offset, size in (("mix", 0, mix_tokens), ("mix_held", 1, 40_000)):
        if not (work / f"{name}.bin").exists():
            texts = mix.documents(seed + offset, lines)
            parts = with_random_ids(encode_all(tokenizer, texts), seed + offset)
            write_bin(work / f"{name}.bin", parts, size)


def load_tokenizer(work: Path) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")


class Batches:
    """The batch of every step as a function of seed and step, so that a resumed run is exact."""

    def __init__(self, work: Path, batch: int, mix_share: float, seed: int) -> None:
        self.corpus = np.memmap(work / "corpus.bin", dtype=np.uint16, mode="r")
        self.mix = np.memmap(work / "mix.bin", dtype=np.uint16, mode="r")
        self.batch, self.share, self.seed = batch, mix_share, seed
        self.orders: dict[tuple[int, int], tuple[int, np.ndarray]] = {}

    def window(self, tokens: np.ndarray, which: int, index: int) -> np.ndarray:
        """Window number `index` of an endless series of shuffled passes over `tokens`."""
        count = len(tokens) // WINDOW - 2
        epoch, place = divmod(index, count)
        if (which, epoch) not in self.orders:
            digest = hashlib.sha256(f"{self.seed}-{which}-{epoch}".encode()).digest()
            rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
            self.orders[which, epoch] = (int(rng.integers(WINDOW)), rng.permutation(count))
        offset, order = self.orders[which, epoch]
        start = offset + int(order[place]) * WINDOW
        return np.asarray(tokens[start : start + WINDOW + 1], dtype=np.int64)

    def __call__(self, step: int) -> np.ndarray:
        """[batch, 513] token ids."""
        low, high = int(step * self.batch * self.share), int((step + 1) * self.batch * self.share)
        rows = [self.window(self.mix, 1, i) for i in range(low, high)]
        first, last = step * self.batch - low, (step + 1) * self.batch - high
        rows += [self.window(self.corpus, 0, i) for i in range(first, last)]
        return np.stack(rows)
