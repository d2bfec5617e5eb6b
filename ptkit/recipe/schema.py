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
from ptkit.options import Attention, Dtype, Quantize
from ptkit.plugins import brought
from ptkit.recipe.expansion import check_budget, check_sweep
from ptkit.recipe.values import Values
from ptkit.section import MethodSection, Section


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
    linear layers of any checkpoint (`pip install 'ptkit[quantize]'`): the base answers a little
    differently. `blocks` keeps a GGUF file in its own blocks: nothing is rounded again. All need
    less memory and take longer, most of all to generate on a CPU."""
    device: str = "auto"
    """`auto` (CUDA, then MPS, then CPU), `cpu`, `cuda`, `cuda:1`, `mps`."""

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


class Splits(Section):
    """The source's names for the three splits."""

    train: str = "train"
    """Training rows."""
    validation: str | None = "validation"
    """Rows that choose the best checkpoint and, in a search, the settings; null holds a tenth of
    the training rows out for it (use it where `test` is the source's validation)."""
    test: str | None = "test"
    """Rows every figure is about; null takes the validation rows, which have also chosen the
    checkpoint: record, table, report and card then say so."""


class SplitLimits(Section):
    """Use only so many rows of each split."""

    train: Annotated[int, Field(gt=0)] | None = None
    validation: Annotated[int, Field(gt=0)] | None = None
    test: Annotated[int, Field(gt=0)] | None = None


class DataSection(Section):
    """Where the rows come from: exactly one of `builtin`, `hub` or `files`."""

    builtin: str | None = None
    """A set that ships with ptkit: `facts-to-text`, `message-routing`, `captions-en-de`,
    `report-summary`, `persona-reply`, `passage-question`."""
    hub: str | None = None
    """Id of a dataset on the Hugging Face Hub. Its CSV and JSON files are read as `files` are: a
    cell is its text."""
    config: str | None = None
    """Configuration (subset) of the hub dataset."""
    revision: str | None = None
    """Revision of the hub dataset."""
    data_dir: str | None = None
    """Folder of the hub dataset to read, where its files are not described by configurations."""
    files: dict[str, str | list[str]] | None = None
    """Split -> JSONL, JSON, CSV or Parquet file(s); relative paths start at the recipe's folder."""
    splits: Splits = Splits()
    """The source's names for the three splits. What is missing falls back: test to the validation
    rows, validation to a tenth of the training rows (both as if the name were null)."""
    limits: SplitLimits = SplitLimits()
    """Use only so many rows of each split."""
    draw: Literal["balanced", "first", "seed"] = "balanced"
    """Which rows `limits` keep and which are held out for a missing validation split. `balanced`: a
    random draw, the same for all seeds, that gives every label its share (built-in sets lie in
    random order: their first rows are one). `first`: in the order of the source, limits keep the
    first and the last tenth is held out, as for rows in the order of time. `seed`: `limits.train`
    draws by the cell's seed, so that the seeds of a low-data comparison differ in their data."""

    @model_validator(mode="before")
    @classmethod
    def _fall_backs_are_written_out(cls, data: Any) -> Any:
        """What the splits of files are is known here, and part of the recipe that is kept."""
        if not isinstance(data, dict) or not isinstance(data.get("files"), dict):
            return data
        splits = data.get("splits", {})
        if not isinstance(splits, dict):
            return data
        absent = {s: None for s in ("validation", "test") if s not in data["files"]}
        return {**data, "splits": {**absent, **splits}}

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        given = [n for n in ("builtin", "hub", "files") if getattr(self, n)]
        if len(given) != 1:
            raise ValueError(
                "expected exactly one of `builtin`, `hub`, `files`"
                + (f", found {', '.join(given)}" if given else "")
            )
        return self


#: Tokenisers of sacrebleu's that a metric may be told to use, as in `bleu-zh`; the metrics.
TOKENIZERS = ("zh", "char", "intl", "ja-mecab", "ko-mecab", "flores200")
TOKENIZED = ("bleu", "rouge1", "rouge2", "rougeL", "rougeLsum")
#: A metric's name, of ptkit's own or brought by another package, or `module:function`.
MetricName = Annotated[str, Field(min_length=1)]


def _require_metrics(cls: Any, names: list[str]) -> list[str]:
    """Raise ValueError for a metric the task does not have, or one named twice."""
    known = (*cls._known_metrics, *brought("ptkit.metrics"))
    for name in names:
        if ":" not in name and name not in known:
            raise ValueError(f"no metric `{name}`; {did_you_mean(name, known)}")
    if len(set(names)) < len(names):
        raise ValueError("a metric is named twice")
    return names


