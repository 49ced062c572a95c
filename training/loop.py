"""The training loop of everything larger than the 2-D toy: on one process or many, resumable.

A run that is killed and resumed ends like one that was not, on a CPU bit by bit (a GPU adds up in
any order unless told otherwise): all that it depends on is the step, the weights, the optimizers,
each process's generator and its place in the data.
"""

import contextlib
import json
import math
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import files
from common.files import read_json, read_tensors
from common.plots import GREY, INK, Axes, Figure
from training import distributed

PATIENCE = 10  # steps in a row without a finite loss and gradient, then something is wrong

# ------------------------------------------------------------------------------------- checkpoints
#
# A folder is written under a hidden name and renamed: one that can be seen is whole. Rank 0 writes
# for all, so that other machines need to see the folder only to resume.

FREE = {
    "steps", "save_every", "keep", "sample_every", "sample_prompts", "output", "resume", "device",
    "compile", "checkpointing", "max_bad",
}  # fmt: skip


@dataclass
class Run:
    """All that training changes, by name, and what a checkpoint holds besides.

    settings: flags in words, not to be changed when a run goes on (but for those in FREE). loader:
    an endless iterator of batches with .position and .bad. export(folder, step, weights) writes
    for users, on rank 0, with all weights as `weights` names them.
    """

    output: Path
    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    generator: torch.Generator
    loader: object
    settings: dict
    export: Callable[[Path, int, dict], None] = lambda folder, step, weights: None
    step: int = 0
    log: list[dict] = field(default_factory=list)

    def weights(self) -> dict[str, Tensor]:
        """All weights as "module/name", in one piece on rank 0; for all processes to call."""
        parts = ((k, n, v) for k, m in self.modules.items() for n, v in m.state_dict().items())
        return {f"{k}/{n}": distributed.joined(v.detach()) for k, n, v in parts}

    def tensors(self) -> dict[str, Tensor]:
        """Weights as "module/name", Adam's moments as "optimizer/index/name"."""
        found = self.weights()
        for k, optimizer in self.optimizers.items():
            for i, state in optimizer.state_dict()["state"].items():
                found |= {f"{k}/{i}/{name}": distributed.joined(v) for name, v in state.items()}
        return found

    def save(self, keep: int) -> None:
        """checkpoint-STEP, and of those before it all but the newest keep - 1 away."""
        parts = distributed.gather((self.generator.get_state(), self.loader.position))
        tensors = self.tensors()
        if distributed.is_main():
            part = self.output / f".checkpoint-{self.step}.part"
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            states = {f"rng/{i}": state for i, (state, _) in enumerate(parts)}
            files.write_tensors(part / "state.safetensors", tensors | states, format="pt")
            self.export(part, self.step, tensors)
            positions = [position for _, position in parts]
            content = {"step": self.step, "positions": positions, "settings": self.settings}
            files.write_json(part / "config.json", content)
            _discard(self.output / f"checkpoint-{self.step}")
            part.rename(self.output / f"checkpoint-{self.step}")
            # A later one is a broken one that this run has passed over: not what is to be kept.
            known = checkpoints(self.output)
            later = [old for old in known if int(old.name[11:]) > self.step]
            for old in [*later, *[old for old in known if old not in later][:-keep]]:
                _discard(old)
            draw_loss(self.output / "loss.png", self.log)
        distributed.barrier()

    def restore(self, folder: Path, config: dict) -> None:
        """Go on from a checkpoint, whose config `resume_point` has read."""
        tensors, _ = read_tensors(folder / "state.safetensors")
        others = (*self.optimizers, "rng/")
        names = {f"{k}/{n}" for k, m in self.modules.items() for n in m.state_dict()}
        if strange := names ^ {k for k in tensors if not k.startswith(others)}:
            raise ValueError(f"{folder} holds another model's state: {min(strange)} does not fit")
        for name, module in self.modules.items():
            like = module.state_dict().items()
            own = {k: distributed.parted(tensors[f"{name}/{k}"], v) for k, v in like}
            module.load_state_dict(own)
        for name, optimizer in self.optimizers.items():
            own, state = _parameters(optimizer), {}
            for key in (k for k in tensors if k.startswith(f"{name}/")):
                _, i, part = key.split("/")
                # Laid out in memory like the weight: a fused optimizer takes that for granted.
                like = own[int(i)] if tensors[key].ndim else tensors[key]
                state.setdefault(int(i), {})[part] = distributed.parted(tensors[key], like)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.generator.set_state(tensors[f"rng/{distributed.rank()}"])
        self.step = config["step"]


def adamw(parameters, lr: float, weight_decay=0.0, betas=(0.9, 0.999)) -> torch.optim.AdamW:
    """AdamW in its fastest form, with what `fit` needs to change the learning rate."""
    optimizer = torch.optim.AdamW(parameters, lr, betas, weight_decay=weight_decay, fused=True)
    for group in optimizer.param_groups:
        group["initial_lr"] = lr
    return optimizer


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _discard(folder: Path) -> None:
    # Under a hidden name first: it must not look whole while it is being deleted.
    hidden = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(hidden, ignore_errors=True)
    if folder.exists():
        shutil.rmtree(folder.rename(hidden))


