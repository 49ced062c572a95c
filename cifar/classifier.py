"""CIFAR-10 for the code of SDXL: pictures, the UNet's small config, the teacher's loss, a judge.

A picture (3, 32, 32) is folded to (12, 16, 16), a quarter of the pixels at four times the channels:
the same UNet class then spends its time in wide layers. A class label takes the prompt's place: one
token and the pooled vector, both its one-hot code; zeros are the null condition, as for SDXL.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar.data import CLASSES, fold

# -------------------------------------------------------------------------------------- the judge
#
# A small classifier stands in for Inception: its features give the Fréchet distance, its answers
# the class agreement. It is trained here, so what it says is not the FID of any paper.


def _conv(c_in: int, c: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU())


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Classifier(nn.Module):
    """ResNet9, half as wide and on folded pictures (b, 12, 16, 16): features, then logits."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            _conv(12, 64), _conv(64, 128), nn.MaxPool2d(2),
            Residual(_conv(128, 128), _conv(128, 128)), _conv(128, 256), nn.MaxPool2d(2),
            Residual(_conv(256, 256), _conv(256, 256)), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(256, len(CLASSES), bias=False)

    def forward(self, x_0: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x_0)  # (b, 256)
        # ResNet9 scales its logits down, which keeps the first steps small.
        return features, self.head(features) / 8


def shifted(x: Tensor, by: Tensor) -> Tensor:
    """Pictures (b, c, h, w), each moved by its row of `by` (b, 2) in 0..8, less 4; zeros around."""
    padded, (h, w) = F.pad(x, (4, 4, 4, 4)), x.shape[2:]
    pairs = zip(padded, by.tolist(), strict=True)
    return torch.stack([one[:, i : i + h, j : j + w] for one, (i, j) in pairs])


@torch.no_grad()
def judge(classifier: Classifier, images: Tensor, device) -> tuple[Tensor, Tensor]:
    """Features (n, 256) in float64 and answers (n,) for pictures (n, 3, 32, 32) in uint8."""
    found = [classifier(fold(part.to(device))) for part in images.split(500)]
    features, logits = (torch.cat(parts).cpu() for parts in zip(*found, strict=True))
    return features.double(), logits.argmax(1)
