"""Checkpoints: all that training changes, so that a run killed and resumed ends like any other.

On a CPU that holds bit by bit; GPUs add up in any order unless told otherwise.
"""

import os
import platform
import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from tqdm import tqdm

from common import files
from training import distributed
from training.listing import LeftOut
from training.log import draw_loss, write_line

# -------------------------------------------------------------------------------------- checkpoints
#
# A folder is written under a hidden name and renamed, so a visible one is complete. Rank 0 writes
# for all; other machines need to see the folder only to resume, or to write their walkers. A run
# resumes with as many processes as it had, because each has its own random generator and its own
# share of the data.

# Machines may differ in these: settings hold the content of what paths lead to as well.
PATHS = {"model", "tokenizer", "vae", "data", "cache", "init", "sample_prompts", "output"}
# Settings that may differ when a run goes on: learning rates, paths, and what no step depends on.
MAY_CHANGE = PATHS | {
    "lr", "k_lr", "adv_lr", "fake_lr", "warmup",
    "steps", "save_every", "keep", "sample_every", "resume", "device", "compile", "checkpointing",
    "max_bad", "workers",
}  # fmt: skip
# Version 1 recorded guidance as w, not as g = 1 + w, and the places of several reading processes;
# version 2 knew models and data by their paths; version 3 trained other pairs and targets, and
# other heads.
VERSION = {"checkpoint_version": 4}
SCALER_STATE = GradScaler("cpu").state_dict().keys()
RUN_FILE = ".run"  # says which run writes to a folder: two at once would mix their checkpoints
RESULTS = ("lora.safetensors", "unet")  # what a run leaves at its end