def checkpoints(output: Path) -> list[Path]:
    """Whole checkpoints, the oldest first."""
    found = [p for p in output.glob("checkpoint-*") if p.name[11:].isdigit()]
    return sorted(found, key=lambda p: int(p.name[11:]))


def resume_point(output: Path, resume: bool, settings: dict, free=FREE) -> tuple[Path | None, dict]:
    """The newest whole checkpoint and its config, or (None, {}) to begin at step 0.

    Raises ValueError if there are checkpoints but no --resume, or if they have other settings.
    """
    for folder in reversed(checkpoints(output)):
        if not resume:
            raise ValueError(f"{folder} is there: add --resume to go on, or name another --output")
        try:
            config = read_json(folder / "config.json")
            if missing := {"step", "positions", "settings"} - config.keys():
                raise ValueError(f"its config.json has no {min(missing)}")
            read_tensors(folder / "state.safetensors")
        except ValueError as problem:
            print(f"passing over {folder}: {problem}", file=sys.stderr)
            continue
        if (made := len(config["positions"])) != distributed.world_size():
            raise ValueError(f"{folder} was made by {made} processes: resume it with as many")
        if differ := files.difference(config["settings"], settings, free):
            raise ValueError(
                f"{folder} was made with --{differ}: give the same, or name another --output"
            )
        return folder, config
    return None, {}


# ------------------------------------------------------------------------------------------ the log
#
# One line of JSON a step, for whoever wants to plot it; we do, at every checkpoint.


def read_log(output: Path, step: int) -> list[dict]:
    """The log's lines up to a step; what a killed run wrote after its checkpoint is cut off."""
    path, lines = output / "log.jsonl", []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        # The last line may have been cut off in the middle.
        with contextlib.suppress(ValueError):
            lines.append(json.loads(line))
    lines = [line for line in lines if line["step"] <= step]
    if distributed.is_main() and path.exists():
        with files.whole(path) as part:
            part.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return lines


