"""Is an adapter what it says: its files, its base, its scores?

Three depths: what the files alone show, what loading it on its base shows, and what running its
recipe's test again shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ptkit.errors import AdapterError, DataError, PtkitError
from ptkit.evaluation.evaluate import evaluate_saved
from ptkit.evaluation.statistics import Interval
from ptkit.formats.adapter_files import AdapterFiles, read_adapter
from ptkit.formats.adapter_folder import (
    INFO,
    RECIPE,
    base_revision,
    is_pickle,
    is_pickled_weights,
    sha256,
    weights_path,
)
from ptkit.formats.figures import RecordedScore
from ptkit.formats.hub import is_on_hub
from ptkit.formats.hub_repository import HubId, hub_files
from ptkit.formats.places import find_adapter
from ptkit.methods import (
    adapter_from_files,
    base_of,
    compile_files,
    parts_of,
    require_same_base,
)
from ptkit.methods.base_names import same_name
from ptkit.methods.head import TrainedHead, with_saved_head
from ptkit.recipe.load import LoadedRecipe, load_recipe
from ptkit.runtime.base_model import Base
from ptkit.training.experiment import prepare
from ptkit.training.own_recipe import own_recipe

#: Of a score's interval: how far a second reading of the same rows may be from the first. The
#: interval is about other rows; these are the same, decoded greedily, so only rounding differs.
TOLERANCE = 0.25


@dataclass(frozen=True)
class Check:
    """One thing that was looked at. passed: None where it could not be, `detail` says why."""

    name: str
    passed: bool | None
    detail: str


@dataclass(frozen=True)
class Verification:
    """What was found about one adapter."""

    adapter: str
    path: Path
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(check.passed is not False for check in self.checks)

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        return {
            "adapter": self.adapter,
            "passed": self.passed,
            "checks": [vars(check) for check in self.checks],
        }


def verify(
    source: str | Path,
    *,
    model: str | None = None,
    base: Base | None = None,
    score: bool = False,
    recipe: str | Path | None = None,
) -> Verification:
    """Check the adapter `source`, a folder or a hub id `user/repo[@revision]`.

    model: id of the base to check it on; default: the one it names. base: a loaded one instead
    score: run its recipe's test again and compare with the scores it claims
    recipe: a recipe file to use instead of the adapter's own

    A fault of the adapter is a failed check, never an exception; raises PtkitError when the
    adapter cannot be found or its base not loaded.
    """
    path = find_adapter(Path(source), whole=True)
    checks = list(check_files(path, str(source)))
    if all(check.passed is not False for check in checks):
        files = read_adapter(path)
        if base is None:
            base = base_of(files, model, str(source))
        checks += _check_base(files, base, str(source), chosen=model is not None)
        if score and all(check.passed is not False for check in checks):
            checks += _check_scores(path, files, base, recipe)
    return Verification(str(source), path, tuple(checks))


def check_files(path: Path, source: str) -> Iterator[Check]:
    """What the files in the adapter folder `path` show without any model."""
    try:
        files = read_adapter(path)
    except AdapterError as error:
        yield Check("files", False, str(error))
        return
    values = sum(t.numel() for t in files.tensors.values())
    weights = weights_path(path)
    yield Check(
        "files", True, f"{files.peft_type}, {values:,} finite values, {weights.stat().st_size:,} B"
    )
    names = [p.relative_to(path).as_posix() for p in path.rglob("*")]
    if is_on_hub(source):
        try:
            names = hub_files(HubId.read(source))
        except PtkitError as error:
            yield Check("no pickle", None, f"the repository's list of files: {error}")
            names = []
    pickles = sorted(filter(is_pickle, names))
    weights_too = [name for name in pickles if is_pickled_weights(name)]
    if weights_too:
        yield Check("no pickle", False, f"{', '.join(weights_too)} can run code when opened")
    elif pickles:
        yield Check(
            "no pickle", None,
            f"{', '.join(pickles)} can run code when opened; neither ptkit nor PEFT opens it",
        )  # fmt: skip
    elif names:
        yield Check("no pickle", True, "only files that cannot run code")
    yield from _check_record(files, weights)


def _check_record(files: AdapterFiles, weights: Path) -> Iterator[Check]:
    info = files.info
    if info.empty:
        yield Check("record", None, f"no {INFO}: nothing says how it was made or what it scored")
        return
    if info.weights is None:
        yield Check("weights", None, f"{INFO} holds no digest of the weights")
    else:
        same = (weights.name, sha256(weights)) == (info.weights.file, info.weights.sha256)
        yield Check(
            "weights", same,
            "those the record was written for" if same else
            f"{weights.name} is not the file that {INFO} was written for",
        )  # fmt: skip
    if info.metrics is None:
        return
    faults = _score_faults(info.metrics, info.n_test)
    if faults:
        yield Check("claims", False, "; ".join(faults))
    elif info.metrics:
        said = ", ".join(f"{name} {score.value:.2f}" for name, score in info.metrics.items())
        yield Check("claims", True, f"{said} on {info.n_test} rows")


def _score_faults(scores: Mapping[str, RecordedScore], rows: int | None) -> list[str]:
    """What is wrong with the scores an adapter claims."""
    faults = [] if rows is not None and rows > 0 else ["no number of test rows"]
    for name, score in scores.items():
        if score.low is None or score.high is None:
            if rows != 1:  # which has none: it does not show how far rows differ
                faults.append(f"`{name}` has no value with an interval")
        elif not score.low <= score.value <= score.high:
            faults.append(f"`{name}` = {score.value} is outside its own interval")
    return faults


def _check_base(files: AdapterFiles, base: Base, source: str, *, chosen: bool) -> Iterator[Check]:
    try:
        require_same_base(files, base, source, chosen=chosen)
    except AdapterError as error:
        yield Check("base", False, str(error))
        return
    made_for = files.info.base
    if made_for.fingerprint:
        yield Check("base", True, f"{base.id}, weights {base.fingerprint}")
    else:
        yield Check("base", None, _by_name(files, base))
    if made_for.tokenizer:
        same = made_for.tokenizer == base.tokenizer_fingerprint
        found = f"vocabulary {base.tokenizer_fingerprint}"
        yield Check("tokenizer", same, found if same else f"{found}, not {made_for.tokenizer}")
    try:
        detail = _fit(files, base)
        if base.head is not None:
            TrainedHead(with_saved_head(base, files)).load(files)
    except AdapterError as error:
        yield Check("shapes", False, str(error))
        return
    if base.head is not None:
        detail += f", a head for {len(base.head.labels)} labels"
    yield Check("shapes", True, detail)


def _by_name(files: AdapterFiles, base: Base) -> str:
    """What is known of the base of an adapter without a fingerprint of it."""
    name, revision = files.base_id, base_revision(files.config, files.info)
    if not name:
        return f"{base.id} by your choice: the adapter names no base, and has no fingerprint of it"
    if not same_name(name, base):
        return f"{base.id} by your choice: the adapter names `{name}`, and has no fingerprint of it"
    here = base.id if base.revision is None else f"{base.id} at {base.revision}"
    if revision != base.revision:
        here += f" (the adapter names the revision {revision or 'main'})"
    return f"{here} by name only: the adapter has no fingerprint of it"


def _fit(files: AdapterFiles, base: Base) -> str:
    """How the adapter fits `base`. Raises AdapterError when it does not."""
    if len(parts_of(files)) > 1:  # nothing less than all of it shows that they fit together
        adapter = adapter_from_files(files, base)
        adapter.close()
        return f"{adapter.virtual_tokens} virtual tokens, matrices fit the base's modules"
    compiled = compile_files(files, base)
    if compiled is None:
        return "matrices fit the base's modules"
    return f"{compiled.virtual_tokens} virtual tokens in {len(compiled.layout)} layers"


def _check_scores(
    path: Path, files: AdapterFiles, base: Base, recipe: str | Path | None
) -> Iterator[Check]:
    info = files.info
    if not info.metrics:
        yield Check("score", None, "no score is claimed")
        return
    loaded = recipe_of(path, recipe)
    try:
        experiment = prepare(loaded, base)
    except DataError as error:
        raise DataError(f"{error}; a recipe that finds its data here: --recipe FILE") from error
    evaluation = evaluate_saved(experiment, path)
    if len(evaluation.predictions) != info.n_test:
        rows = len(evaluation.predictions)
        said = f"claimed on {info.n_test} rows, the recipe's test has {rows}"
        yield Check("score", False, said)
        return
    for name, found in evaluation.metrics.items():
        if name not in info.metrics:
            yield Check(f"score: {name}", None, f"{found.mean:.2f} here, nothing is claimed")
            continue
        yield _reproduced(name, info.metrics[name], found)
    if evaluation.retention is not None and info.retention is not None:
        here, claimed = evaluation.retention.overall.forgetting, info.retention.forgetting
        same: bool | None = abs(here - claimed) <= 0.02 + 0.05 * abs(claimed)
        detail = f"{here:+.3f} here, {claimed:+.3f} claimed"
        if info.retention.lead != evaluation.retention.lead:
            same = None
            detail += ", measured by an earlier version without the begin-of-text token"
        yield Check("forgetting", same, detail)


def _reproduced(name: str, claimed: RecordedScore, found: Interval) -> Check:
    """Whether a score read again is the claimed one, but for rounding."""
    low, high = claimed.low, claimed.high
    if low is None or high is None:  # of one row; `_score_faults` has looked
        low = high = claimed.value
    allowed = max(TOLERANCE * (high - low), 1e-6)
    near = abs(found.mean - claimed.value) <= allowed
    same = near and (low == high or low <= found.mean <= high)
    detail = f"{found.mean:.2f} here, {claimed.shown} claimed (n={found.n_examples})"
    return Check(f"score: {name}", same, detail)


def recipe_of(path: Path, given: str | Path | None) -> LoadedRecipe:
    """The recipe whose test is run: `given`, or that in `path`. Raises UserError for one there that
    would run a stranger's choice of code, AdapterError without one, DataError without its data."""
    if given is not None:
        return load_recipe(given)
    if not (path / RECIPE).is_file():
        raise AdapterError(f"{path} has no {RECIPE}; give the recipe with --recipe FILE")
    return own_recipe(path, otherwise="give a recipe with --recipe FILE")
