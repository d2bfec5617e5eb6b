"""Every error of the server has OpenAI's form, and says what is wrong, where, and the fix."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage
from starlette.testclient import TestClient

from ptkit.serve.build import build_app

ROOT = Path(__file__).resolve().parents[1]
COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
ASK = {"model": "facts-prefix", "prompt": "kind[boat]", "max_tokens": 3}
TALK = {"model": "facts-prefix", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
JSON = {"content-type": "application/json"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """The shipped adapters, and one that says that it is of another base."""
    folder = tmp_path_factory.mktemp("served") / "adapters"
    shutil.copytree(ROOT / "adapters", folder)
    other = folder / "other"
    shutil.copytree(folder / "facts-prefix", other)
    info = json.loads((other / "ptkit.json").read_text())
    info["base"] |= {"fingerprint": "0" * 16, "parameters": 124_439_808}
    (other / "ptkit.json").write_text(json.dumps(info))
    app = build_app("tiny-en", folder, max_batch=4, kv_bytes=10**8)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


def error_of(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    body = response.json()
    assert body.keys() == {"error"}
    error: dict[str, Any] = body["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("content", "headers", "message"),
    [
        (b"nojson", JSON, "the request's body is no JSON: Expecting value, at character 0"),
        (b'{"model": ', JSON, "no JSON: Expecting value, at character 10"),
        (b"[" * 100_000, JSON, "cannot be read as JSON"),
        (b"", JSON, "has no body; send a JSON object"),
        (b"[1]", JSON, "is no JSON object"),
        (b"null", JSON, "is no JSON object"),
        (json.dumps(ASK).encode(), {}, "is not sent as JSON; send a JSON object with the header"),
    ],
)
def test_a_body_that_is_no_json_object_is_called_that(
    server: TestClient, content: bytes, headers: dict[str, str], message: str
) -> None:
    error = error_of(server.post(COMPLETIONS, content=content, headers=headers), 400)
    assert message in error["message"]
    assert (error["type"], error["param"]) == ("invalid_request_error", None)


@pytest.mark.parametrize(
    ("changed", "param", "message"),
    [
        ({"prompt": {"a": 1}}, "prompt", "a valid string; or Input should be a valid list"),
        ({"prompt": ["a", 1]}, "prompt.1", "Input should be a valid string"),
        ({"stop": 3}, "stop", "a valid string; or Input should be a valid list"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"suffix": "x"}, "suffix", "`suffix` is not supported"),
        ({"a b": 1}, "a b", "`a b` is not known to this server"),
        ({"max_tokens": 4_000}, "max_tokens", "this server writes at most 1024"),
        ({"stream_options": {"x": 1}}, "stream_options.x", "is not known to this server"),
    ],
)
def test_a_wrong_parameter_is_named(
    server: TestClient, changed: dict[str, Any], param: str, message: str
) -> None:
    error = error_of(server.post(COMPLETIONS, json={**ASK, **changed}), 400)
    assert error["param"] == param
    assert message in error["message"]
    assert "constrained" not in error["message"]


def test_the_part_of_a_message_that_is_not_understood_is_named(server: TestClient) -> None:
    content = [{"type": "image_url", "image_url": {"url": "x"}}]
    body = {**TALK, "messages": [{"role": "user", "content": content}]}
    error = error_of(server.post(CHAT, json=body), 400)
    assert error["param"] == "messages.0.content.0.type"
    assert "Input should be 'text'" in error["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "message"),
    [
        ("POST", "/v1/responses", 404, "as `messages` to POST /v1/chat/completions"),
        ("POST", "/v1/embeddings", 404, "it makes no embeddings"),
        ("POST", "/completions", 404, "did you mean /v1/completions?"),
        ("GET", "/docs", 404, "GET /openapi.json"),
        ("POST", "/v1/audio/speech", 404, "POST /v1/chat/completions"),
        ("GET", COMPLETIONS, 405, "this path takes POST"),
    ],
)
def test_what_is_not_served_is_told_with_what_is(
    server: TestClient, method: str, path: str, status: int, message: str
) -> None:
    error = error_of(server.request(method, path, json={}, follow_redirects=False), status)
    assert error["message"].startswith(f"{method} {path} is not served here; ")
    assert message in error["message"]
    assert error["code"] == ("unknown_url" if status == 404 else None)


def test_codes_are_openais(server: TestClient) -> None:
    unknown = error_of(server.post(COMPLETIONS, json={**ASK, "model": "facts-prefx"}), 404)
    assert (unknown["code"], unknown["param"]) == ("model_not_found", "model")
    long = error_of(server.post(COMPLETIONS, json={**ASK, "prompt": "x " * 3_000}), 400)
    assert long["code"] == "context_length_exceeded"
    gone = error_of(server.post("/v1/unload_adapter", json={"name": "gone"}), 404)
    assert (gone["code"], gone["param"]) == ("model_not_found", None)


def test_an_adapter_of_another_base_is_refused_with_the_keys_that_differ(
    server: TestClient,
) -> None:
    for path, body in (
        (COMPLETIONS, {**ASK, "model": "other"}),
        ("/v1/load_adapter", {"name": "again", "path": "other"}),
    ):
        error = error_of(server.post(path, json=body), 422)
        assert error["code"] == "adapter_refused"
        assert "`parameters`: 124,439,808, here 6,819,456" in error["message"]
        assert "`fingerprint`: 0000000000000000, here " in error["message"]
        assert "`tokenizer`" not in error["message"]


def test_the_base_is_refused_as_a_part_of_an_ensemble(server: TestClient) -> None:
    for model in ("facts-prefix,tiny-en", "tiny-en, facts-prefix"):
        error = error_of(server.post(COMPLETIONS, json={**ASK, "model": model}), 400)
        assert error["message"].startswith("`tiny-en` is the base, which cannot answer together")


def test_an_adapter_of_other_weights_of_the_name_is_told_so(server: TestClient) -> None:
    error = error_of(server.post(COMPLETIONS, json={**ASK, "model": "other"}), 422)
    assert "made for `tiny-en` with other weights than the one that is loaded" in error["message"]
    assert "not for `tiny-en`" not in error["message"]


def events(server: TestClient, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    lines = server.post(path, json={**body, "stream": True}).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


@pytest.mark.parametrize(("path", "body"), [(COMPLETIONS, ASK), (CHAT, TALK)])
def test_a_stream_counts_tokens_where_it_is_asked_to(
    server: TestClient, path: str, body: dict[str, Any]
) -> None:
    plain = events(server, path, body)
    assert plain
    assert all("usage" not in event for event in plain)
    *pieces, last = events(server, path, {**body, "stream_options": {"include_usage": True}})
    assert len(pieces) == len(plain)
    assert all(piece["usage"] is None for piece in pieces)
    assert (last["choices"], last["usage"]["completion_tokens"]) == ([], body["max_tokens"])
    if path == CHAT:
        deltas = [event["choices"][0]["delta"] for event in plain]
        assert deltas[0] == {"role": "assistant", "content": ""}
        assert all(delta.keys() == {"content"} for delta in deltas[1:])


SHARED_NULLS = dict.fromkeys([
    "n", "stream", "stream_options", "temperature", "template", "top_p", "seed", "stop",
    "presence_penalty", "frequency_penalty", "user", "metadata", "ignore_eos", "logprobs",
    "logit_bias", "safety_identifier", "prompt_cache_key",
])  # fmt: skip


def answered(response: Any) -> Any:
    assert response.status_code == 200, response.text
    return [
        {key: value for key, value in choice.items() if key != "index"}
        for choice in response.json()["choices"]
    ]


@pytest.mark.parametrize(
    ("path", "body", "own"),
    [
        (COMPLETIONS, ASK, {"best_of": None, "echo": None, "suffix": None}),
        (CHAT, TALK, {"top_logprobs": None, "max_completion_tokens": None, "tools": None}),
    ],
)
def test_a_parameter_that_is_null_is_as_if_it_were_left_out(
    server: TestClient, path: str, body: dict[str, Any], own: dict[str, None]
) -> None:
    plain = answered(server.post(path, json=body))
    for name in (*SHARED_NULLS, *own):
        assert answered(server.post(path, json={**body, name: None})) == plain, name
    assert answered(server.post(path, json={**body, **SHARED_NULLS, **own})) == plain
    options = {"include_usage": None, "include_obfuscation": None}
    assert events(server, path, {**body, "stream_options": options})
    refused = error_of(server.post(path, json={**body, "model": None}), 400)
    assert refused["param"] == "model"


def test_an_answer_can_be_given_back_as_clients_dump_it(server: TestClient) -> None:
    given = ChatCompletionMessage(role="assistant", content="Yes.").model_dump()
    assert given["refusal"] is None
    talk = [*TALK["messages"], {"role": "assistant", "content": "Yes."}, *TALK["messages"]]
    plain = answered(server.post(CHAT, json={**TALK, "messages": talk}))
    vllm = {**given, "tool_calls": [], "reasoning_content": None, "annotations": []}
    for message in (given, vllm):
        body = {**TALK, "messages": [talk[0], message, talk[2]]}
        assert answered(server.post(CHAT, json=body)) == plain
    called = {**given, "tool_calls": [{"id": "x"}]}
    error = error_of(server.post(CHAT, json={**TALK, "messages": [talk[0], called]}), 400)
    assert error["param"] == "messages.1.tool_calls"


def test_nulls_beside_a_text_to_label_and_an_adapter_to_load(server: TestClient) -> None:
    ask = {"model": "routing-prefix", "input": "Where is my order?"}
    plain = server.post("/v1/classify", json=ask).json()["data"]
    nulls = {"user": None, "priority": None}
    assert server.post("/v1/classify", json={**ask, **nulls}).json()["data"] == plain
    body = {"lora_name": "nulls", "lora_path": "facts-prefix", "hub": None, "load_inplace": None}
    assert server.post("/v1/load_lora_adapter", json=body).status_code == 200
    body = {"lora_name": "nulls", "lora_int_id": None, "path": None}
    assert server.post("/v1/unload_lora_adapter", json=body).status_code == 200


def test_vllms_load_inplace_replaces_what_is_served_and_its_number_is_taken(
    server: TestClient,
) -> None:
    load, unload = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"
    body = {"lora_name": "place", "lora_path": "facts-prefix", "load_inplace": True}
    ask = {**ASK, "model": "place", "max_tokens": 12, "template": False}
    assert server.post(load, json=body).json() == {"name": "place", "change": "loaded"}
    first = answered(server.post(COMPLETIONS, json=ask))
    assert first == answered(server.post(COMPLETIONS, json={**ask, "model": "facts-prefix"}))
    other = {**body, "lora_path": "facts-prompt"}
    assert server.post(load, json=other).json() == {"name": "place", "change": "swapped"}
    second = answered(server.post(COMPLETIONS, json=ask))
    assert second == answered(server.post(COMPLETIONS, json={**ask, "model": "facts-prompt"}))
    assert first != second
    again = error_of(server.post(load, json={**other, "load_inplace": False}), 400)
    assert "is served already" in again["message"]
    gone = server.post(unload, json={"lora_name": "place", "lora_int_id": 7})
    assert gone.json() == {"name": "place", "change": "unloaded"}


def test_models_say_since_when_they_are_served(server: TestClient) -> None:
    models = server.get("/v1/models").json()["data"]
    assert all(time.time() - 600 < model["created"] <= time.time() for model in models)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([*ASK, "stop", "messages", "n", "logprobs", "x-y"]), VALUES, st.booleans())
def test_any_wrong_value_is_refused_by_the_name_of_its_parameter(
    server: TestClient, name: str, value: Any, chat: bool
) -> None:
    body = {**(TALK if chat else ASK), name: value, "temperature": 9}
    error = error_of(server.post(CHAT if chat else COMPLETIONS, json=body), 400)
    first = str(error["param"]).split(".")[0]
    assert first in (name, "temperature")
    assert f"`{error['param']}`" in error["message"]
