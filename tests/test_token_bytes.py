"""The bytes of tokens in log-probabilities: those of characters that span tokens, too."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.testclient import TestClient
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from ptkit.bank import AdapterBank
from ptkit.runtime.base_model import Base, load_base
from ptkit.runtime.model_names import TINY_EN
from ptkit.serve.answer import Answer, Endings, StatLogger
from ptkit.serve.build import build_app
from ptkit.serve.decoding import DecodeState
from ptkit.serve.sampling import Token
from ptkit.serve.scheduler import Scheduler
from ptkit.serve.token_bytes import CharacterOffsets, TokenBytes

TEXT = "It is 20 °C, 😀 né!"


def sentencepiece() -> PreTrainedTokenizerFast:
    """A vocabulary as Llama 2 has one: pieces, and bytes where there is none."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁the", "a", "b", "▁b"]
    tokenizer = Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)}, [("▁", "b")], unk_token="<unk>",
            byte_fallback=True,
        )
    )  # fmt: skip
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


SENTENCEPIECE = sentencepiece()


@pytest.fixture(scope="module")
def base() -> Base:
    return load_base(TINY_EN, device="cpu")


@given(st.text(max_size=40))
def test_the_bytes_of_all_tokens_are_the_texts(base: Base, text: str) -> None:
    text = text.encode(errors="replace").decode()
    ids = base.encode_part(text)
    named = TokenBytes(base.tokenizer)
    assert b"".join(named[id] for id in ids).decode() == base.tokenizer.decode(ids)


@given(st.text(st.sampled_from("ab °é😀"), min_size=1, max_size=20))
def test_bytes_that_stand_for_no_piece_are_themselves(text: str) -> None:
    ids = SENTENCEPIECE(text, add_special_tokens=False)["input_ids"]
    named = TokenBytes(SENTENCEPIECE)
    assert b"".join(named[id] for id in ids).decode() == f" {text}"


def test_every_token_has_a_name_of_its_own(base: Base) -> None:
    """Of parts of characters, too: the likeliest tokens are told by their names."""
    named = TokenBytes(base.tokenizer)
    parts = [i for i in range(len(base.tokenizer)) if "�" in base.tokenizer.decode([i])]
    assert len(parts) > 100
    assert len({named.name(i) for i in parts}) == len({named[i] for i in parts})
    first = base.encode_part("😀")[0]
    assert named.name(first) == r"\xf0"
    assert named.long_name(first) == r"bytes:\xf0"
    assert named.long_name(base.encode_part("the")[0]) == "the"


@given(st.text(max_size=20), st.data())
def test_a_token_begins_after_the_characters_that_are_complete(text: str, data: Any) -> None:
    raw = text.encode(errors="replace")
    cuts = sorted(data.draw(st.sets(st.integers(0, len(raw)))) | {0, len(raw)})
    offsets = CharacterOffsets()
    for start, end in pairwise(cuts):
        assert offsets.place(raw[start:end]) == len(raw[:start].decode(errors="ignore"))


#: A token's id -> the ids and log-probabilities of the likeliest, likeliest first.
Top = Callable[[int], tuple[tuple[int, float], ...]]


class Scripted(Endings):
    """Writes the same tokens for every answer.

    top: of a token's id, the likeliest ones that are told
    """

    longest, running, answers = None, 0, ()

    def __init__(
        self,
        ids: Sequence[int],
        base: Base,
        scheduler: Scheduler,
        top: Top = lambda id: ((id, -0.5), (id + 1, -1.5)),
    ) -> None:
        super().__init__(None)
        self._ids, self._base, self._scheduler, self._top = ids, base, scheduler, top

    def require(self, answer: Answer) -> None: ...

    def by_name(self) -> Counter[str]:
        return Counter()

    def begin(self, answers: Sequence[Answer]) -> None:
        for answer in answers:
            state = DecodeState(answer, self._base, frozenset())
            for id in self._ids:
                state.take(Token(id, -0.5, self._top(id)))
            state.end("stop")
            self._scheduler.release([answer])

    def step(self) -> None:
        with self._scheduler.changed:
            self._scheduler.changed.wait_for(lambda: self._scheduler.stopped, 0.01)

    def drop(self, gone: Callable[[Answer], bool]) -> None: ...

    def clear(self) -> None: ...

    def close(self) -> None: ...


@contextmanager
def writing(base: Base, ids: Sequence[int], *top: Top) -> Iterator[TestClient]:
    """A server whose answers are `ids`."""

    def made(bank: AdapterBank, scheduler: Scheduler, stats: StatLogger) -> Any:
        return Scripted(ids, bank.base, scheduler, *top)

    with TestClient(build_app(base, executor=made)) as client:
        yield client


@pytest.fixture(scope="module")
def client(base: Base) -> Iterator[TestClient]:
    with writing(base, base.encode_part(TEXT)) as client:
        yield client


def told(client: TestClient, route: str, **body: Any) -> list[dict[str, Any]]:
    """The choices of the response, or those of each event."""
    body = {"model": TINY_EN, "max_tokens": 64, **body}
    response = client.post(f"/v1/{route}", json=body)
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        return response.json()["choices"]
    lines = [line for line in response.text.splitlines() if line.startswith("data: {")]
    events = [json.loads(line.removeprefix("data: ")) for line in lines]
    return [choice for event in events for choice in event["choices"]]


