"""CIFAR-10 as SDXL's code takes it: pictures, label conditions, UNet config, teacher loss.

Pixel unshuffling turns a picture (3, 32, 32) into x_0 (12, 16, 16): a quarter of the positions at
four times the channels, so the same UNet class spends its time in wide layers. A class label takes
the prompt's place: its one-hot code is the only token and the pooled vector. Zeros are the null
condition, as for SDXL.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from solvers import Schedule

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
DOWNLOAD_HELP = (
    "download https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz, unpack it, and name its "
    "folder cifar-10-batches-bin by --data-dir"
)
RECORD = 1 + 3 * 32 * 32  # bytes: a label, then red, green and blue, row by row


# ------------------------------------------------------------------------------------------- data
#
# The files have the official binary layout. All pictures stay in memory, as bytes.


def read_split(folder: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Pictures (n, 3, 32, 32) in uint8 and labels (n,) of the training or the test files.

    Raises ValueError, with where to get the files, if one is missing or broken.
    """
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if train else ["test_batch.bin"]
    parts = []
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ValueError(f"no CIFAR-10 here, {path} is missing: {DOWNLOAD_HELP}")
        content = np.fromfile(path, dtype=np.uint8)
        if not len(content) or len(content) % RECORD or content[::RECORD].max() > 9:
            raise ValueError(f"{path} is no complete CIFAR-10 batch: {DOWNLOAD_HELP}")
        parts.append(content)
    records = torch.from_numpy(np.concatenate(parts)).view(-1, RECORD)
    return records[:, 1:].contiguous().view(-1, 3, 32, 32), records[:, 0].long()


@dataclass
class Batches:
    """Endless random batches with horizontal flips; batch i depends on the seed and i alone."""

    images: Tensor
    labels: Tensor
    size: int
    seed: int
    position: int = 0  # i of the next batch
    bad: int = 0  # broken examples, which training/loop.py logs

    def __next__(self) -> dict:
        generator = torch.Generator().manual_seed(self.seed * 10_000_000 + self.position)
        self.position += 1
        i = torch.randint(len(self.labels), (self.size,), generator=generator)
        flip = torch.rand((self.size, 1, 1, 1), generator=generator) < 0.5
        images = torch.where(flip, self.images[i].flip(3), self.images[i])
        names = [f"picture {k}" for k in i.tolist()]
        return {"images": images, "labels": self.labels[i], "names": names}


def to_x0(images: Tensor) -> Tensor:
    """Pictures (b, 3, 32, 32) in uint8 as x_0 (b, 12, 16, 16) in [-1, 1]."""
    return F.pixel_unshuffle(images.float() / 127.5 - 1, 2)


def to_bytes(x_0: Tensor) -> Tensor:
    """x_0 (b, 12, 16, 16), clipped to [-1, 1], as pictures (b, 3, 32, 32) in uint8."""
    x = F.pixel_shuffle(x_0.float().contiguous(), 2)
    return ((x.clamp(-1, 1) + 1) * 127.5).round().byte()


# ---------------------------------------------------------------------------------------- teacher


def unet_json(channels) -> dict:
    """config.json of a UNet for x_0, in diffusers' words; its finest level has no attention."""
    coarser = len(channels) - 1
    return {
        "_class_name": "UNet2DConditionModel", "sample_size": 16,
        "in_channels": 12, "out_channels": 12, "block_out_channels": list(channels),
        "layers_per_block": 1, "transformer_layers_per_block": 1, "use_linear_projection": True,
        "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * coarser],
        "up_block_types": [*["CrossAttnUpBlock2D"] * coarser, "UpBlock2D"], "norm_num_groups": 32,
        # The number of heads, as in SDXL's config.json; each head is 32 wide.
        "attention_head_dim": [c // 32 for c in channels], "cross_attention_dim": len(CLASSES),
        # The pooled label, then six sizes of 32 sinusoids each: of 8, K could not be read.
        "addition_embed_type": "text_time", "addition_time_embed_dim": 32,
        "projection_class_embeddings_input_dim": len(CLASSES) + 6 * 32,
    }  # fmt: skip


def condition(label: Tensor, keep_label: Tensor | None = None) -> dict:
    """The condition of labels (b,), null where keep_label (b,) is false.

    prompt_embeds (b, 1, 10), pooled (b, 10) and SDXL's time_ids (b, 6).
    """
    code = F.one_hot(label, len(CLASSES)).float()
    if keep_label is not None:
        code = code * keep_label[:, None]
    # No picture was ever resized or cropped.
    sizes = torch.tensor([32.0, 32, 0, 0, 32, 32], device=label.device).expand(len(label), 6)
    return {"prompt_embeds": code[:, None], "pooled": code, "time_ids": sizes}


def teacher_loss(unet, x_0: Tensor, cond: dict, t: Tensor, eps: Tensor, schedule: Schedule):
    """Mean squared error of eps(x_t, t, cond) with min-SNR weights (Hang et al. 2023); a scalar."""
    alpha_t, sigma_t, _ = schedule.at(t, 1)
    # min(SNR, 5) / SNR: at low noise eps says little about the picture.
    weight = (5 * (sigma_t / alpha_t).square()).clamp(max=1).float()
    error = unet(schedule.diffuse(x_0, eps, t), t, cond).float() - eps
    return (weight * error.square().mean((1, 2, 3))).mean()
