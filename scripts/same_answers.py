"""Whether adapters of conversations answer alike wherever they are asked.

    python scripts/same_answers.py runs/persona-chat-smollm2/prefix_tuning-seed0 [RUN ...]

Each run is asked the first test conversations of the built-in set `persona-chat`. They are asked by
`ptkit generate`, by `ptkit chat`, and by the server of `ptkit serve`. Plain PEFT is asked on the
exported adapter, and plain transformers on its exported keys and values. Both run in a process that
never imports ptkit, and put the messages into the base's own chat template. Answers are greedy. A
line for each run and way says how many of them are those of `ptkit generate`. The exit code is 1
where one differs.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ptkit.formats.places import find_adapter

Messages = list[dict[str, str]]

#: Run without ptkit: reads messages and writes answers, behind PEFT's model or a file of keys.
PLAIN = """
import importlib.util, json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

way, base, adapter, asked, longest = sys.argv[1:6]
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
longest = int(longest)
if way == "peft":
    from peft import PeftModel
    model = PeftModel.from_pretrained(model, adapter).eval()
else:
    folder, _, name = adapter.rpartition("/")
    spec = importlib.util.spec_from_file_location("client", folder + "/client.py")
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
answers = []
for messages in json.loads(asked):
    told = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    ids = told["input_ids"]
    options = dict(max_new_tokens=longest, do_sample=False)
    with torch.no_grad():
        if way == "peft":
            made = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
            made = made[0, ids.shape[1]:].tolist()
        else:
            made = client.answer(model, ids, adapter + ".safetensors", **options)
    answers.append(tokenizer.decode(made, skip_special_tokens=True).strip())
assert not any(name.split(".")[0] == "ptkit" for name in sys.modules)
print(json.dumps(answers))
"""


class Refused(Exception):
    """A command of ptkit failed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--longest", type=int, default=24, help="tokens of an answer")
    given = parser.parse_args()
    asked = questions(given.questions)
    # A system prompt and one question, which the terminal is asked.
    single = next(n for n, messages in enumerate(asked) if len(messages) == 2)
    base = ptkit("models", "path", given.model).strip()
    same = True
    for run in given.runs:
        with TemporaryDirectory() as folder:
            scratch = Path(folder)
            (scratch / "served").mkdir()
            (scratch / "served" / "asked").symlink_to(find_adapter(run).resolve())
            expected = generated(run, given, asked, scratch)
            ways = {
                "ptkit chat": chatted(run, given, asked[single]),
                "ptkit serve": served(scratch / "served", given, asked),
                "plain PEFT": plain("peft", run, base, given, asked, scratch),
                "plain transformers": plain("transformers", run, base, given, asked, scratch),
            }
        for way, answers in ways.items():
            if isinstance(answers, str):
                print(f"{run.name}: {way}: not possible ({answers})")
                continue
            wanted = [expected[single]] if way == "ptkit chat" else expected
            equal = sum(a == b for a, b in zip(answers, wanted, strict=True))
            same = same and equal == len(answers)
            print(f"{run.name}: {way}: {equal} of {len(answers)} answers equal", flush=True)
    sys.exit(0 if same else 1)


def questions(count: int) -> list[Messages]:
    """Conversations of the set's test rows, without the last answer."""
    from ptkit.data.sources import BUILTIN

    lines = (BUILTIN / "persona-chat" / "test.jsonl").read_text().splitlines()
    return [json.loads(line)["messages"][:-1] for line in lines[:count]]


def ptkit(*arguments: str, told: str | None = None) -> str:
    """What a command of ptkit prints. Raises Refused where it fails."""
    command = [sys.executable, "-m", "ptkit", *arguments]
    done = subprocess.run(command, input=told, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"ptkit {arguments[0]}: {done.stderr.strip()}")
    return done.stdout


def generated(run: Path, given: Any, asked: list[Messages], scratch: Path) -> list[str]:
    rows = scratch / "asked.jsonl"
    rows.write_text("".join(json.dumps({"messages": m}) + "\n" for m in asked))
    said = ptkit(
        "generate", "-i", str(rows), "--model", given.model, "-a", str(run),
        "--max-new-tokens", str(given.longest), "--json",
    )  # fmt: skip
    return [str(json.loads(line)["output"]).strip() for line in said.splitlines()]


def chatted(run: Path, given: Any, first: Messages) -> list[str]:
    """The answer to a conversation that has a system prompt and one question."""
    system, question = first[0]["content"], first[1]["content"]
    said = ptkit(
        "chat", "--model", given.model, "-a", str(run), "--system", system,
        "--max-new-tokens", str(given.longest), told=question + "\n",
    )  # fmt: skip
    return [said.strip()]


def served(adapters: Path, given: Any, asked: list[Messages]) -> list[str]:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-m", "ptkit", "serve", "--model", given.model]
    command += ["--adapters", str(adapters), "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            if server.poll() is not None:
                raise Refused(f"ptkit serve ended with exit code {server.returncode}")
            try:
                urllib.request.urlopen(url + "/health", timeout=5)
                break
            except (urllib.error.URLError, ConnectionError):
                time.sleep(1)
        return [_asked(url, messages, given.longest) for messages in asked]
    finally:
        server.terminate()
        server.wait()


def _asked(url: str, messages: Messages, longest: int) -> str:
    body = {"model": "asked", "messages": messages, "max_tokens": longest}
    request = urllib.request.Request(
        url + "/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=600) as told:
        return str(json.load(told)["choices"][0]["message"]["content"]).strip()


def plain(
    way: str, run: Path, base: str, given: Any, asked: list[Messages], scratch: Path
) -> list[str] | str:
    out = scratch / way
    try:
        ptkit("export", str(run), "--as", way, "--out", str(out))
    except Refused as refused:
        return str(refused).splitlines()[-1]
    adapter = out if way == "peft" else next(out.glob("*.safetensors")).with_suffix("")
    arguments = [way, base, str(adapter), json.dumps(asked), str(given.longest)]
    # In another folder, so that no checkout of ptkit is importable by accident.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", PLAIN, *arguments],
        capture_output=True, text=True, cwd=scratch, env=environment,
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError(done.stderr)
    answers: list[str] = json.loads(done.stdout.splitlines()[-1])
    return answers


if __name__ == "__main__":
    main()
