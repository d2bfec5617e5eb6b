"""The recipe: the one definition of what `ptkit train` and `ptkit compare` do.

Every field's description is the source of the command line's help, the JSON schema, the
reference documentation and the comments of the shipped recipes. The settings of each
method lie in the method's own folder, and are found there: adding a method changes nothing here.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin

from pydantic import (
    Field,
    SerializeAsAny,
    SerializerFunctionWrapHandler,
    ValidationInfo,
    field_validator,
    model_serializer,
    model_validator,
)

from ptkit.errors import UserError, did_you_mean
from ptkit.methods.catalogue import method_section
from ptkit.options import SEEDS, Attention, DeviceMap, Dtype, Quantize, TensorParallel
from ptkit.recipe.expansion import check_budget, check_sweep
from ptkit.recipe.tasks import HeadedTask, Task
from ptkit.recipe.values import Values
from ptkit.section import MethodSection, Section

Seed = Annotated[int, Field(ge=0, lt=SEEDS)]


def _literals(annotation: Any) -> list[str]:
    """The words that a field of this type takes."""
    if get_origin(annotation) is Literal:
        return [str(value) for value in get_args(annotation)]
    return [word for part in get_args(annotation) for word in _literals(part)]


class ModelSection(Section):
    """The frozen base model."""

    id: str = "tiny-en"
    """Hub id (`openai-community/gpt2`), local directory, GGUF file (`path/model.gguf`, or
    `user/repo/model.gguf` on the hub), or a name ptkit knows: `tiny-en` (ships with ptkit),
    `smollm2-135m` (`ptkit models get smollm2-135m`), `minilm-l6`."""
    revision: str | None = None
    """Hub branch, tag or commit."""
    dtype: Dtype = "float32"
    """Data type the base is loaded in. Trained parameters are always float32."""
    attention: Attention = "auto"
    """Attention implementation. `auto` is `sdpa` where the model has it; short texts that are
    trained in bf16 on a CPU use `eager`, which is faster there."""
    quantize: Quantize | None = None
    """Keeps the frozen weights in fewer bits, from the moment they are read; adapters are trained
    through them in float32. `int8` (torchao) and `nf4` (bitsandbytes, four bits, QLoRA's) round the
    linear layers of any checkpoint (`pip install -e ".[quantize]"`): the base answers a little
    differently. `blocks` keeps a GGUF file in its own blocks: nothing is rounded again. All need
    less memory and take longer, most of all to generate on a CPU."""
    device: str = "auto"
    """`auto` (CUDA, then MPS, then CPU), `cpu`, `cuda`, `cuda:1`, `mps`."""
    device_map: DeviceMap | dict[str, int | str] | None = None
    """Spreads the layers over the devices of one process, as transformers' `device_map`: `auto`,
    `balanced`, `balanced_low_0`, `sequential`, or module -> GPU number, device, `cpu` or `disk`.
    What does not fit is offloaded to the CPU's memory, then to `offload_folder`."""
    max_memory: dict[int | str, int | str] | None = None
    """With `device_map`: device -> the most bytes it may hold, as `{0: 20GiB, cpu: 60GiB}`."""
    offload_folder: str | None = None
    """With `device_map`: the folder for weights that fit nowhere else."""
    tp_plan: TensorParallel | dict[str, str] | None = None
    """Tensor parallelism: splits every layer over all processes of the run, by the model's own plan
    (`auto`), or with other styles for some modules. Start it with
    `torchrun --nproc-per-node N -m ptkit ...`."""

    #: Where the base lies is no part of what it computes.
    PLACES: ClassVar[set[str]] = {"device", "device_map", "max_memory", "offload_folder", "tp_plan"}

    @model_validator(mode="after")
    def _one_way_to_place_it(self) -> ModelSection:
        if self.device_map is not None and self.tp_plan is not None:
            raise ValueError(
                "`device_map` is for one process and `tp_plan` for several: keep one of them"
            )
        if self.device_map is not None and self.device != "auto":
            raise ValueError("`device` and `device_map` both say where the base lies: keep one")
        for key in ("max_memory", "offload_folder"):
            if getattr(self, key) is not None and self.device_map is None:
                raise ValueError(f"`{key}` needs `device_map`")
        if self.quantize is not None and self.tp_plan is not None:
            raise ValueError("`quantize` does not work with `tp_plan`: keep one of them")
        return self

    def in_precision(self, name: str) -> ModelSection:
        """This model with its values in `name`: a `dtype`, or a `quantize` in float32.

        Raises UserError for anything else.
        """
        fields = type(self).model_fields
        known = {
            value: key
            for key in ("dtype", "quantize")
            for value in _literals(fields[key].annotation)
        }
        if name not in known:
            raise UserError(f"no precision `{name}`; {did_you_mean(name, known)}")
        plain = {"dtype": "float32", "quantize": None}
        return self.model_copy(update={**plain, known[name]: name})


class RetainSection(Section):
    """Stay the base on general text, by learning the base's own distribution there (KL divergence,
    per token) or by keeping away. Not for full fine-tuning, which has no base left beside it."""

    _OF_DIVERGENCE: ClassVar[frozenset[str]] = frozenset({"weight", "target", "tokens"})

    by: Literal["divergence", "gate"] = "divergence"
    """`divergence`: by learning it, beside the task. `gate`: by training as ever, and then telling
    the task's inputs from general text: an input unlike them is read by the base alone."""
    text: str | None = None
    """A UTF-8 text file (relative paths start at the recipe's folder), other than the text that
    forgetting is measured on. null: texts that the frozen base writes itself."""
    weight: Literal["auto"] | Annotated[float, Field(gt=0)] = "auto"
    """What a nat of divergence counts beside a nat of the task's loss; `auto` raises and lowers it
    so that the divergence stays near `target`."""
    target: Annotated[float, Field(gt=0)] = 0.05
    """Divergence to stay near, in nats per token, with `weight: auto`."""
    tokens: Annotated[int, Field(ge=64)] = 256
    """Tokens of general text per step, in pieces of 64."""

    @model_validator(mode="after")
    def _a_gate_has_no_weight(self) -> RetainSection:
        moot = sorted(self._OF_DIVERGENCE & self.model_fields_set)
        if self.by == "gate" and moot:
            raise ValueError(
                f"`{moot[0]}` is of `by: divergence`; a gate is fitted after training and has none"
            )
        return self

    @model_serializer(mode="wrap")
    def _without_what_is_moot(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A recipe that is written out whole can be read again."""
        moot = self._OF_DIVERGENCE if self.by == "gate" else frozenset()
        return {key: value for key, value in handler(self).items() if key not in moot}


class _Grown(Section):
    """A section that comparisons of earlier versions have without some of its keys."""

    #: Keys that are left out where they are null, so that such comparisons go on.
    LATER: ClassVar[set[str]]

    @model_serializer(mode="wrap")
    def _as_before(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        found: dict[str, Any] = handler(self)
        return {k: value for k, value in found.items() if k not in self.LATER or value is not None}


class TrainSection(_Grown):
    """How each cell is trained."""

    LATER: ClassVar[set[str]] = {"average"}
    #: Settings that a result does not depend on, only what it takes and where it is logged.
    NOT_OF_RESULT: ClassVar[set[str]] = {"context_cache_mb", "report_to", "together"}

    steps: Annotated[int, Field(gt=0)] = 300
    """Optimiser steps."""
    batch_size: Annotated[int, Field(gt=0)] = 16
    """Rows per optimiser step and process, before gradient accumulation."""
    gradient_accumulation: Annotated[int, Field(gt=0)] = 1
    """Batches whose gradients are summed into one step."""
    head_learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    """AdamW's peak learning rate of a classification head beside a prompt method or LoRA, whose own
    rates are no good for it. `linear_probe` and `full` have one rate for all they train."""
    warmup_steps: Annotated[int, Field(ge=0)] = 20
    """Steps over which the learning rate rises from zero."""
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    """What the learning rate does after warm-up (`constant` keeps it)."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Gradients are clipped to this norm."""
    autocast: Literal["no", "auto", "bf16", "fp16"] = "auto"
    """Mixed precision of the forward pass (accelerate's `mixed_precision`); `auto` is `bf16` where
    the device has instructions for it, and `no` elsewhere."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    average: Annotated[int, Field(gt=1)] | None = None
    """Validate and keep a running mean of the trained values instead of the last step's. It is the
    mean of the first so many steps, and every later step moves it by one part in so many (an
    exponential moving average; Polyak & Juditsky 1992). It takes the memory of one more copy. null:
    the values of a step."""
    eval_every: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"
    """Steps between validation losses; the best checkpoint by that loss is kept. `auto` is 50, or
    fewer: the steps that train on as many rows as there are of training or of validation, whichever
    are more. With few rows the best step comes early."""
    save_every: Annotated[int, Field(gt=0)] = 50
    """Steps between saves from which a killed run resumes. A single process also saves about once a
    minute."""
    context_cache_mb: Annotated[int, Field(ge=0)] = 2000
    """Memory for the inputs of an infix, which are read once and kept for all epochs; those that do
    not fit are read again. It changes the time only."""
    retain: RetainSection | None = None
    """Keep the base's behaviour on general text while learning; null: learn the task alone."""
    together: Annotated[int, Field(gt=0)] = 1
    """Seeds of a prompt method that `ptkit compare` trains in one batch, each with the result it
    has alone. The base must have no dropout for that. It is faster where a single batch is too
    small to fill the machine. A cell's time is then its share, its peak memory that of the whole
    batch."""
    patience: Annotated[int, Field(gt=0)] | None = None
    """Stop after this many validations without improvement; null trains all steps."""
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(default=[])
    """Trackers to log to (through accelerate); each must be installed."""

    @model_validator(mode="after")
    def _can_be_together(self) -> TrainSection:
        if self.together > 1 and (self.autocast == "fp16" or self.report_to):
            raise ValueError("`together` needs another `autocast` than `fp16`, and no `report_to`")
        return self


class EvaluateSection(_Grown):
    """How results are measured."""

    LATER: ClassVar[set[str]] = {"curve_rows"}

    batch_size: Annotated[int, Field(gt=0)] = 64
    """Rows per evaluation batch."""
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    """Resamples of the test rows behind every 95 % interval; no p value is below one in so many."""
    curve_rows: Annotated[int, Field(gt=0)] | None = None
    """Validation rows whose predictions are scored at every validation, so that the score is drawn
    over seconds and over supervised tokens. Scoring is not part of the seconds. null: the curve has
    losses alone."""
    baseline: str | None = None
    """Method (label or name) that the others are compared with on the same rows, over seeds and
    rows, corrected for their number (Holm). Default: `full` where the recipe has it, else the
    first."""


class RetentionSection(Section):
    """How much of the base model's behaviour is left with the adapter on."""

    text: str | Annotated[list[str], Field(min_length=1)] = "general-en"
    """General text whose cross-entropy per token is compared: `general-en` (ships with ptkit)
    or a UTF-8 text file; relative paths start at the recipe's folder. A list measures several
    domains, each also on its own."""
    max_tokens: Annotated[int, Field(gt=0)] = 20_000
    """Use only this many tokens of each."""


class BudgetSection(Section):
    """The same tuning effort for every method, before its seeds are run."""

    trials: Annotated[int, Field(gt=0)]
    """Settings tried for each method in `search`; the one with the lowest validation loss is run
    with all seeds. Test rows of their own play no part in it."""
    sampler: Literal["random", "optuna"] = "random"
    """Random search (Bergstra & Bengio 2012), or Optuna's TPE (`pip install -e ".[optuna]"`)."""
    seed: Seed = 0
    """Seed of the search, and of the trials' training."""
    search: dict[str, dict[str, Values]] = Field(min_length=1)
    """Method (its label or name) -> its keys -> the values to try, a list or
    `{low: 1e-3, high: 1.0, log: true}`."""


def _retention_by_task(read: dict[str, Any]) -> RetentionSection | None:
    """What `retention` is where a recipe says nothing of it; `read`: the fields before it."""
    return None if isinstance(read.get("task"), HeadedTask) else RetentionSection()


class Recipe(Section):
    """A complete, validated experiment."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$")]
    """Short name: lower-case letters, digits, `-`, `_`, `.`; names the output folder."""
    description: str = ""
    """One or two sentences on what the recipe shows."""
    model: ModelSection = ModelSection()
    """The frozen base model."""
    task: Annotated[Task, Field(discriminator="kind")]
    """What is learnt, from which data."""
    methods: list[SerializeAsAny[MethodSection]] = Field(min_length=1)
    """Methods to train or compare, each `{kind: ..., ...settings}`."""
    seeds: list[Seed] = Field(default=[0], min_length=1)
    """One run per method and seed."""
    train: TrainSection = TrainSection()
    """How each cell is trained."""
    evaluate: EvaluateSection = EvaluateSection()
    """How results are measured."""
    retention: RetentionSection | None = Field(default_factory=_retention_by_task)
    """General text on which forgetting is measured; null skips it. A model with a classification
    head writes no text: there it is null."""
    budget: BudgetSection | None = None
    """Search for each method's settings before its seeds are run (`ptkit compare`)."""
    sweep: dict[str, Values] = Field(default={})
    """Keys of the recipe -> the values they take; every combination is run (`ptkit compare`).
    `methods.prefix_tuning.num_virtual_tokens: [1, 5, 10]` varies one method, `methods.*.KEY` all
    that have the key, `task.data.limits.train: [50, 100]` everything."""

    @field_validator("methods", mode="before")
    @classmethod
    def _settings_of_each_method(cls, entries: Any) -> Any:
        """Read each entry with the settings class its `kind` names."""
        if not isinstance(entries, list):
            return entries
        return [method_section(e) if isinstance(e, dict) else e for e in entries]

    @field_validator("retention", mode="before")
    @classmethod
    def _needs_a_language_model(cls, value: Any, info: ValidationInfo) -> Any:
        if value is not None and isinstance(info.data.get("task"), HeadedTask):
            raise ValueError(
                "forgetting is measured on text the model writes, and a classification head "
                "writes none; leave `retention` out"
            )
        return value

    @model_validator(mode="after")
    def _unique(self) -> Recipe:
        titles = [m.title for m in self.methods]
        twice = sorted({t for t in titles if titles.count(t) > 1})
        if twice:
            raise ValueError(
                f"two methods are called `{twice[0]}`; give each entry its own `label`"
            )
        if self.evaluate.baseline is not None and self.evaluate.baseline not in titles:
            raise ValueError(
                f"`evaluate.baseline`: no method `{self.evaluate.baseline}`; "
                + did_you_mean(self.evaluate.baseline, titles)
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("`seeds` holds the same seed twice")
        if self.train.together > 1 and isinstance(self.task, HeadedTask):
            raise ValueError(
                "`train.together`: each adapter trains a classification head of its own, and the "
                "rows of a batch share one"
            )
        if self.train.retain is not None and isinstance(self.task, HeadedTask):
            raise ValueError(
                "`train.retain`: what is kept is the base's distribution over the next token, and "
                "a model with a classification head has none"
            )
        return self

    @field_validator("budget", "sweep")
    @classmethod
    def _can_be_expanded(cls, value: Any, info: ValidationInfo) -> Any:
        """Every key there is, and every value one that the key takes.

        Checked on the field, so that the fault names its line; the fields before it are read.
        """
        rest = {k: v for k, v in info.data.items() if k != "budget"}
        if value and {"name", "task", "methods"} <= rest.keys():
            without: Any = {**rest, info.field_name: value}
            check = check_budget if info.field_name == "budget" else check_sweep
            check(cls.model_construct(**without))
        return value

    def method(self, title: str) -> MethodSection:
        """The entry called `title` (a label or a method's name). Raises KeyError."""
        for entry in self.methods:
            if entry.title == title:
                return entry
        raise KeyError(
            f"no method `{title}`; {did_you_mean(title, [m.title for m in self.methods])}"
        )
