"""What is learnt, from which data: the `task` section of a recipe, one class for each kind."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from ptkit.errors import did_you_mean
from ptkit.metrics import Judged, metric_names
from ptkit.plugins import brought
from ptkit.section import Section


class Splits(Section):
    """The source's names for the three splits."""

    train: str = "train"
    """Training rows."""
    validation: str | None = "validation"
    """Rows that choose the best checkpoint and, in a search, the settings. null holds a tenth of
    the training rows out for it. Use it where `test` is the source's validation."""
    test: str | None = "test"
    """Rows every figure is about. null takes the validation rows, which have also chosen the
    checkpoint; record, table, report and card then name that."""


class SplitLimits(Section):
    """Use only so many rows of each split."""

    train: Annotated[int, Field(gt=0)] | None = None
    validation: Annotated[int, Field(gt=0)] | None = None
    test: Annotated[int, Field(gt=0)] | None = None


class DataSection(Section):
    """Where the rows come from: exactly one of `builtin`, `hub`, `files` or `memory`."""

    builtin: str | None = None
    """A set that ships with ptkit: `facts-to-text`, `message-routing`, `captions-en-de`,
    `report-summary`, `persona-reply`, `persona-chat`, `persona-preference`, `passage-question`."""
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
    memory: bool = False
    """The rows were handed over by a program: `ptkit.train(..., dataset=...)` sets it."""
    streaming: bool = False
    """Read the hub dataset as a stream, up to `limits`, and nothing beyond it. `limits.train` is
    required; it is the number of rows that an epoch has. Rows are drawn through a shuffle buffer,
    so labels have no share that is kept. They then lie on this machine, and a resumed run reads the
    same ones. A missing validation split is a tenth of them."""
    splits: Splits = Splits()
    """The source's names for the three splits. What is missing falls back: test to the validation
    rows, validation to a tenth of the training rows (both as if the name were null)."""
    limits: SplitLimits = SplitLimits()
    """Use only so many rows of each split."""
    draw: Literal["balanced", "first", "seed"] = "balanced"
    """Which rows `limits` keep and which are held out for a missing validation split. `balanced`: a
    random draw, the same for all seeds, that gives every label its share. (Built-in sets are in
    random order: their first rows are one.) `first`: in the order of the source, for rows in the
    order of time. Limits then keep the first, and the last tenth is held out. `seed`:
    `limits.train` draws by the cell's seed, so that the seeds of a low-data comparison differ
    in their data."""

    @model_validator(mode="before")
    @classmethod
    def _fall_backs_are_written_out(cls, data: Any) -> Any:
        """What the splits of files are is known here, and part of the recipe that is kept."""
        if isinstance(data, dict) and isinstance(data.get("files"), str | list):
            named = data["files"] if isinstance(data["files"], str) else "rows.csv"
            raise ValueError(f"`files` names the file of each split: `files: {{train: {named}}}`")
        if not isinstance(data, dict) or not isinstance(data.get("files"), dict):
            return data
        splits = data.get("splits", {})
        if not isinstance(splits, dict):
            return data
        absent = {s: None for s in ("validation", "test") if s not in data["files"]}
        return {**data, "splits": {**absent, **splits}}

    @model_validator(mode="after")
    def _one_source(self) -> DataSection:
        given = [n for n in ("builtin", "hub", "files", "memory") if getattr(self, n)]
        if len(given) != 1:
            raise ValueError(
                "expected exactly one of `builtin`, `hub`, `files`"
                + (f", found {', '.join(given)}" if given else "")
            )
        return self

    @model_validator(mode="after")
    def _a_stream_has_no_number_of_rows(self) -> DataSection:
        if not self.streaming:
            return self
        if not self.hub:
            raise ValueError("`streaming` is for hub datasets; large files are read row by row")
        if self.limits.train is None:
            raise ValueError(
                "a stream does not tell how many rows it has; set `limits.train` (a run reads "
                "train.steps x train.batch_size x train.gradient_accumulation rows)"
            )
        if self.draw == "seed":
            raise ValueError(
                "`draw: seed` draws from all rows, whose number a stream does not tell; use "
                "`balanced` or `first`, or leave `streaming` out"
            )
        return self


#: A metric's name, of ptkit's own or brought by another package, or `module:function`.
MetricName = Annotated[str, Field(min_length=1)]


