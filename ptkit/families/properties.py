"""What is asked of every method on every family: one function per property.

Each takes a `PropertyCase` and raises `Mismatch` when the answer is wrong by the oracle. Whatever
the program under test raises itself is the caller's to record.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptkit.families.candidate import Candidate
from ptkit.families.model_under_test import ModelUnderTest, NotApplicable, TokenRow
from ptkit.families.oracle import Merged
from ptkit.families.property_case import (
    EQUAL,
    LENGTHS,
    NEW_TOKENS,
    TOLERANCE,
    Mismatch,
    PropertyCase,
    check_logits,
    check_tokens,
    require_close,
    require_equal,
    require_going_on,
    require_of_base,
    require_words,
    trained,
)
from ptkit.runtime.attention_choice import attention_of

#: The longest row an attention is written out for, in words.
_LONG = 1024
#: Share of trained values that may be without a gradient in a step (units that are off).
_DEAD = 0.4


Property = Callable[[PropertyCase], None]
PROPERTIES: dict[str, Property] = {}


def _property(title: str) -> Callable[[Property], Property]:
    def add(check: Property) -> Property:
        PROPERTIES[title] = check
        return check

    return add


@_property("exact")
def exact(trial: PropertyCase) -> None:
    """Logits and loss of rows of one length are the oracle's."""
    candidate = trial.candidate()
    rows = trial.tested.rows((9, 6), (9, 6))
    check_logits(candidate, rows, left=False, what="equal lengths")
    right = [candidate.oracle.logits(row).float() for row in rows]
    targets = torch.tensor([token for row in rows for token in row.answer])
    expected = torch.nn.functional.cross_entropy(torch.cat(right), targets.to(right[0].device))
    found = candidate.loss(rows).detach()
    if not abs(float(found - expected)) <= TOLERANCE * max(1.0, float(expected)):
        raise Mismatch(f"loss {float(found):.4f}, expected {float(expected):.4f}")


@_property("padding")
def padding(trial: PropertyCase) -> None:
    """Rows of unequal lengths, padded on either side, get the logits they get alone (encoders and
    classifiers: at the right)."""
    candidate = trial.candidate()
    rows = trial.tested.rows(*LENGTHS)
    check_logits(candidate, rows, left=False, what="padded at the right")
    if trial.tested.kind.padded_left:
        check_logits(candidate, rows, left=True, what="padded at the left")


@_property("whole length")
def whole_length(trial: PropertyCase) -> None:
    """A row as long as the model was made for is read beside the virtual tokens, too (asked where
    these take no positions)."""
    tested = trial.tested
    if tested.kind.takes_positions:
        raise NotApplicable("virtual tokens take positions, as words do")
    row = _longest(tested)
    candidate = trial.candidate()
    check_logits(candidate, [row], left=False, what=f"{len(row.input)} words")


@_property("gradients")
def gradients(trial: PropertyCase) -> None:
    """The gradient is the loss's slope, along itself and along a random direction, by central
    differences in float64; the base gets none."""
    candidate = trained(trial)
    candidate.model.double()
    if candidate.model._can_set_experts_implementation():
        candidate.model.set_experts_implementation("eager")  # others have no float64
    rows = trial.tested.rows((7, 4), (7, 4))
    with candidate.training(checkpointed=False):
        candidate.loss(rows).backward()
        parameters = candidate.parameters()
        own = {id(p) for p in parameters.values()}
        if any(p.grad is not None for p in candidate.model.parameters() if id(p) not in own):
            raise Mismatch("the base got gradients")
        slopes = {n: p.grad for n, p in parameters.items() if p.grad is not None}
        if not slopes or not any(bool(g.abs().max() > 0) for g in slopes.values()):
            raise Mismatch("nothing that is trained got a gradient")
        dead = sum(int((g == 0).sum()) for g in slopes.values())
        # Units of a head may well be off for two rows.
        writes = trial.tested.kind.head is None
        if writes and dead > _DEAD * sum(g.numel() for g in slopes.values()):
            raise Mismatch("half of what is trained never gets a gradient")
        length = float(torch.cat([g.flatten() for g in slopes.values()]).norm())
        generator = torch.Generator().manual_seed(5)
        noise = {n: torch.randn(p.shape, generator=generator).to(p) for n, p in parameters.items()}
        size = float(torch.cat([v.flatten() for v in noise.values()]).norm())
        for direction in (
            {n: g / length for n, g in slopes.items()},
            {n: v / size for n, v in noise.items()},
        ):
            _check_slope(candidate, rows, direction, length)


