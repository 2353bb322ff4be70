"""Images with their labels, and how they are parted."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch


class Split(NamedTuple):
    """Images and their labels; `TensorDataset(*split)` makes them a torch data set.

    Attributes:
        images: float32 in [0, 1], shape (N, C, H, W), or (N, C * H * W) if flattened.
        labels: int64, shape (N,), indices into the class names.
    """

    images: torch.Tensor
    labels: torch.Tensor

    def flatten(self) -> "Split":
        """The same with each image as one vector."""
        return Split(self.images.flatten(1), self.labels)


@dataclass(frozen=True)
class Dataset:
    """The three parts of a data set.

    Attributes:
        name: What `load` knows it by.
        train: For fitting.
        validation: For every choice.
        test: For final numbers.
        class_names: One name per label.
        image_shape: (C, H, W), also where the images are flattened.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]


def make_split(images: np.ndarray, labels: np.ndarray, white: int) -> Split:
    """Returns pixels between 0 and `white`, and labels, as tensors."""
    # Divided in one go: a float copy of all of CIFAR-10's pixels beside the result takes another 600 MB.
    pixels = np.divide(images, white, dtype=np.float32, order="C")
    return Split(torch.from_numpy(pixels), torch.from_numpy(labels.astype(np.int64)))


def hold_out(split: Split, fraction: float) -> tuple[Split, Split]:
    """Returns the rest and a part that has `fraction` of each class, always the same."""
    images, labels = split
    generator = torch.Generator().manual_seed(0)  # of its own: the global one stays as it was
    held = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(-1)
        order = torch.randperm(len(members), generator=generator)
        held[members[order[: round(fraction * len(members))]]] = True
    return Split(images[~held], labels[~held]), Split(images[held], labels[held])