def _require_metrics(cls: Any, names: list[str]) -> list[str]:
    """Raise ValueError for a metric the task does not have, or one named twice."""
    known = (*metric_names(cls._judged), *brought("ptkit.metrics"))
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
    line), `meteor`, `exact_match`, `json_valid`, `json_equal`, or `perplexity` of the target. Your
    own are `module:function`. The first is *the score* in tables. `bleu-zh`, `rougeL-char`: with
    sacrebleu's tokeniser `zh`, `char`, `intl`, `ja-mecab`, `ko-mecab` or `flores200`, for other
    languages than English."""
    _judged: ClassVar[Judged] = "text"

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
    _judged: ClassVar[Judged] = "label"

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


class ConversationTask(Section):
    """What tasks share whose rows are conversations, written in a chat template."""

    data: DataSection
    """Where the rows come from, one conversation each."""
    system: str | None = None
    """System prompt of conversations that bring none. The adapter keeps it, and `chat`, `serve` and
    `generate` put it before what they are asked."""
    chat_template: str | None = None
    """The template that conversations are written in: a Jinja file (relative paths start at the
    recipe's folder), its text, or `chatml` or `plain`. null: the model's own. The adapter keeps
    what is not the model's own."""
    max_tokens: Annotated[int, Field(gt=1)] = 1024
    """The most tokens of a conversation, the template's included."""
    too_long: Literal["drop_turns", "refuse"] = "drop_turns"
    """What becomes of longer ones. `drop_turns`: the earliest questions with their answers are left
    out, whole, and the system prompt stays. `refuse`: the run ends with an error."""


class ChatTask(ConversationTask):
    """The model answers in conversations, which it reads in its chat template."""

    kind: Literal["chat"]
    """`chat`."""
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion"] = "auto"
    """How a row writes a conversation. `messages`: OpenAI's and TRL's. `sharegpt`: turns of `from`
    and `value`. `alpaca`: `instruction`, `input`, `output`. `prompt_completion`: texts or messages.
    `auto` tells them apart by their columns, and the run tells what was recognised."""
    column: str | None = None
    """The column of the turns. null: `messages`, or `conversations` for `sharegpt`."""
    references: str | None = None
    """Column holding the list of acceptable last answers; without it the one in the conversation
    is the reference."""
    loss: Literal["assistant", "last", "all"] = "assistant"
    """What is learnt: all answers of a conversation, the last one, or every token."""
    history: Literal["reference", "own"] = "reference"
    """What the model reads before the last answer of a test conversation: the earlier answers of
    the conversation, or those that it wrote itself."""
    max_target_tokens: Annotated[int, Field(gt=0)] = 128
    """Answers that are generated stop at this many tokens."""
    num_beams: Annotated[int, Field(ge=1)] = 1
    """Beams of the search used for evaluation; 1 is greedy."""
    metrics: list[MetricName] = Field(default=["chrf", "perplexity"], min_length=1)
    """Metrics of the last answer, as those of `kind: generation`, and `tool_calls_valid` and
    `tool_calls_equal`. `perplexity` is that of all that `loss` names. The first is *the score* in
    tables."""
    _judged: ClassVar[Judged] = "text"

    _metrics_are_known = field_validator("metrics")(_require_metrics)

    @model_validator(mode="after")
    def _room_for_an_answer(self) -> ChatTask:
        if self.max_target_tokens >= self.max_tokens:
            raise ValueError(
                f"`max_tokens` ({self.max_tokens}) leaves no room for a question beside an answer "
                f"of `max_target_tokens` ({self.max_target_tokens}); lower the second"
            )
        return self


class PreferenceTask(ConversationTask):
    """The model learns which of two answers to the same prompt is preferred."""

    kind: Literal["preference"]
    """`preference`."""
    data: DataSection
    """Where the rows come from, one pair of answers each. The answers are the columns `chosen` and
    `rejected`: texts, or lists of messages as TRL has them. Conversations without a column `prompt`
    share their beginning, which is the prompt."""
    objective: Literal["dpo"] = "dpo"
    """`dpo`: direct preference optimisation (Rafailov et al. 2023). The reference is the base
    itself with the adapter off: no second model is loaded."""
    beta: Annotated[float, Field(gt=0)] = 0.1
    """How near to the base the adapter stays: what a nat of difference from it counts."""
    loss_type: Literal["sigmoid", "hinge", "ipo"] = "sigmoid"
    """The loss of a pair, by TRL's names. `sigmoid`: DPO's own; `hinge`: SLiC's (Zhao et al. 2023);
    `ipo`: that of Azar et al. 2023, of log-probabilities per token."""
    input: str = "{prompt}"
    """Template of what the model reads, with `{column}` placeholders, where answers are texts."""
    chosen: str = "{chosen}"
    """Template of the preferred answer (an end-of-text token is added)."""
    rejected: str = "{rejected}"
    """Template of the other answer."""
    max_tokens: Annotated[int, Field(gt=1)] = 1024
    """The most tokens of a prompt with the longer of its answers."""
    too_long: Literal["drop_turns", "refuse"] = "drop_turns"
    """What becomes of longer ones. `drop_turns`: a conversation loses its earliest questions with
    their answers, whole, and a text its left end; answers are never cut. `refuse`: the run ends
    with an error."""
    metrics: list[MetricName] = Field(
        default=["preference_accuracy", "reward_margin"], min_length=1
    )
    """`preference_accuracy`: share of pairs whose chosen answer the adapter has raised more, beside
    the base. `reward_margin`: by how many nats more, times `beta`. `ranking_accuracy`: share of
    pairs whose chosen answer is the likelier one. The first is *the score* in tables."""
    _judged: ClassVar[Judged] = "pair"

    _metrics_are_known = field_validator("metrics")(_require_metrics)


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
    _judged: ClassVar[Judged]

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
    _judged: ClassVar[Judged] = "label"


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
    _judged: ClassVar[Judged] = "words"


Task = (
    GenerationTask
    | ChatTask
    | PreferenceTask
    | ClassificationTask
    | SequenceClassificationTask
    | TokenClassificationTask
)
