"""The training loop: batches from the workers, one rate schedule for steps and for seconds, checkpoints on the way."""

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from .checkpoint import save_model
from .model import Shape, TinyModel
from .optimizer import make_optimizers
from .packing import LEARNT_BIT, Recipe, batches

_DECAY_FROM = 0.35  # the share of the run at full rate
_CLIP_NORM = 1.0


@dataclass(frozen=True)
class Plan:
    """How long and on what to train; the run ends at `steps` or after `max_seconds`, whichever comes first."""

    out: Path
    seed: int = 0
    steps: int = 12_000
    max_seconds: float = float("inf")
    warmup_steps: int = 100
    batch_tokens: int = 131_072
    longest_row: int = 8192
    num_workers: int = 0
    save_every_seconds: float = 120.0
    log_every: int = 100


def rate_factor(progress: float, step: int, warmup_steps: int) -> float:
    """The share of the full rate: a short rise, a plateau, then a straight line down to zero."""
    rise = min(1.0, (step + 1) / warmup_steps)
    return rise * min(1.0, max(0.0, (1 - progress) / (1 - _DECAY_FROM)))


def train(plan: Plan, tokenizer: Tokenizer) -> list[float]:
    """Train from scratch, write the model into `plan.out`, and return the losses that were logged."""
    is_cuda = torch.cuda.is_available()
    device = torch.device("cuda" if is_cuda else "cpu")
    torch.manual_seed(plan.seed)
    model = TinyModel(Shape(), torch.bfloat16 if is_cuda else torch.float32).to(device)
    if is_cuda:
        for layer in model.layers:  # one compiled layer serves all, so compiling takes seconds, not minutes
            layer.compile(dynamic=False)
    optimizers = make_optimizers(model, is_fused=is_cuda)
    recipe = Recipe(str(plan.out / "tokenizer.json"), plan.batch_tokens, longest_row=plan.longest_row)
    source = batches(recipe, plan.seed, plan.num_workers)

    start = saved = logged = time.monotonic()
    losses: list[float] = []
    num_tokens = 0
    for step in range(plan.steps):
        now = time.monotonic()
        progress = max(step / plan.steps, (now - start) / plan.max_seconds)
        if progress >= 1:
            break
        factor = rate_factor(progress, step, plan.warmup_steps)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * factor

        batch = torch.from_numpy(next(source).astype("int64")).to(device, non_blocking=True)
        loss = model.loss(batch & (LEARNT_BIT - 1), batch >= LEARNT_BIT)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _CLIP_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        num_tokens += batch.numel()
        if step % plan.log_every == 0 or step == plan.steps - 1:
            losses.append(loss.item())
            seconds = time.monotonic() - logged
            rate = plan.log_every * plan.batch_tokens / max(seconds, 1e-9) / 1e6
            print(
                f"step {step}  loss {losses[-1]:.4f}  rate x{factor:.3f}  {num_tokens / 1e6:.0f} M tokens"
                f"  {rate:.2f} M tokens/s  {time.monotonic() - start:.0f} s",
                flush=True,
            )
            logged = time.monotonic()
        if time.monotonic() - saved > plan.save_every_seconds:
            save_model(model, tokenizer, plan.out)
            saved = time.monotonic()
    source.close()
    save_model(model, tokenizer, plan.out)
    print(f"trained on {num_tokens / 1e6:.0f} M tokens in {time.monotonic() - start:.0f} s", flush=True)
    return losses