@dataclass
class TrainState:
    """Everything that training changes, and what else a checkpoint needs.

    modules, optimizers: by name. loader: an endless iterator of batches, with .position (JSON-able)
    and .bad; one of walkers has .tensors() and .restore() too. settings: flags as strings; all but
    MAY_CHANGE must be the same on resume. export(folder, step, tensors) writes the files for users,
    on rank 0. counts(): what this process left out or cut so far, by reason, for the log. scaler:
    of the loss, for fp16.
    changes: settings that differ from those of the checkpoint that was restored, "old -> new".
    """

    output: Path
    modules: dict[str, nn.Module]
    optimizers: dict[str, torch.optim.Optimizer]
    generator: torch.Generator
    loader: object
    settings: dict
    export: Callable[[Path, int, dict], None] = lambda folder, step, tensors: None
    scaler: GradScaler = field(default_factory=lambda: GradScaler(enabled=False))
    counts: Callable[[], dict[str, int]] = dict
    step: int = 0
    changes: dict[str, str] = field(default_factory=dict)
    run_id: str = ""
    logged_counts: dict = field(default_factory=dict)
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

    def save(self, keep: int, ddp_modules=()) -> None:
        """Write checkpoint-STEP, and delete all older ones but the newest keep - 1."""
        self.check_alone(ddp_modules)
        ranks = distributed.gather((self.generator.get_state(), self.loader.position))
        tensors = self.weights() | self.moments()
        if distributed.is_main():
            shutil.rmtree(self._part, ignore_errors=True)
        self._write_walkers()
        if distributed.is_main():
            tensors |= {f"rng/{i}": rng for i, (rng, _) in enumerate(ranks)}
            positions = [position for _, position in ranks]
            self._write(self.output / f"checkpoint-{self.step}", tensors, positions)
            _delete_old(self.output, self.step, keep)
            draw_loss(self.output / "loss.png", self.log)
        self.log_counts()
        distributed.barrier()

    def claim_output(self) -> None:
        """Make the output this run's: `check_alone` ends a run that is still writing there.

        What killed runs left of checkpoints half written or half deleted is deleted.
        """
        # The machine's name, because each container has a process 1.
        self.run_id = f"process {os.getpid()} on {platform.node()}, {time.ctime()}"
        if distributed.is_main():
            (self.output / RUN_FILE).write_text(self.run_id, encoding="utf-8")
            for folder in self.output.glob(".checkpoint-*"):
                if re.fullmatch(r"\.checkpoint-\d+\.(part|old)", folder.name):
                    shutil.rmtree(folder, ignore_errors=True)

    def check_alone(self, ddp_modules=()) -> None:
        """ValueError on all processes if another run has begun in the same output since.

        They leave each other before; ddp_modules: as for `distributed.close`.
        """
        path, problem = self.output / RUN_FILE, ""
        if distributed.is_main() and path.exists():
            other = path.read_text(encoding="utf-8")
            if other != self.run_id:
                problem = f"another run ({other}) has begun in {self.output}: this one stops"
        if problem := distributed.gather(problem)[0]:
            distributed.close(ddp_modules)
            raise ValueError(problem)

    def log_counts(self) -> None:
        """A line, and one in the log, of what all processes left out so far, if it is news."""
        total = LeftOut()
        for counts in distributed.gather(self.counts()):
            total.counts.update(counts)
        if distributed.is_main() and total.counts != self.logged_counts:
            self.logged_counts = total.counts
            write_line(self.output, {"step": self.step, "counts": total.counts})
            tqdm.write(f"by step {self.step}: {total}", file=sys.stderr)

    @property
    def _part(self) -> Path:
        return self.output / f".checkpoint-{self.step}.part"

    def _write_walkers(self) -> None:
        """Each process's own, into the folder that all share (`check_shared`)."""
        if not hasattr(self.loader, "tensors"):
            return
        distributed.barrier()
        self._part.mkdir(parents=True, exist_ok=True)
        path = walkers_file(self._part, distributed.rank())
        files.write_tensors(path, self.loader.tensors())
        distributed.barrier()

    def _write(self, folder: Path, tensors: dict[str, Tensor], positions: list) -> None:
        part = self._part
        part.mkdir(parents=True, exist_ok=True)
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
        self._check_tensors(folder, tensors)
        for key, module in self.modules.items():
            state = {}
            for name, like in module.state_dict().items():
                state[name] = distributed.shard_like(tensors[f"{key}/{name}"], like)
            module.load_state_dict(state)
        for key, optimizer in self.optimizers.items():
            state = _optimizer_state(key, optimizer, tensors)
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        self.generator.set_state(tensors[f"rng/{distributed.rank()}"])
        if hasattr(self.loader, "tensors"):
            path = walkers_file(folder, distributed.rank())
            self.loader.restore(
                config["positions"][distributed.rank()], files.read_tensors(path)[0]
            )
        if config.get("scaler"):
            self.scaler.load_state_dict(config["scaler"])
        self.step = config["step"]
        for name in sorted(MAY_CHANGE - {"resume", "output"}):
            old, new = config["settings"].get(name), self.settings.get(name)
            if old != new:
                self.changes[name.replace("_", "-")] = f"{old} -> {new}"
        if distributed.is_main() and self.changes:
            changes = ", ".join(map(" ".join, self.changes.items()))
            print(f"going on from {folder} with changes: {changes}", file=sys.stderr)

    def _check_tensors(self, folder: Path, tensors: dict[str, Tensor]) -> None:
        """ValueError unless names and shapes are this run's."""
        rng_shape = self.generator.get_state().shape
        expected = {f"rng/{i}": rng_shape for i in range(distributed.world_size())}
        for key, module in self.modules.items():
            for name, tensor in module.state_dict().items():
                expected[f"{key}/{name}"] = tensor.shape
        for key, optimizer in self.optimizers.items():
            for i, p in enumerate(optimizer_parameters(optimizer)):
                shapes = {"step": torch.Size(), "exp_avg": p.shape, "exp_avg_sq": p.shape}
                # A weight that never had a gradient has no moments.
                if any(f"{key}/{i}/{name}" in tensors for name in shapes):
                    expected |= {f"{key}/{i}/{name}": shape for name, shape in shapes.items()}
        recorded = {name: tensor.shape for name, tensor in tensors.items()}
        if differ := {name for name, _ in recorded.items() ^ expected.items()}:
            message = f"another model's state: {min(differ)} does not fit"
            raise ValueError(f"{folder} holds {message}; give the same flags or another --output")


def optimizer_parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def _optimizer_state(key: str, optimizer: torch.optim.Optimizer, tensors: dict) -> dict:
    """The part of an optimizer's state_dict that a checkpoint holds under its name."""
    parameters = optimizer_parameters(optimizer)
    state = {}
    for name, tensor in tensors.items():
        if name.startswith(f"{key}/"):
            _, i, moment = name.split("/")
            # Laid out in memory like its weight, which a fused optimizer takes for granted.
            like = parameters[int(i)] if tensor.ndim else tensor
            state.setdefault(int(i), {})[moment] = distributed.shard_like(tensor, like)
    return state


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


def walkers_file(folder: Path, rank: int) -> Path:
    """Where a process's walkers are in a checkpoint."""
    return folder / f"walkers-{rank}.safetensors"