def draw_loss(path: Path, log: list[dict]) -> None:
    """The loss of every step, pale, and its running mean, on a logarithmic scale."""
    kept = [(line["step"], line["loss"]) for line in log if line["loss"] and line["loss"] > 0]
    if len(kept) < 2:
        return
    step, loss = (np.array(column) for column in zip(*kept, strict=True))
    width = max(1, len(loss) // 50)
    # The mean of what has been seen so far, exponentially weighted over a fiftieth of the run.
    smooth = list(accumulate(loss, lambda mean, value: mean + (value - mean) / width))
    figure, low, high = Figure(900, 500), loss.min() * 0.9, loss.max() * 1.1
    axes = Axes(figure, (90, 60, 770, 360), (step[0], step[-1]), (low, high), log_y=True)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    yticks = [m * 10.0**d for d in decades for m in (1, 2, 5) if low < m * 10.0**d < high]
    axes.frame("training loss", "step", "", np.linspace(step[0], step[-1], 6).round(), yticks)
    axes.line(step, loss, (*GREY, 90), 1)
    axes.line(step, smooth, INK, 2.5)
    figure.save(path)


# ----------------------------------------------------------------------------------------- the loop
#
# Whatever ends or skips a step is decided by numbers that all processes share, so that none of them
# is left waiting in a collective that the others never enter.


@dataclass(frozen=True)
class Plan:
    """How long and how to train; rate(step) is the share of each optimizer's learning rate.

    again: what users are told to give so as to go on after a stop.
    """

    steps: int
    rate: Callable[[int], float]
    grad_accum: int = 1
    clip_grad: float = 1.0
    save_every: int = 0
    keep: int = 2
    sample_every: int = 0
    again: str = "--resume"


def fit(run: Run, plan: Plan, losses, after=lambda: None, ddp=(), picture=None) -> None:
    """Train until plan.steps: losses(batch) -> {"total": to go backward, ..: to be logged}.

    after() follows each optimizer step; picture(step) is called on rank 0, every sample_every
    steps. ddp: what `parallel` returned. A step without a finite loss and gradient is skipped.
    Raises ValueError after PATIENCE of those in a row, and SystemExit when told to stop; either
    way the last checkpoint stands, and a stop leaves one of its own.
    """
    main, skipped = distributed.is_main(), 0
    # What a killed run logged after its last checkpoint is about to be done again.
    run.log = read_log(run.output, run.step)
    bar = tqdm(total=plan.steps, initial=run.step, disable=not main, dynamic_ncols=True)
    with distributed.Stop() as stop, bar:
        while run.step < plan.steps:
            line, about = _step(run, plan, losses, after, ddp)
            skipped = (skipped + 1) * line["skipped"]
            if main:
                _tell(run, line, bar)
            if skipped == PATIENCE:
                _give_up(run.step, about)
            # One process's signal is everyone's, at the same step: none may wait for another.
            stopping = distributed.average([float(stop.signal > 0)])[0] > 0
            due = plan.save_every and run.step % plan.save_every == 0
            if due or stopping or run.step == plan.steps:
                run.save(plan.keep)
            if stopping:
                bar.close()
                if main:
                    said = f"stopped after step {run.step}; {plan.again} goes on from there"
                    print(said, file=sys.stderr)
                distributed.close()
                raise SystemExit(128 + (stop.signal or signal.SIGTERM))
            if main and plan.sample_every and run.step % plan.sample_every == 0:
                picture(run.step)


def _step(run: Run, plan: Plan, losses, after, ddp) -> tuple[dict, tuple]:
    """One optimizer step: its line in the log, and (finite here?, timesteps, names) of its data."""
    start, optimizers = time.perf_counter(), run.optimizers.values()
    own, times, names = _gradients(run.loader, plan.grad_accum, losses, ddp)
    # The same decision everywhere: losses are averaged here, gradients were by DDP.
    *means, bad = distributed.average([*own.values(), float(run.loader.bad)])
    means = dict(zip(own, means, strict=True))
    norms = [_clip(optimizer, plan.clip_grad) for optimizer in optimizers]
    finite = all(map(math.isfinite, [*means.values(), *norms]))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * plan.rate(run.step)
        if finite:
            optimizer.step()
        optimizer.zero_grad()
    if finite:
        after()
    run.step += 1
    # The first optimizer is the network's; a discriminator's comes after it.
    lr, world = next(iter(optimizers)).param_groups[0]["lr"], distributed.world_size()
    speed = len(names) * world / (time.perf_counter() - start)
    line = {"step": run.step, **means, "grad_norm": norms[0], "lr": lr, "images_per_s": speed,
            "memory_gib": memory(), "bad": round(bad * world),
            "skipped": int(not finite)}  # fmt: skip
    # JSON knows no NaN.
    line = {k: v if math.isfinite(v) else None for k, v in line.items()}
    return line, (all(map(math.isfinite, own.values())), times, names)


def _gradients(loader, count: int, losses, ddp) -> tuple[dict[str, float], list, list[str]]:
    """The mean gradient of `count` batches, accumulated; mean losses, timesteps and names."""
    sums, times, names = {}, [], []
    for i in range(count):
        batch = _next(loader)
        with contextlib.ExitStack() as stack:
            # Gradients travel between processes once, with the last batch's.
            for module in ddp if i < count - 1 and distributed.world_size() > 1 else ():
                stack.enter_context(module.no_sync())
            parts = losses(batch)
            (parts.pop("total") / count).backward()
        for name, value in parts.items():
            sums[name] = sums.get(name, 0.0) + value.detach().double() / count
        times, names = times + batch["timesteps"].tolist(), names + batch["names"]
    return {name: value.item() for name, value in sums.items()}, times, names


def _next(loader) -> dict:
    """The next batch; where one process has none, all end, and that one says why."""
    batch, problem = None, None
    try:
        batch = next(loader)
    except ValueError as found:
        problem = found
    # Before the backward pass, in which the others would wait for this one for ever.
    if distributed.average([float(problem is not None)])[0]:
        raise problem or SystemExit(2)
    return batch


def _clip(optimizer: torch.optim.Optimizer, limit: float) -> float:
    """Scale the gradient down to a norm of `limit` (0: as it is); the norm it had."""
    norm = nn.utils.clip_grad_norm_(_parameters(optimizer), limit or math.inf)
    return getattr(norm, "full_tensor", lambda: norm)().item()


def _give_up(step: int, about: tuple) -> None:
    # If each loss was finite it was the gradient, and then it may have been anyone's.
    everywhere = distributed.gather(about)
    guilty = [each for each in everywhere if not each[0]] or everywhere
    if not distributed.is_main():
        raise SystemExit(2)
    t, names = ([one for each in guilty for one in each[i]] for i in (1, 2))
    raise ValueError(
        f"step {step}: no finite loss and gradient {PATIENCE} times in a row; last at timesteps "
        f"{t} of {', '.join(names)}: lower --lr, or look at these files"
    )


def _tell(run: Run, line: dict, bar: tqdm) -> None:
    """The step's line, in log.jsonl and on the bar."""
    run.log.append(line)
    with open(run.output / "log.jsonl", "a", encoding="utf-8") as log:
        log.write(json.dumps(line) + "\n")
    bar.update()
    shown = {"loss": "loss", "norm": "grad_norm", "img/s": "images_per_s", "GiB": "memory_gib"}
    shown |= {"bad": "bad"} if line["bad"] else {}
    values = {name: line[key] for name, key in shown.items()}
    bar.set_postfix({k: "nan" if v is None else f"{v:.4g}" for k, v in values.items()})


def memory() -> float:
    """GiB at the highest so far: of the GPU, or of main memory where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
