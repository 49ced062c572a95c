"""The classifier that stands in for Inception in the CIFAR-10 experiment.

Its features give the Fréchet distance and its predictions the classifier accuracy. The experiment
trains it, so neither figure compares with a paper's FID.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cifar.data import CLASSES, to_x0

BORDER = 4  # zeros around a picture that is cropped for training


def _conv(c_in: int, c: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(c_in, c, 3, padding=1, bias=False), nn.BatchNorm2d(c), nn.ReLU())


class Residual(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Classifier(nn.Module):
    """ResNet9 at half its width: x_0 (b, 12, 16, 16) to features (b, 256) and logits (b, 10)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            _conv(12, 64), _conv(64, 128), nn.MaxPool2d(2),
            Residual(_conv(128, 128), _conv(128, 128)), _conv(128, 256), nn.MaxPool2d(2),
            Residual(_conv(256, 256), _conv(256, 256)), nn.AdaptiveMaxPool2d(1), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.Linear(256, len(CLASSES), bias=False)

    def forward(self, x_0: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x_0)
        # ResNet9 scales its logits down, which keeps the first steps small.
        return features, self.head(features) / 8


def random_crop(images: Tensor, corners: Tensor) -> Tensor:
    """Pictures (b, c, h, w) cut out of the same with a border of zeros, for data augmentation.

    corners: (b, 2) the upper left corner of each crop, from 0 to 2 BORDER; BORDER is the picture.
    """
    h, w = images.shape[2:]
    padded = F.pad(images, (BORDER, BORDER, BORDER, BORDER))
    pairs = zip(padded, corners.tolist())
    return torch.stack([x[:, top : top + h, left : left + w] for x, (top, left) in pairs])


@torch.no_grad()
def classify(classifier: Classifier, images: Tensor, device) -> tuple[Tensor, Tensor]:
    """Features (n, 256) in float64 and predicted classes (n,) of pictures (n, 3, 32, 32)."""
    outputs = [classifier(to_x0(batch.to(device))) for batch in images.split(500)]
    features, logits = (torch.cat(parts).cpu() for parts in zip(*outputs))
    return features.double(), logits.argmax(1)
