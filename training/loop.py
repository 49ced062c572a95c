"""The training loop of SDXL and CIFAR-10, on one process or many, and its checkpoints.

A run that is killed and resumed ends like an uninterrupted one, on a CPU bit by bit (GPUs add up in
any order unless told otherwise): a checkpoint holds the step, the weights, the optimizers, and each
process's random generator and place in the data, and the run depends on nothing else.
"""

import contextlib
import math
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from tqdm import tqdm

from common import files
from training import distributed
from training.log import draw_loss, peak_memory_gib, read_log, write_line

MAX_SKIPPED_STEPS = 10  # in a row without a finite loss and gradient, before the run gives up

# -------------------------------------------------------------------------------------- checkpoints
#
# A folder is written under a hidden name and renamed, so a visible one is complete. Rank 0 writes
# for all; other machines need to see the folder only to resume. A run resumes with as many
# processes as it had, because each has its own random generator and its own share of the data.

# Settings that may differ when a run goes on, because no step depends on them.
MAY_CHANGE = {
    "steps", "save_every", "keep", "sample_every", "sample_prompts", "output", "resume", "device",
    "compile", "checkpointing", "max_bad", "workers",
}  # fmt: skip
# Version 1 recorded guidance as w, not as g = 1 + w, and the places of several reading processes.
VERSION = {"checkpoint_version": 2}