def _check_slope(
    candidate: Candidate, rows: Sequence[TokenRow], direction: dict[str, Tensor], length: float
) -> None:
    parameters = candidate.parameters()
    expected = 0.0
    for name, change in direction.items():
        gradient = parameters[name].grad
        if gradient is not None:
            expected += float((gradient * change).sum())
    # A long step tells a slope from rounding; over it the loss of a mixture of experts may jump,
    # where another expert is chosen, and then a short one tells.
    for step in (2e-3, 1e-4):
        slope = _slope(candidate, rows, direction, step)
        if abs(slope - expected) <= 0.03 * length + 1e-4:
            return
    raise Mismatch(f"gradient {expected:.4g} along a direction of slope {slope:.4g}")


@torch.no_grad()
def _slope(
    candidate: Candidate, rows: Sequence[TokenRow], direction: dict[str, Tensor], step: float
) -> float:
    """The central difference of the loss along `direction`."""
    parameters = candidate.parameters()
    losses = []
    for sign in (1, -2):
        for name, change in direction.items():
            parameters[name].add_(sign * step * change)
        losses.append(float(candidate.loss(rows)))
    for name, change in direction.items():
        parameters[name].add_(step * change)
    return (losses[0] - losses[1]) / (2 * step)


@_property("checkpointing")
def checkpointing(trial: PropertyCase) -> None:
    """Gradient checkpointing changes neither the loss nor the gradients."""
    trained(trial)
    rows = trial.tested.rows(*LENGTHS[:2])

    def step(checkpointed: bool) -> tuple[Tensor, list[Tensor | None]]:
        candidate = trial.candidate()
        with candidate.training(checkpointed=checkpointed):
            loss = candidate.loss(rows)
            loss.backward()
        found = [p.grad for p in candidate.parameters().values()]
        return loss.detach(), found

    plain, expected = step(False)
    again, found = step(True)
    if not bool((plain - again).abs() <= TOLERANCE * max(1.0, float(plain))):
        raise Mismatch(f"loss {float(again):.4f} with checkpointing, {float(plain):.4f} without")
    for one, other in zip(found, expected, strict=True):
        if (one is None) != (other is None) or (
            one is not None
            and other is not None
            and not bool((one - other).norm() <= 1e-3 * other.norm() + 1e-7)
        ):
            raise Mismatch("gradients differ with checkpointing")


@_property("generation")
def generation(trial: PropertyCase) -> None:
    """Greedy tokens are the oracle's (inputs of one length, here and below)."""
    check_tokens(trial, "greedy search")


@_property("padded generation")
def padded_generation(trial: PropertyCase) -> None:
    """So they are in a batch of unequal inputs, row by row."""
    check_tokens(trial, "padded batch", lengths=LENGTHS)


@_property("beams")
def beams(trial: PropertyCase) -> None:
    """Beam search finds what it finds over the oracle."""
    require_words(trial)
    candidate = trial.candidate()
    inputs = [row.input for row in trial.tested.rows(*EQUAL)]
    found = candidate.generate(inputs, max_new_tokens=4, num_beams=3)
    expected = [candidate.oracle.beam(read, 4, 3) for read in inputs]
    require_equal(found, expected, "beam search")


@_property("static cache")
def static_cache(trial: PropertyCase) -> None:
    """A cache of fixed size gives the same tokens."""
    require_going_on(trial)
    require_of_base(trial, cache_implementation="static")
    check_tokens(trial, "static cache", cache_implementation="static")


@_property("no cache")
def no_cache(trial: PropertyCase) -> None:
    """So does reading everything again at every token."""
    check_tokens(trial, "no cache", use_cache=False)


@_property("lookup")
def lookup(trial: PropertyCase) -> None:
    """So does prompt lookup decoding (drafts of the answer copied from the input)."""
    require_words(trial)
    require_of_base(trial, prompt_lookup_num_tokens=2)
    candidate = trial.candidate()
    word = trial.tested.rows((3, 1))[0].input
    (found,) = candidate.generate([word * 3], max_new_tokens=NEW_TOKENS, prompt_lookup_num_tokens=2)
    require_equal([found], [candidate.oracle.greedy(word * 3, NEW_TOKENS)], "prompt lookup")


