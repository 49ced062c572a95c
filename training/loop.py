"""The training loop of SDXL and CIFAR-10, on one process or many."""

import contextlib
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from training import distributed
from training.checkpoint import TrainState, optimizer_parameters
from training.log import peak_memory_gib, read_log, show_line, write_line

MAX_SKIPPED_STEPS = 10  # in a row without a finite loss and gradient, before the run gives up

# --------------------------------------------------------------------------------------- optimizers


def adamw(parameters, lr: float, weight_decay=0.0, betas=(0.9, 0.999)) -> torch.optim.AdamW:
    """AdamW in its fastest form, with what `fit` needs to change the learning rate."""
    optimizer = torch.optim.AdamW(parameters, lr, betas, weight_decay=weight_decay, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    return optimizer


# ----------------------------------------------------------------------------------------- the loop
#
# Whatever ends or skips a step is decided by numbers that all processes share, so that none of them
# is left waiting in a collective that the others never enter. Where all end, they leave each other
# first. An error of one process alone does not close its group: that might wait for the others.


@dataclass(frozen=True)
class TrainConfig:
    """How long and how to train.

    lr_lambda(step): the factor on each optimizer's learning rate. save_every, sample_every: in
    steps; 0 for never (the last step is saved anyway). clip_grad: largest norm, 0 for any.
    resume_hint: what a user has to give to go on after a stop.
    """

    steps: int
    lr_lambda: Callable[[int], float]
    grad_accum: int = 1
    clip_grad: float = 1.0
    save_every: int = 0
    keep: int = 2
    sample_every: int = 0
    resume_hint: str = "--resume"


@dataclass(frozen=True)
class StepBatches:
    """What the batches of one step gave on this process; their gradients are in the weights."""

    losses: dict[str, Tensor]  # means, 0-dimensional
    timesteps: list[Tensor]  # of each batch
    names: list[str]


def fit(
    state: TrainState, config: TrainConfig, losses, after_step=lambda: None, ddp_modules=(),
    draw_samples=None,
) -> None:  # fmt: skip
    """Train until config.steps.

    losses(batch) returns {"total": loss to backpropagate, name: value to log, ..} and sets
    batch["timesteps"]. after_step() follows each optimizer step. ddp_modules: what `wrap_ddp`
    returned. draw_samples(step) is called on rank 0, every sample_every steps.
    A step without a finite loss and gradient is skipped. Raises ValueError after MAX_SKIPPED_STEPS
    of those in a row, unless a smaller loss scale may help, and SystemExit after a signal, which
    leaves a checkpoint of its own.
    """
    is_main = distributed.is_main()
    state.claim_output()
    # What a killed run logged after its last checkpoint is about to be done again.
    state.log = read_log(state.output, state.step)
    if is_main and state.changes:
        write_line(state.output, {"step": state.step, "changes": state.changes})
    skipped = 0
    bar = tqdm(total=config.steps, initial=state.step, disable=not is_main, dynamic_ncols=True)
    with distributed.GracefulExit() as stop, bar:
        while state.step < config.steps:
            start = time.perf_counter()
            batches = _backward(state, config.grad_accum, losses, ddp_modules)
            line = _optimizer_step(state, config, batches, after_step, start)
            losses_are_finite = all(line[name] is not None for name in batches.losses)
            if not line["skipped"]:
                skipped = 0
            # A smaller factor may help the gradient of finite losses.
            elif not (losses_are_finite and state.scaler.get_scale() > 1):
                skipped += 1
            if is_main:
                state.log.append(line)
                write_line(state.output, line)
                show_line(line, bar)
            if skipped == MAX_SKIPPED_STEPS:
                _give_up(state.step, batches, ddp_modules)
            # One process's signal is everyone's, at the same step: none may wait for another.
            stopping = distributed.all_reduce_mean([float(stop.signal > 0)])[0] > 0
            due = config.save_every and state.step % config.save_every == 0
            if due or stopping or state.step == config.steps:
                state.save(config.keep, ddp_modules)
            if stopping:
                bar.close()
                if is_main:
                    stopped = f"stopped after step {state.step}"
                    print(f"{stopped}; {config.resume_hint} goes on from there", file=sys.stderr)
                distributed.close(ddp_modules)
                raise SystemExit(128 + (stop.signal or signal.SIGTERM))
            if is_main and config.sample_every and state.step % config.sample_every == 0:
                draw_samples(state.step)


def _backward(state: TrainState, count: int, losses, ddp_modules) -> StepBatches:
    """Accumulate the mean gradient of `count` batches."""
    sums, timesteps, names = {}, [], []
    for i in range(count):
        batch = _next_batch(state.loader, ddp_modules)
        with contextlib.ExitStack() as stack:
            # Gradients travel between processes once, with the last batch's.
            if i < count - 1 and distributed.world_size() > 1:
                for module in ddp_modules:
                    stack.enter_context(module.no_sync())
            parts = losses(batch)
            state.scaler.scale(parts.pop("total") / count).backward()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double() / count
        timesteps.append(batch["timesteps"])
        names += batch["names"]
    return StepBatches(sums, timesteps, names)


def _next_batch(loader: Iterator, ddp_modules) -> dict:
    """The next batch; if one process has none, all end, and that one says why."""
    batch = problem = None
    try:
        batch = next(loader)
    except (ValueError, OSError) as error:
        problem = error
    # Before the backward pass, in which the others would wait for this one for ever.
    if distributed.all_reduce_mean([float(problem is not None)])[0]:
        distributed.close(ddp_modules)
        raise problem or SystemExit(2)
    return batch


def _optimizer_step(
    state: TrainState, config: TrainConfig, batches: StepBatches, after_step, start: float
) -> dict:
    """Step every optimizer unless something is not finite; the step's line for the log."""
    optimizers = list(state.optimizers.values())
    for optimizer in optimizers:
        state.scaler.unscale_(optimizer)
    norms = [_clip(optimizer, config.clip_grad) for optimizer in optimizers]
    device = optimizer_parameters(optimizers[0])[0].device
    numbers = _read([*batches.losses.values(), *norms])
    means, norms = numbers[: len(batches.losses)], numbers[len(batches.losses) :]
    # The same decision everywhere: losses are averaged here, gradients were by DDP or FSDP.
    *means, bad = distributed.all_reduce_mean([*means, float(state.loader.bad)])
    finite = all(map(math.isfinite, [*means, *norms]))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * config.lr_lambda(state.step)
        if finite:
            optimizer.step()
        optimizer.zero_grad()
    state.scaler.update()
    if finite:
        after_step()
    state.step += 1
    world = distributed.world_size()
    # The first optimizer is the student's; a discriminator's or a fake score's comes after it.
    line = {
        "step": state.step, **dict(zip(batches.losses, means, strict=True)), "grad_norm": norms[0],
        "lr": optimizers[0].param_groups[0]["lr"],
        "images_per_s": len(batches.names) * world / (time.perf_counter() - start),
        "memory_gib": peak_memory_gib(device), "bad": round(bad * world),
        "skipped": int(not finite),
    }  # fmt: skip
    # JSON knows no NaN.
    return {key: value if math.isfinite(value) else None for key, value in line.items()}


def _read(numbers: list[Tensor]) -> list[float]:
    """The values of 0-dimensional tensors, all at once: a GPU is waited for here, once a step."""
    return torch.stack([number.double() for number in numbers]).tolist()


def _clip(optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
    """Scale the gradient down to a norm of `limit` (0: leave it); returns the norm it had."""
    norm = nn.utils.clip_grad_norm_(optimizer_parameters(optimizer), limit or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _give_up(step: int, batches: StepBatches, ddp_modules) -> None:
    finite = all(value.isfinite().item() for value in batches.losses.values())
    ranks = distributed.gather((finite, torch.cat(batches.timesteps).tolist(), batches.names))
    # If each loss was finite it was the gradient, and then it may have been anyone's.
    failing_ranks = [rank for rank in ranks if not rank[0]] or ranks
    is_main = distributed.is_main()
    distributed.close(ddp_modules)
    if not is_main:
        raise SystemExit(2)
    timesteps, names = [], []
    for _, rank_timesteps, rank_names in failing_ranks:
        timesteps += rank_timesteps
        names += rank_names
    raise ValueError(
        f"step {step}: no finite loss and gradient {MAX_SKIPPED_STEPS} times in a row; last at "
        f"timesteps {timesteps} of {', '.join(names)}: lower --lr, take a wider --dtype, or look "
        "at these files (the model's weights are finite, or it would not have been read)"
    )