class GenerationTask(Section):
    """The model writes the target after the input."""

    kind: Literal["generation"]
    """`generation`."""
    data: DataSection
    """Where the rows come from."""
    input: str
    """Template of what the model reads, with `{column}` placeholders."""
    target: str
    """Template of what the model learns to write after it (an end-of-text token is added)."""
    references: str | None = None
    """Column holding the list of acceptable texts; without it the target alone is the reference."""
    max_input_tokens: Annotated[int, Field(gt=0)] = 256
    """Inputs are cut on the left to this many tokens, and keep a begin-of-text token that the
    tokenizer adds; for an encoder-decoder on the right."""
    max_target_tokens: Annotated[int, Field(gt=0)] = 128
    """Targets are cut to, and generation stops at, this many tokens."""
    num_beams: Annotated[int, Field(ge=1)] = 1
    """Beams of the search used for evaluation; 1 is greedy."""
    metrics: list[MetricName] = Field(default=["bleu", "chrf"], min_length=1)
    """`bleu`, `chrf`, `ter`, `rouge1`, `rouge2`, `rougeL`, `rougeLsum` (of summaries, a sentence a
    line), `meteor`, `exact_match`, `perplexity` of the target, or your own `module:function`; the
    first is *the score* in tables. `bleu-zh`, `rougeL-char`: with sacrebleu's tokeniser `zh`,
    `char`, `intl`, `ja-mecab`, `ko-mecab` or `flores200`, for other languages than English."""
    _known_metrics: ClassVar[tuple[str, ...]] = (
        "bleu", "chrf", "ter", "rouge1", "rouge2", "rougeL", "rougeLsum", "meteor", "exact_match",
        "perplexity", *(f"{name}-{own}" for name in TOKENIZED for own in TOKENIZERS),
    )  # fmt: skip

    _metrics_are_known = field_validator("metrics")(_require_metrics)


class ClassificationTask(Section):
    """The model chooses the label whose words it finds likeliest after the input."""

    kind: Literal["classification"]
    """`classification`."""
    data: DataSection
    """Where the rows come from."""
    input: str
    """Template of what the model reads, with `{column}` placeholders."""
    label: str = "label"
    """Column with the label."""
    verbalizer: dict[str, str] = Field(min_length=2)
    """Label -> the words that stand for it after the input (keep the leading space). No
    label's words may begin another's: they would always be the likelier ones."""
    max_input_tokens: Annotated[int, Field(gt=0)] = 256
    """Inputs are cut on the left to this many tokens, and keep a begin-of-text token that the
    tokenizer adds."""
    metrics: list[MetricName] = Field(default=["accuracy", "macro_f1"], min_length=1)
    """`accuracy`, `macro_f1`, `macro_precision`, `macro_recall`, `roc_auc`, or your own
    `module:function`; the first is *the score* in tables."""
    _known_metrics: ClassVar[tuple[str, ...]] = (
        "accuracy", "macro_f1", "macro_precision", "macro_recall", "roc_auc",
    )  # fmt: skip

    _metrics_are_known = field_validator("metrics")(_require_metrics)

    @field_validator("verbalizer")
    @classmethod
    def _distinct_words(cls, words: dict[str, str]) -> dict[str, str]:
        if len(set(words.values())) < len(words):
            raise ValueError("two labels have the same words")
        for label, own in words.items():
            if not own:
                raise ValueError(f"the label `{label}` has no words")
            for other, longer in words.items():
                if longer.startswith(own) and longer[len(own) :][:1].isspace():
                    raise ValueError(
                        f"the words of `{label}` begin those of `{other}`, so `{other}` could "
                        "never be chosen; give one of them words that begin otherwise"
                    )
        return words


class HeadedTask(Section):
    """What tasks share that are solved by a classification head instead of by words: the head is
    new, and trained with every method. For encoders, and for decoders used as classifiers."""

    data: DataSection
    """Where the rows come from."""
    labels: list[Annotated[str, Field(pattern=r"^\S+$")]] = Field(min_length=2)
    """All labels, in any order (a checkpoint's own head is matched by name); no spaces within
    one."""
    max_input_tokens: Annotated[int, Field(gt=0)] = 256
    """Inputs are cut on the right to this many tokens."""
    metrics: list[MetricName] = Field(min_length=1)
    """The first is *the score* in tables."""
    _known_metrics: ClassVar[tuple[str, ...]]

    _metrics_are_known = field_validator("metrics")(_require_metrics)

    @field_validator("labels")
    @classmethod
    def _distinct_labels(cls, labels: list[str]) -> list[str]:
        if len(set(labels)) < len(labels):
            raise ValueError("a label is listed twice")
        return labels