@_property("turns")
def turns(trial: PropertyCase) -> None:
    """A second turn on the cache of the first answers as if everything had been read at once."""
    require_going_on(trial)
    candidate = trial.candidate()
    first, second = (row.input for row in trial.tested.rows((6, 1), (5, 1)))
    found = candidate.turns([first, second], 5)
    said = candidate.oracle.greedy(first, 5)
    expected = [said, candidate.oracle.greedy([*first, *said, *second], 5)]
    require_equal(found, expected, "conversation")


@_property("saved")
def saved(trial: PropertyCase) -> None:
    """Saved and read back on the base loaded anew, it gives the oracle's logits. Only a part of a
    head that the pretrained checkpoint has no weights for is at random there."""
    candidate = trained(trial)
    rows = trial.tested.rows((8, 4))
    with tempfile.TemporaryDirectory() as folder:
        again = candidate.reloaded(Path(folder))
    found = again.logits(rows, left=False)
    require_close(found[0], candidate.oracle.logits(rows[0]), "read back")


@_property("off")
def off(trial: PropertyCase) -> None:
    """Switched off, the base's logits are bit for bit those from before, its words the same (with a
    classification head: those of the base's own)."""
    (row,) = trial.tested.rows((8, 4))
    base = Merged(trial.tested.base().model)
    before = base.logits(row)
    candidate = trial.candidate()
    on = candidate.logits([row], left=False)[0]
    with candidate.off() as model:
        after = Merged(model).logits(row)
        again = None if row.labelled else _four_words(model, row)
    if torch.equal(on, before):
        raise Mismatch("the adapter did nothing while it was on")
    if not torch.equal(after, before):
        raise Mismatch("the base is not what it was")
    if again is not None:
        written = base.greedy(row.input, 4)
        require_equal([again], [written], "generation without the adapter")


def _four_words(model: Any, row: TokenRow) -> list[int]:
    written = model.generate(
        input_ids=torch.tensor([row.input], device=model.device), max_new_tokens=4,
        do_sample=False, eos_token_id=None,
    )  # fmt: skip
    return [int(token) for token in written[0, -4:]]


@_property("other attention")
def other_attention(trial: PropertyCase) -> None:
    """Eager attention gives the same (or sdpa, for a model whose own is eager)."""
    own = attention_of(trial.tested.base().model)
    other = trial.tested.attending("sdpa" if own == "eager" else "eager")
    candidate = trial.make(other)
    check_logits(candidate, other.rows(*LENGTHS), left=False, what="other attention")


@_property("bfloat16")
def bfloat16(trial: PropertyCase) -> None:
    """In bfloat16 it is no further from the truth than the plain base is."""
    rows = trial.tested.rows(*LENGTHS)
    precise = trial.candidate()
    rounded = trial.make(replace(trial.tested, dtype=torch.bfloat16))
    found = torch.cat([t.float() for t in rounded.logits(rows, left=False)])
    right = torch.cat([precise.oracle.logits(row).float() for row in rows])
    plain = torch.cat([rounded.oracle.logits(row).float() for row in rows])
    allowed = 2 * float((plain - right).norm()) + 0.01 * float(right.norm())
    error = float((found - right).norm())
    if not error <= allowed:
        raise Mismatch(f"bfloat16 is off by {error:.2g}, the plain base by {allowed:.2g}")


@_property("tied")
def tied(trial: PropertyCase) -> None:
    """The same with input and output embeddings shared, where they were not, or the reverse."""
    require_words(trial)
    config = trial.tested.config
    if config is None:
        raise NotApplicable("asked of small models")
    other = trial.tested.changed(tie_word_embeddings=not config.tie_word_embeddings)
    model: Any = other.base().model
    reader = model.get_encoder() if config.is_encoder_decoder else model
    if reader.get_input_embeddings().weight is not model.get_input_embeddings().weight:
        raise NotApplicable("untied, the encoder would have words of its own")
    candidate = trial.make(other)
    check_logits(candidate, other.rows((9, 6), (9, 6)), left=False, what="embeddings")


def _longest(tested: ModelUnderTest) -> TokenRow:
    """The longest row that the plain base reads. Raises NotApplicable where there is none."""
    base = tested.base()
    if base.max_positions is None:
        raise NotApplicable(f"{type(base.model).__name__} has positions without end")
    if base.max_positions > _LONG:
        raise NotApplicable(f"asked up to {_LONG} words")
    # Tables of positions keep places for other things, in some families.
    for length in range(base.max_positions, base.max_positions - 4, -1):
        (row,) = tested.rows((length, 4))
        try:
            Merged(base.model).logits(row)
        except (IndexError, RuntimeError):
            continue
        return row
    raise NotApplicable(f"the plain base does not read {base.max_positions} words")
