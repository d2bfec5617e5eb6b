"""Pre-trains `tiny-en`, the small causal language model that this project embeds.

    python scripts/pretrain_tiny_en.py --corpus DIR --out DIR --work DIR --steps 7000 \
        --decay-steps 1800 --eval-text wikitext2_test.txt

A Qwen3 model of about 6.8 million parameters, a byte-level BPE of 8192 tokens; 70 % of the
sequences come from the corpus, 30 % from the generated text-to-text mix (see text_to_text_mix).
Muon for the matrices of the layers, AdamW for the rest; warm-up, constant, linear decay at the end.

The work directory gets the caches, the log and a checkpoint every few hundred steps.  `--resume`
goes on from the newest one exactly; other `--steps` are harmless as long as the decay has not
begun.  A terminated run (SIGTERM) writes a checkpoint first.  `--export-only` writes the finished
model directory from the newest checkpoint without training.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from pretrain_data import WINDOW, Batches, load_tokenizer, prepare, split_corpus
from safetensors.torch import load_file, save_file
from torch.nn import functional
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

CARD = Path(__file__).with_name("tiny_en_card.md")
LAYER_MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="directory of *.txt")
    parser.add_argument("--out", type=Path, required=True, help="finished model directory")
    parser.add_argument("--work", type=Path, help="caches, checkpoints, log (default: OUT-work)")
    parser.add_argument("--eval-text", type=Path, help="a text for evaluation, never trained on")
    parser.add_argument("--steps", type=int, default=7000)
    parser.add_argument("--decay-steps", type=int, default=1800)
    parser.add_argument("--warmup-steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16, help="sequences of 512 tokens a step")
    parser.add_argument("--short-window", type=int, default=256, help="until the decay begins")
    parser.add_argument("--mix-share", type=float, default=0.3)
    parser.add_argument("--mix-tokens", type=int, default=18_000_000)
    parser.add_argument("--muon-lr", type=float, default=0.02)
    parser.add_argument("--adam-lr", type=float, default=3e-3)
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--checkpoint-every", type=int, default=200)
    parser.add_argument("--eval-every", type=int, default=500)
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint")
    parser.add_argument("--export-only", action="store_true", help="write OUT, train nothing")
    parser.add_argument("--skip-evaluation", action="store_true", help="export without figures")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    args.work = args.work or args.out.with_name(args.out.name + "-work")
    return args


# ---------------------------------------------------------------- model and optimisers


def build_model(width: int, layers: int, vocab: int, end: int, pad: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocab,
        hidden_size=width,
        num_hidden_layers=layers,
        intermediate_size=3 * width,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        head_dim=32,
        tie_word_embeddings=True,
        max_position_embeddings=WINDOW,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=pad,
    )
    return Qwen3ForCausalLM(config)


def blocked_attention(module, query, key, value, mask, scaling=None, **kwargs):
    """Causal attention in blocks of 128 queries: a third of the time of the CPU's SDPA kernel.

    For whole sequences without padding on the left and without a cache, as in training.
    """
    groups, length, block = query.shape[1] // key.shape[1], query.shape[2], 128
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    parts = []
    for start in range(0, length, block):
        end = min(start + block, length)
        scores = torch.matmul(query[:, :, start:end], key[:, :, :end].transpose(-1, -2)).float()
        later = torch.full((end - start, end), -1e9).triu(start + 1)
        weights = torch.softmax(scores * scaling + later, dim=-1).to(value.dtype)
        parts.append(torch.matmul(weights, value[:, :, :end]))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register("blocked", blocked_attention)
AttentionMaskInterface.register("blocked", lambda *args, **kwargs: None)


def optimisers(model: Qwen3ForCausalLM, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    matrices, tables, norms = [], [], []
    for name, weight in model.named_parameters():
        if any(part in name for part in LAYER_MATRICES):
            matrices.append(weight)
        else:
            (tables if weight.ndim == 2 else norms).append(weight)
    adam = torch.optim.AdamW(
        [
            {"params": tables, "weight_decay": args.weight_decay},
            {"params": norms, "weight_decay": 0.0},
        ],
        lr=args.adam_lr,
        betas=(0.9, 0.95),
        fused=True,
    )
    muon = torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=args.weight_decay)
    return [muon, adam]


def rate(step: int, args: argparse.Namespace) -> float:
    """Warm-up, constant, linear decay to almost zero over the last steps."""
    up = (step + 1) / args.warmup_steps
    down = (args.steps - step) / args.decay_steps
    return min(1.0, up, down)


def loss_of(model: Qwen3ForCausalLM, ids: torch.Tensor, window: int) -> torch.Tensor:
    """Mean loss of `[batch, 513]` ids, read in pieces of `window` tokens."""
    inputs, targets = ids[:, :-1].reshape(-1, window), ids[:, 1:].reshape(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = model(input_ids=inputs, use_cache=False).logits
    return functional.cross_entropy(logits.float().flatten(0, 1), targets)


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(work: Path, step: int, model, optimizers, args) -> None:
    """Written beside its final name, flushed to disk, then renamed; the newest three are kept."""
    final = work / "checkpoints" / f"step-{step:06d}"
    partial = final.with_name(final.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    weights = {n: p.detach().contiguous() for n, p in model.named_parameters()}
    save_file(weights, partial / "model.safetensors", metadata={"format": "pt"})
    state = {"optimizers": [o.state_dict() for o in optimizers], "rng": torch.get_rng_state()}
    torch.save(state, partial / "state.pt")
    facts = {"step": step, "arguments": {k: str(v) for k, v in vars(args).items()}}
    facts |= {"width": args.width, "layers": args.layers, "batch": args.batch}
    (partial / "step.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")
    for path in partial.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    if final.exists():
        shutil.rmtree(final)
    partial.replace(final)
    for old in checkpoints(work)[:-3]:
        shutil.rmtree(old)


def checkpoints(work: Path) -> list[Path]:
    return sorted(p for p in (work / "checkpoints").glob("step-*") if p.suffix != ".partial")


def load_weights(model: Qwen3ForCausalLM, checkpoint: Path) -> int:
    weights = load_file(checkpoint / "model.safetensors")
    missing, unexpected = model.load_state_dict(weights, strict=False)
    if unexpected or set(missing) - {"lm_head.weight"}:
        raise SystemExit(f"{checkpoint} does not fit the model: {missing}, {unexpected}")
    return int(json.loads((checkpoint / "step.json").read_text(encoding="utf-8"))["step"])


# ---------------------------------------------------------------- evaluation


@torch.no_grad()
def nats(model, ids: list[int], autocast: bool = False, batch: int = 8) -> float:
    """Negative log-likelihood of `ids` but the first, in windows of 512 that move by 256."""
    stride, total = WINDOW // 2, 0.0
    windows = []
    for start in range(0, max(1, len(ids) - 1 - stride), stride):
        chunk = ids[start : start + WINDOW + 1]
        windows.append((chunk, 0 if start == 0 else WINDOW - stride))
    for first in range(0, len(windows), batch):
        group = windows[first : first + batch]
        longest = max(len(chunk) for chunk, _ in group)
        padded = torch.tensor([chunk + [-100] * (longest - len(chunk)) for chunk, _ in group])
        inputs, targets = padded[:, :-1].clamp(min=0), padded[:, 1:].clone()
        for row, (_, skip) in enumerate(group):
            targets[row, :skip] = -100  # scored by the window before
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
            logits = model(input_ids=inputs, use_cache=False).logits
        losses = functional.cross_entropy(
            logits.float().transpose(1, 2), targets, ignore_index=-100, reduction="sum"
        )
        total += losses.item()
    return total


def bits_per_byte(model, tokenizer, texts: list[str], autocast: bool = False) -> tuple[float, int]:
    """(bits in all, bytes in all) of texts that are scored one by one."""
    bits, size = 0.0, 0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        bits += nats(model, [tokenizer.eos_token_id, *ids], autocast) / math.log(2)
        size += len(text.encode())
    return bits, size


@torch.no_grad()
def induction(model, length: int = 100, rows: int = 32) -> tuple[float, float]:
    """Loss on a run of random tokens and on its repetition right after."""
    generator = torch.Generator().manual_seed(5)
    run = torch.randint(2, model.config.vocab_size, (rows, length), generator=generator)
    start = torch.full((rows, 1), model.config.eos_token_id)
    ids = torch.cat([start, run, run], dim=1)
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    losses = functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
    return losses[:, :length].mean().item(), losses[:, length:].mean().item()


def full_evaluation(model, tokenizer, args: argparse.Namespace) -> dict:
    model.eval()
    model.set_attn_implementation("sdpa")
    _, held = split_corpus(args.corpus)
    files = {name: bits_per_byte(model, tokenizer, texts) for name, texts in held.items()}
    bits, size = (sum(column) for column in zip(*files.values(), strict=True))
    report: dict = {"held_out_bits_per_byte": bits / size, "held_out_bytes": size}
    report["files"] = {name: b / s for name, (b, s) in files.items()}
    if args.eval_text:
        extra = bits_per_byte(model, tokenizer, [args.eval_text.read_text(encoding="utf-8")])
        report["eval_text"] = args.eval_text.stem
        report["eval_text_bits_per_byte"] = extra[0] / extra[1]
        report["eval_text_bytes"] = extra[1]
    first, second = induction(model)
    report |= {"induction_first": first, "induction_second": second}
    model.train()
    return report


def quick_evaluation(model, tokenizer, held: dict[str, list[str]], work: Path) -> str:
    """Held-out bits per byte on one block of each file, loss on generated text, induction."""
    model.eval()
    bits, size = bits_per_byte(model, tokenizer, [t[0] for t in held.values()], autocast=True)
    generated = np.fromfile(work / "mix_held.bin", dtype=np.uint16)[: 16 * WINDOW].tolist()
    loss = nats(model, generated, autocast=True) / (len(generated) - 1)
    first, second = induction(model)
    model.train()
    return (
        f"held-out {bits / size:.4f} bits/byte · generated held-out loss {loss:.4f} · "
        f"induction {first:.2f} -> {second:.2f}"
    )


# ---------------------------------------------------------------- training


def train(model, tokenizer, args: argparse.Namespace) -> int:
    batches = Batches(args.work, args.batch, args.mix_share, args.seed)
    _, held = split_corpus(args.corpus)
    optimizers = optimisers(model, args)
    base = [[group["lr"] for group in o.param_groups] for o in optimizers]
    step, found = 0, checkpoints(args.work)
    if found and not args.resume:
        raise SystemExit(f"{args.work} has checkpoints; add --resume to go on from the newest")
    if found:
        step = load_weights(model, found[-1])
        state = torch.load(found[-1] / "state.pt", weights_only=True)
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        say(f"resumed at step {step}")
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    objective = loss_of if args.no_compile else torch.compile(loss_of, dynamic=False)
    losses: list[float] = []
    began, since = time.monotonic(), step
    model.set_attn_implementation("blocked")
    model.train()
    while step < args.steps and not stop:
        factor = rate(step, args)
        for optimizer, rates in zip(optimizers, base, strict=True):
            for group, value in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = value * factor
        # Short pieces are a third faster; the full window comes with the decay.
        window = args.short_window if step < args.steps - args.decay_steps else WINDOW
        loss = objective(model, torch.from_numpy(batches(step)), window)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"loss is {losses[-1]} at step {step}")
        step += 1
        if step % 20 == 0 or step == args.steps:
            speed = (step - since) * args.batch * WINDOW / (time.monotonic() - began)
            mean = sum(losses) / len(losses)
            say(f"step {step} · loss {mean:.4f} · rate {factor:.3f} · {speed:,.0f} tokens/s")
            losses = []
        pause = time.monotonic()
        if step % args.eval_every == 0:
            say(f"step {step} · {quick_evaluation(model, tokenizer, held, args.work)}")
        if step % args.checkpoint_every == 0 or step == args.steps:
            save_checkpoint(args.work, step, model, optimizers, args)
        if step % 20 == 0:
            began, since = time.monotonic(), step
        else:
            began += time.monotonic() - pause
    if stop:
        save_checkpoint(args.work, step, model, optimizers, args)
        raise SystemExit(f"terminated; checkpoint written at step {step}")
    return step


def say(text: str) -> None:
    print(time.strftime("%H:%M:%S"), text, flush=True)


# ---------------------------------------------------------------- the finished directory


def export(model, tokenizer, report: dict, step: int, args: argparse.Namespace) -> None:
    """bf16 weights without a copy of the tied table, configuration, tokenizer, card."""
    args.out.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(args.out)
    weights = {
        name: weight.detach().to(torch.bfloat16).contiguous()
        for name, weight in model.named_parameters()
        if name != "lm_head.weight"
    }
    save_file(weights, args.out / "model.safetensors", metadata={"format": "pt"})
    model.config.architectures = ["Qwen3ForCausalLM"]
    model.config.dtype = torch.bfloat16
    model.config.save_pretrained(args.out)
    ids = {k: getattr(model.config, k) for k in ("bos_token_id", "eos_token_id", "pad_token_id")}
    GenerationConfig(**ids).save_pretrained(args.out)
    (args.out / "model.safetensors").chmod(0o644)
    (args.out / "README.md").write_text(card(model, report, step, args), encoding="utf-8")
    size = sum(p.stat().st_size for p in args.out.iterdir()) / 1e6
    if size > 20:
        raise SystemExit(f"{args.out} has {size:.1f} MB; at most 20 MB are allowed")
    say(f"exported step {step} to {args.out}: {size:.1f} MB")


def card(model, report: dict, step: int, args: argparse.Namespace) -> str:
    def figure(name: str, form: str) -> str:
        return format(report[name], form) if name in report else "not measured"

    tokens = step * args.batch * WINDOW
    rows = "\n".join(f"| {n} | {v:.3f} |" for n, v in sorted(report.get("files", {}).items()))
    extra = ""
    if "eval_text" in report:
        value, size = report["eval_text_bits_per_byte"], report["eval_text_bytes"]
        extra = f"- `{report['eval_text']}` ({size:,} bytes, never trained on): **{value:.3f}**\n"
    return CARD.read_text(encoding="utf-8").format(
        parameters=f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f}",
        steps=f"{step:,}",
        tokens=f"{tokens / 1e6:.1f}",
        corpus_tokens=f"{tokens * (1 - args.mix_share) / 1e6:.1f}",
        mix_tokens=f"{tokens * args.mix_share / 1e6:.1f}",
        share=f"{args.mix_share * 100:.0f}",
        rest=f"{100 - args.mix_share * 100:.0f}",
        muon=args.muon_lr,
        adam=args.adam_lr,
        decay=args.weight_decay,
        held=figure("held_out_bits_per_byte", ".3f"),
        held_bytes=figure("held_out_bytes", ","),
        extra=extra,
        rows=rows,
        first=figure("induction_first", ".2f"),
        second=figure("induction_second", ".2f"),
    )


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    prepare(args.corpus, args.work, args.mix_tokens, args.seed)
    tokenizer = load_tokenizer(args.work)
    model = build_model(
        args.width, args.layers, len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id
    )
    if args.export_only:
        found = checkpoints(args.work)
        if not found:
            raise SystemExit(f"no checkpoint in {args.work}")
        step = load_weights(model, found[-1])
        used = json.loads((found[-1] / "step.json").read_text(encoding="utf-8"))["arguments"]
        for name in ("batch", "mix_share", "muon_lr", "adam_lr", "weight_decay"):
            setattr(args, name, type(getattr(args, name))(used[name]))  # for the card
    else:
        say(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens")
        step = train(model, tokenizer, args)
    # The figures are those of the weights that are written, that is in bfloat16.
    for weight in model.parameters():
        weight.data = weight.data.to(torch.bfloat16).float()
    report = {} if args.skip_evaluation else full_evaluation(model, tokenizer, args)
    say(json.dumps(report))
    export(model, tokenizer, report, step, args)


if __name__ == "__main__":
    main()
