"""A stage of the CIFAR-10 experiment: one training in its own folder, resumable, with its settings.

The classifier, the teacher and each student are a stage each. stage.json is written last: a folder
that has one is finished, a folder without may hold a checkpoint to resume from.
"""

import hashlib
import shutil
import statistics
import zlib
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from cifar.data import Batches
from common import files
from training import loop
from training.checkpoint import TrainState, checkpoints, resume_point

# 2: `guidance` is g = 1 + w'. It was w' in version 1, which names no version. 3: stage.json holds
# what the training wrote. 4: the boundary pair, PCM's rule, Eq. 8's whole timesteps. 5: 32
# sinusoids of each size, and files in half precision.
STAGE_VERSION = "5"
WEIGHTS = ("diffusion_pytorch_model", "lora", "model")  # of a teacher, a student, the classifier


def read_stage(folder: Path, settings: dict | None = None) -> dict | None:
    """stage.json of a finished stage, or None.

    ValueError if it was made with other settings, or its weights are not those it was made with.
    """
    path = folder / "stage.json"
    if not path.exists():
        return None
    content = files.read_json(path)
    # Without settings to compare with, the version alone must be the same.
    recorded = {"version": "1", **content.get("settings", {})}
    requested = settings or {**recorded, "version": STAGE_VERSION}
    if difference := files.first_difference(recorded, requested):
        raise ValueError(
            f"{folder} was made with {difference}: give the same, or train into another folder"
        )
    if content.get("weights") != weights_digest(folder):
        raise ValueError(
            f"{folder}: its weights are not those that its training wrote: put them back, or "
            "delete the folder to train again"
        )
    return content


def weights_digest(folder: Path) -> str:
    """A stage's weights, with a teacher's sizes, in a few letters; "" if there are none."""
    paths = [folder / f"{name}.safetensors" for name in WEIGHTS] + [folder / "config.json"]
    contents = [path.read_bytes() for path in paths if path.exists()]
    return hashlib.sha256(b"".join(contents)).hexdigest()[:12] if contents else ""


@dataclass
class Stage:
    """One training: its folder, its data, and in `settings` all that its result depends on."""

    folder: Path
    data: tuple[Tensor, Tensor]
    steps: int
    batch_size: int
    seed: int
    settings: dict = field(default_factory=dict)

    def __post_init__(self):
        images, labels = self.data
        # Other data counts as another setting.
        checksum = zlib.crc32(labels.numpy(), zlib.crc32(images.numpy()))
        settings = {"version": STAGE_VERSION, "steps": self.steps, "batch_size": self.batch_size}
        settings |= {"seed": self.seed, **self.settings, "data": f"{checksum:08x}"}
        # Strings, as JSON and the header of a LoRA hold them.
        self.settings = {name: str(value) for name, value in settings.items()}

    def finished(self) -> bool:
        """Whether it is; ValueError if it, or a checkpoint of it, was made with other settings."""
        if read_stage(self.folder, self.settings) is None:
            checkpoint, _ = self._resume_point()
            # A training that is over has both until stage.json is there.
            if checkpoint is None and weights_digest(self.folder):
                raise ValueError(
                    f"{self.folder} holds weights without their stage.json: they would be trained "
                    "over; put it back, or train into another folder"
                )
            return False
        print(f"{self.folder.name}: finished before, used again")
        return True

    def train(
        self, modules, optimizers, losses, export, lr_lambda=lambda s: 1, after_step=lambda: None,
        make_paths=None,
    ) -> None:  # fmt: skip
        """Train from the last checkpoint, if any, to the end; write stage.json, delete checkpoints.

        modules, optimizers: by name, as in training/loop.py. losses: (batch, generator) to a dict
        of losses. export: writes the result into a folder. lr_lambda: the share of the learning
        rate after the share s of all steps. after_step: called after each optimizer step.
        make_paths: (generator, is_new) to a loader of walkers, instead of pictures.
        """
        files.output_folder(self.folder)
        checkpoint, content = self._resume_point()
        generator = torch.Generator().manual_seed(self.seed)
        if make_paths is None:
            position = content["positions"][0] if checkpoint else 0
            if type(position) is not int or position < 0:
                raise ValueError(
                    f"{checkpoint} is damaged: its position is {position!r}: delete it"
                )
            loader = Batches(*self.data, self.batch_size, self.seed, position)
        else:
            loader = make_paths(generator, checkpoint is None)
        state = TrainState(self.folder, modules, optimizers, generator, loader, self.settings)
        if checkpoint:
            state.restore(checkpoint, content)
        print(f"{self.folder.name}: {self.steps} steps of {self.batch_size} pictures")
        config = loop.TrainConfig(
            self.steps, lambda step: lr_lambda(step / self.steps), save_every=250, keep=1,
            resume_hint="the same command")  # fmt: skip
        loop.fit(state, config, partial(losses, generator=generator), after_step)
        export(self.folder)
        # Seconds of the steps at the median speed: other programs may have slowed some of them.
        # Walkers are spread before; the steps left out for that are not among these.
        speed = statistics.median(line["images_per_s"] for line in state.log)
        seconds = round(self.steps * self.batch_size / speed, 1)
        weights = weights_digest(self.folder)
        content = {"settings": self.settings, "seconds": seconds, "weights": weights}
        files.write_json(self.folder / "stage.json", content)
        for checkpoint in checkpoints(self.folder):
            shutil.rmtree(checkpoint)

    def _resume_point(self) -> tuple[Path | None, dict]:
        """The last checkpoint and its config.json, or (None, {})."""
        # No setting may change, the steps included: the learning rate depends on them.
        return resume_point(self.folder, True, self.settings, may_change=())