@dataclass
class TrainState:
    """Everything that training changes, and what else a checkpoint needs.

    modules, optimizers: by name. loader: an endless iterator of batches, with .position (JSON-able)
    and .bad. settings: flags as strings; all but MAY_CHANGE must be the same on resume.
    export(folder, step, tensors) writes the files for users, on rank 0. scaler: of the
    loss, for fp16.
    """

    output: Path
    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    generator: torch.Generator
    loader: object
    settings: dict
    export: Callable[[Path, int, dict], None] = lambda folder, step, tensors: None
    scaler: GradScaler = field(default_factory=lambda: GradScaler(enabled=False))
    step: int = 0
    log: list[dict] = field(default_factory=list)

    def weights(self) -> dict[str, Tensor]:
        """All weights as "module/name", full on rank 0; all processes must call it."""
        weights = {}
        for key, module in self.modules.items():
            for name, tensor in module.state_dict().items():
                weights[f"{key}/{name}"] = distributed.gather_full(tensor.detach())
        return weights

    def moments(self) -> dict[str, Tensor]:
        """The optimizers' states as "optimizer/index/name", like weights()."""
        moments = {}
        for key, optimizer in self.optimizers.items():
            for i, state in optimizer.state_dict()["state"].items():
                for name, tensor in state.items():
                    moments[f"{key}/{i}/{name}"] = distributed.gather_full(tensor)
        return moments

    def save(self, keep: int) -> None:
        """Write checkpoint-STEP, and delete all older ones but the newest keep - 1."""
        ranks = distributed.gather((self.generator.get_state(), self.loader.position))
        tensors = self.weights() | self.moments()
        if distributed.is_main():
            tensors |= {f"rng/{i}": rng for i, (rng, _) in enumerate(ranks)}
            positions = [position for _, position in ranks]
            self._write(self.output / f"checkpoint-{self.step}", tensors, positions)
            _delete_old(self.output, self.step, keep)
            draw_loss(self.output / "loss.png", self.log)
        distributed.barrier()

    def _write(self, folder: Path, tensors: dict[str, Tensor], positions: list) -> None:
        part = folder.with_name(f".{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        files.write_tensors(part / "state.safetensors", tensors, format="pt")
        self.export(part, self.step, tensors)
        config = {"step": self.step, "positions": positions, "settings": VERSION | self.settings}
        config["scaler"] = self.scaler.state_dict()
        files.write_json(part / "config.json", config)
        _delete(folder)
        part.rename(folder)

    def restore(self, folder: Path, config: dict) -> None:
        """Go on from a checkpoint, whose config `resume_point` has read."""
        tensors, _ = files.read_tensors(folder / "state.safetensors")
        self._check_names(folder, tensors)
        for key, module in self.modules.items():
            state = {}
            for name, like in module.state_dict().items():
                state[name] = distributed.shard_like(tensors[f"{key}/{name}"], like)
            module.load_state_dict(state)
        for key, optimizer in self.optimizers.items():
            state = _optimizer_state(key, optimizer, tensors)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.generator.set_state(tensors[f"rng/{distributed.rank()}"])
        if config.get("scaler"):
            self.scaler.load_state_dict(config["scaler"])
        self.step = config["step"]

    def _check_names(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        expected = set()
        for key, module in self.modules.items():
            expected |= {f"{key}/{name}" for name in module.state_dict()}
        others = (*self.optimizers, "rng/")
        recorded = {name for name in tensors if not name.startswith(others)}
        if unexpected := expected ^ recorded:
            message = f"another model's state: {min(unexpected)} does not fit"
            raise ValueError(f"{folder} holds {message}; give the same flags or another --output")


def _optimizer_state(key: str, optimizer: torch.optim.Optimizer, tensors: dict) -> dict:
    """The part of an optimizer's state_dict that a checkpoint holds under its name."""
    parameters = _parameters(optimizer)
    state = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{key}/"):
            _, i, moment = name.split("/")
            # Laid out in memory like its weight, which a fused optimizer takes for granted.
            like = parameters[int(i)] if tensor.ndim else tensor
            state.setdefault(int(i), {})[moment] = distributed.shard_like(tensor, like)
    return state


def adamw(parameters, lr: float, weight_decay=0.0, betas=(0.9, 0.999)) -> torch.optim.AdamW:
    """AdamW in its fastest form, with what `fit` needs to change the learning rate."""
    optimizer = torch.optim.AdamW(parameters, lr, betas, weight_decay=weight_decay, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = lr
    return optimizer


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _delete(folder: Path) -> None:
    # Under a hidden name first: half-deleted it must not look complete.
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder.rename(hidden))


def _delete_old(output: Path, step: int, keep: int) -> None:
    # A later one is broken: the run has passed over it and is writing its steps anew.
    intact = [folder for folder in checkpoints(output) if checkpoint_step(folder) <= step]
    for folder in checkpoints(output):
        if folder not in intact[-keep:]:
            _delete(folder)


def checkpoint_step(folder: Path) -> int | None:
    """The step in a checkpoint's name; None if it is no checkpoint's name."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match else None


def checkpoints(output: Path) -> list[Path]:
    """The folders of complete checkpoints, the oldest first."""
    folders = [path for path in output.glob("checkpoint-*") if checkpoint_step(path) is not None]
    return sorted(folders, key=checkpoint_step)


def resume_point(
    output: Path, resume: bool, settings: dict, may_change=MAY_CHANGE
) -> tuple[Path | None, dict]:
    """The newest intact checkpoint and its config, or (None, {}) to begin at step 0.

    Raises ValueError if there is one without --resume, or if its settings, of which the version is
    one, or its number of processes are not this run's.
    """
    for folder in reversed(checkpoints(output)):
        if not resume:
            raise ValueError(f"{folder} is there: add --resume to go on, or name another --output")
        try:
            config = files.read_json(folder / "config.json")
            if missing := {"step", "positions", "settings"} - config.keys():
                raise ValueError(f"its config.json has no {min(missing)}")
            files.read_tensors(folder / "state.safetensors")
        except ValueError as problem:
            print(f"passing over {folder}: {problem}", file=sys.stderr)
            continue
        # Version 1 was not recorded.
        recorded = {"checkpoint_version": 1, **config["settings"]}
        if differ := files.first_difference(recorded, VERSION | settings, may_change):
            advice = "resume it with the same, or name another --output"
            raise ValueError(f"{folder} was made with {differ}: {advice}")
        if (processes := len(config["positions"])) != distributed.world_size():
            raise ValueError(f"{folder} was made by {processes} processes: resume it with as many")
        return folder, config
    return None, {}


# ----------------------------------------------------------------------------------------- the loop
#
# Whatever ends or skips a step is decided by numbers that all processes share, so that none of them
# is left waiting in a collective that the others never enter.


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
    # What a killed run logged after its last checkpoint is about to be done again.
    state.log = read_log(state.output, state.step)
    skipped = 0
    bar = tqdm(total=config.steps, initial=state.step, disable=not is_main, dynamic_ncols=True)
    with distributed.GracefulExit() as stop, bar:
        while state.step < config.steps:
            start = time.perf_counter()
            batches = _backward(state, config.grad_accum, losses, ddp_modules)
            line = _optimizer_step(state, config, batches, after_step, start)
            if not line["skipped"]:
                skipped = 0
            elif not _only_overflowed(state, batches, line):
                skipped += 1
            if is_main:
                state.log.append(line)
                write_line(state.output, line, bar)
            if skipped == MAX_SKIPPED_STEPS:
                _give_up(state.step, batches)
            # One process's signal is everyone's, at the same step: none may wait for another.
            stopping = distributed.all_reduce_mean([float(stop.signal > 0)])[0] > 0
            due = config.save_every and state.step % config.save_every == 0
            if due or stopping or state.step == config.steps:
                state.save(config.keep)
            if stopping:
                bar.close()
                if is_main:
                    stopped = f"stopped after step {state.step}"
                    print(f"{stopped}; {config.resume_hint} goes on from there", file=sys.stderr)
                distributed.close()
                raise SystemExit(128 + (stop.signal or signal.SIGTERM))
            if is_main and config.sample_every and state.step % config.sample_every == 0:
                draw_samples(state.step)


def _backward(state: TrainState, count: int, losses, ddp_modules) -> StepBatches:
    """Accumulate the mean gradient of `count` batches."""
    sums, timesteps, names = {}, [], []
    for i in range(count):
        batch = _next_batch(state.loader)
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


def _next_batch(loader: Iterator) -> dict:
    """The next batch; if one process has none, all end, and that one says why."""
    batch = problem = None
    try:
        batch = next(loader)
    except (ValueError, OSError) as error:
        problem = error
    # Before the backward pass, in which the others would wait for this one for ever.
    if distributed.all_reduce_mean([float(problem is not None)])[0]:
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
        "memory_gib": peak_memory_gib(), "bad": round(bad * world), "skipped": int(not finite),
    }  # fmt: skip
    # JSON knows no NaN.
    return {key: value if math.isfinite(value) else None for key, value in line.items()}


def _only_overflowed(state: TrainState, batches: StepBatches, line: dict) -> bool:
    """Whether a skipped step's losses are finite, and a smaller factor may help its gradient."""
    losses_are_finite = all(line[name] is not None for name in batches.losses)
    return losses_are_finite and state.scaler.is_enabled() and state.scaler.get_scale() > 1


def _read(numbers: list[Tensor]) -> list[float]:
    """The values of 0-dimensional tensors, all at once: a GPU is waited for here, once a step."""
    return torch.stack([number.double() for number in numbers]).tolist()


def _clip(optimizer: torch.optim.Optimizer, limit: float) -> Tensor:
    """Scale the gradient down to a norm of `limit` (0: leave it); returns the norm it had."""
    norm = nn.utils.clip_grad_norm_(_parameters(optimizer), limit or math.inf)
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm


def _give_up(step: int, batches: StepBatches) -> None:
    finite = all(value.isfinite().item() for value in batches.losses.values())
    ranks = distributed.gather((finite, torch.cat(batches.timesteps).tolist(), batches.names))
    # If each loss was finite it was the gradient, and then it may have been anyone's.
    failing_ranks = [rank for rank in ranks if not rank[0]] or ranks
    if not distributed.is_main():
        raise SystemExit(2)
    timesteps, names = [], []
    for _, rank_timesteps, rank_names in failing_ranks:
        timesteps += rank_timesteps
        names += rank_names
    raise ValueError(
        f"step {step}: no finite loss and gradient {MAX_SKIPPED_STEPS} times in a row; last at "
        f"timesteps {timesteps} of {', '.join(names)}: lower --lr, or look at these files"
    )