class SequenceClassificationTask(HeadedTask):
    """A trained head chooses one label for the whole input."""

    kind: Literal["sequence_classification"]
    """`sequence_classification`."""
    input: str
    """Template of what the model reads, with `{column}` placeholders."""
    label: str = "label"
    """Column with the label."""
    metrics: list[MetricName] = Field(default=["accuracy", "macro_f1"], min_length=1)
    """`accuracy`, `macro_f1`, `macro_precision`, `macro_recall`, `roc_auc`, or your own
    `module:function`; the first is *the score* in tables."""
    _known_metrics: ClassVar[tuple[str, ...]] = ClassificationTask._known_metrics


class TokenClassificationTask(HeadedTask):
    """A trained head chooses one label for every word: names, parts of speech."""

    kind: Literal["token_classification"]
    """`token_classification`."""
    words: str = "tokens"
    """Column with the list of words."""
    tags: str = "tags"
    """Column with the list of their labels, as long as the list of words."""
    metrics: list[MetricName] = Field(default=["word_accuracy", "word_macro_f1"], min_length=1)
    """`word_accuracy`, `word_macro_f1`, `entity_f1` (of labels in IOB, IOBES or BILOU), or your own
    `module:function`; the first is *the score* in tables."""
    _known_metrics: ClassVar[tuple[str, ...]] = ("word_accuracy", "word_macro_f1", "entity_f1")


Task = GenerationTask | ClassificationTask | SequenceClassificationTask | TokenClassificationTask


class RetainSection(Section):
    """Stay the base on general text, by learning the base's own distribution there (KL divergence,
    per token) or by keeping away. Not for full fine-tuning, which has no base left beside it."""

    _OF_DIVERGENCE: ClassVar[frozenset[str]] = frozenset({"weight", "target", "tokens"})

    by: Literal["divergence", "gate"] = "divergence"
    """`divergence`: by learning it, beside the task. `gate`: by training as ever, and then telling
    the task's inputs from general text: an input unlike them is read by the base alone."""
    text: str | None = None
    """A UTF-8 text file (relative paths start at the recipe's folder), other than the text that
    forgetting is measured on; null: texts that the frozen base writes itself."""
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


class TrainSection(Section):
    """How each cell is trained."""

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
    eval_every: Literal["auto"] | Annotated[int, Field(gt=0)] = "auto"
    """Steps between validation losses; the best checkpoint by that loss is what is kept. `auto` is
    50, or where there are fewer the steps in which as many rows are trained on as there are of
    training or of validation, whichever are more: with few rows the best step comes early."""
    save_every: Annotated[int, Field(gt=0)] = 50
    """Steps between saves from which a killed run resumes."""
    context_cache_mb: Annotated[int, Field(ge=0)] = 2000
    """Memory for the inputs of an infix, which are read once and kept for all epochs; those that do
    not fit are read again. It changes the time only."""
    retain: RetainSection | None = None
    """Keep the base's behaviour on general text while learning; null: learn the task alone."""
    together: Annotated[int, Field(gt=0)] = 1
    """Seeds of a prompt method that `ptkit compare` trains in one batch, each with the result it
    has alone; for that the base must have no dropout. Faster where a single batch is too small to
    fill the machine; a cell's time is then its share, its peak memory that of the whole batch."""
    patience: Annotated[int, Field(gt=0)] | None = None
    """Stop after this many validations without improvement; null trains all steps."""
    report_to: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = Field(default=[])
    """Trackers to log to (through accelerate); each must be installed."""

    @model_validator(mode="after")
    def _can_be_together(self) -> TrainSection:
        if self.together > 1 and (self.autocast == "fp16" or self.report_to):
            raise ValueError("`together` needs another `autocast` than `fp16`, and no `report_to`")
        return self


class EvaluateSection(Section):
    """How results are measured."""

    batch_size: Annotated[int, Field(gt=0)] = 64
    """Rows per evaluation batch."""
    bootstrap: Annotated[int, Field(ge=100)] = 1000
    """Resamples (over seeds and examples) behind every 95 % interval."""
    baseline: str | None = None
    """Method (label or name) that the others are compared with by a paired bootstrap test,
    corrected for their number (Holm); default: `full` where the recipe has it, else the first."""


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
    """Random search (Bergstra & Bengio 2012), or Optuna's TPE (needs `pip install optuna`)."""
    seed: Annotated[int, Field(ge=0)] = 0
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
    seeds: list[Annotated[int, Field(ge=0)]] = Field(default=[0], min_length=1)
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