@pytest.mark.parametrize("stream", [False, True])
def test_a_chats_bytes_are_those_of_its_message(client: TestClient, stream: bool) -> None:
    messages = [{"role": "user", "content": "How warm?"}]
    choices = told(
        client, "chat/completions", messages=messages, logprobs=True, top_logprobs=2, stream=stream
    )  # fmt: skip
    parts = [choice.get("message") or choice["delta"] for choice in choices]
    assert "".join(part["content"] for part in parts) == TEXT
    tokens = [t for c in choices for t in (c["logprobs"] or {"content": []})["content"]]
    assert bytes(byte for token in tokens for byte in token["bytes"]).decode() == TEXT
    assert len(tokens) > len(TEXT.split()) + 3
    for token in tokens:
        assert token["bytes"] == token["top_logprobs"][0]["bytes"]
        assert len({top["token"] for top in token["top_logprobs"]}) == 2


@pytest.mark.parametrize("stream", [False, True])
def test_a_completions_offsets_count_whole_characters(client: TestClient, stream: bool) -> None:
    choices = told(client, "completions", prompt="How warm?", logprobs=2, stream=stream)
    assert "".join(choice["text"] for choice in choices) == TEXT
    scores = [c["logprobs"] for c in choices if c["logprobs"]["tokens"]]
    tokens = [token for score in scores for token in score["tokens"]]
    offsets = [offset for score in scores for offset in score["text_offset"]]
    assert sum(token.startswith("bytes:\\x") for token in tokens) >= 4
    assert all(len(top) == 2 for score in scores for top in score["top_logprobs"])
    for token, offset in zip(tokens, offsets, strict=True):
        if not token.startswith("bytes:"):
            assert TEXT[offset:].startswith(token)


@pytest.mark.parametrize("stream", [False, True])
def test_a_token_that_is_not_shown_takes_no_place_in_the_text(base: Base, stream: bool) -> None:
    end = base.tokenizer.eos_token_id
    before, after = base.encode_part("One boat"), base.encode_part(" and a red mill.")
    asked = {"stream": stream, "ignore_eos": True}
    with writing(base, [end, *before, end, end, *after]) as client:
        choices = told(client, "completions", prompt="How?", logprobs=1, **asked)
        messages = [{"role": "user", "content": "How?"}]
        chat = told(client, "chat/completions", messages=messages, logprobs=True, **asked)
    text = "".join(choice["text"] for choice in choices)
    assert text == "One boat and a red mill."
    scores = [c["logprobs"] for c in choices if c["logprobs"]["tokens"]]
    tokens = [token for score in scores for token in score["tokens"]]
    offsets = [offset for score in scores for offset in score["text_offset"]]
    shown = [pair for pair in zip(tokens, offsets, strict=True) if pair[0] != "<|endoftext|>"]
    assert len(tokens) - len(shown) == 3
    assert all(text[offset:].startswith(token) for token, offset in shown)
    assert "".join(token for token, _ in shown) == text
    heard = [t for c in chat for t in (c["logprobs"] or {"content": []})["content"]]
    assert [t["token"] for t in heard] == tokens
    assert b"".join(bytes(t["bytes"] or []) for t in heard).decode() == text
    assert [t["bytes"] for t in heard if t["token"] == "<|endoftext|>"] == [None] * 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_completions_likeliest_tokens_hold_the_one_that_was_chosen(
    base: Base, stream: bool
) -> None:
    ids = base.encode_part("One boat and a red mill.")
    other = base.encode_part(" zebra")[0]
    likelier: Top = lambda id: ((other, -0.1), (other + 1, -0.2))  # noqa: E731
    with writing(base, ids, likelier) as client:
        choices = told(client, "completions", prompt="How?", logprobs=2, stream=stream)
    scores = [c["logprobs"] for c in choices if c["logprobs"]["tokens"]]
    pairs = [
        (t, top) for s in scores for t, top in zip(s["tokens"], s["top_logprobs"], strict=True)
    ]
    assert len(pairs) == len(ids)
    for token, top in pairs:
        assert top[token] == -0.5
        assert sorted(top.values()) == [-0.5, -0.2, -0.1]


def test_of_two_tokens_with_one_name_the_likelier_is_told(
    base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = base.encode_part("One boat")
    twin, other = base.encode_part(" zebra")[0], base.encode_part(" robot")[0]
    own = TokenBytes.__getitem__
    monkeypatch.setattr(
        TokenBytes, "__getitem__", lambda self, id: own(self, {twin: other}.get(id, id))
    )
    top: Top = lambda id: ((id, -0.5), (other, -1.0), (twin, -2.0))  # noqa: E731
    with writing(base, ids, top) as client:
        (choice,) = told(client, "completions", prompt="How?", logprobs=3)
    name = TokenBytes(base.tokenizer).long_name(other)
    assert choice["logprobs"]["top_logprobs"]
    assert all(likely[name] == -1.0 for likely in choice["logprobs"]["top_logprobs"])