def check_shared(output: Path) -> None:
    """ValueError on all processes unless they share the output, where each writes its walkers."""
    marks = [output / f".walkers-{rank}" for rank in range(distributed.world_size())]
    for mark in marks:  # of a run that was killed
        mark.unlink(missing_ok=True)
    distributed.barrier()
    marks[distributed.rank()].touch()
    distributed.barrier()
    are_seen = all(mark.exists() for mark in marks)
    everywhere = all(distributed.gather(are_seen))
    marks[distributed.rank()].unlink(missing_ok=True)
    if not everywhere:
        raise ValueError(f"{output} is another folder on other machines: share one")


def checkpoint_step(folder: Path) -> int:
    """The step in a checkpoint's name."""
    return int(folder.name.removeprefix("checkpoint-"))


def checkpoints(output: Path) -> list[Path]:
    """The folders of complete checkpoints, the oldest first."""
    folders = output.glob("checkpoint-*")
    folders = [path for path in folders if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(folders, key=checkpoint_step)


def resume_point(
    output: Path, resume: bool, settings: dict, may_change=MAY_CHANGE
) -> tuple[Path | None, dict]:
    """The newest intact checkpoint and its config, or (None, {}) to begin at step 0.

    Raises ValueError if the processes do not agree, if none of several is intact, if a run is there
    without --resume, or its result without a checkpoint, or if the checkpoint's settings, of which
    the version is one, or its number of processes are not this run's.
    """
    distributed.check_same({k: v for k, v in settings.items() if k not in PATHS | {"device"}})
    _check_unused(output, resume)
    folder, config = _newest_intact(output)
    distributed.check_same({"checkpoint": folder.name if folder else "none"})
    if folder is None:
        return None, {}
    # Version 1 was not recorded.
    recorded = {"checkpoint_version": 1, **config["settings"]}
    if differ := files.first_difference(recorded, VERSION | settings, may_change):
        advice = "resume it with the same, or name another --output"
        raise ValueError(f"{folder} was made with {differ}: {advice}")
    if (processes := len(config["positions"])) != distributed.world_size():
        raise ValueError(f"{folder} was made by {processes} processes: resume it with as many")
    return folder, config


def _check_unused(output: Path, resume: bool) -> None:
    """ValueError if this run, which has no checkpoint to go on from, would erase another one."""
    folders = checkpoints(output)
    if folders and not resume:
        raise ValueError(f"{folders[-1]} is there: add --resume to go on, or name another --output")
    results = [name for name in RESULTS if (output / name).exists()]
    if results and not folders:
        reason = "a run has ended, and its checkpoints are gone: name another --output"
        raise ValueError(f"{output / results[0]} is there: {reason}")
    if (output / "log.jsonl").exists() and not resume:
        reason = "a run has begun: add --resume to begin it again, or name another --output"
        raise ValueError(f"{output / 'log.jsonl'} is there: {reason}")


def _newest_intact(output: Path) -> tuple[Path | None, dict]:
    folders = checkpoints(output)
    for folder in reversed(folders):
        try:
            config = files.read_json(folder / "config.json")
            _check_config(config)
            if config["step"] != checkpoint_step(folder):
                raise ValueError(f"its config.json is of step {config['step']}")
            paths = [folder / "state.safetensors"]
            for i, position in enumerate(config["positions"]):
                if isinstance(position, dict) and "conds" in position:
                    paths.append(walkers_file(folder, i))
            for path in paths:
                files.check_finite(path, files.read_tensors(path)[0])
            return folder, config
        except ValueError as problem:
            print(f"passing over {folder}: {problem}", file=sys.stderr)
    if folders:
        names = ", ".join(folder.name for folder in folders)
        advice = "delete them to begin again, or name another --output"
        raise ValueError(f"no checkpoint in {output} is intact ({names}): {advice}")
    return None, {}


def _check_config(config: dict) -> None:
    """ValueError if a checkpoint's config.json is not as `_write` writes it."""
    kinds = {"step": int, "positions": list, "settings": dict, "scaler": dict}
    wrong = [name for name, kind in kinds.items() if type(config.get(name)) is not kind]
    # GradScaler's state is {} where it is off.
    if not wrong and (scaler := config["scaler"]):
        are_numbers = all(type(value) in (int, float) for value in scaler.values())
        wrong = [] if are_numbers and scaler.keys() == SCALER_STATE else ["scaler"]
    if wrong:
        raise ValueError(f"its config.json has no proper {wrong[0]}")
