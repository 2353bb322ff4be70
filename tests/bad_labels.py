"""Labels that are no classes, and what an error says of them: four classes, six rows."""

import numpy as np
import torch
from torch.nn.functional import one_hot

__all__ = ["BAD_LABELS", "CLASSES", "NUM_CLASSES", "ROWS"]

ROWS, NUM_CLASSES = 6, 4
CLASSES = torch.tensor([0, 1, 2, 3, 0, 1])

BAD_LABELS = {
    "one-hot": (one_hot(CLASSES), r"got torch.int64 of shape \(6, 4\): of one-hot rows give .*.argmax\(-1\)"),
    "one-hot floats": (one_hot(CLASSES).float(), r"got torch.float32 of shape \(6, 4\): of one-hot rows give"),
    "a column": (CLASSES[:, None], r"got torch.int64 of shape \(6, 1\): give .*\[:, 0\](\n|$)"),
    "a column of targets": (
        torch.randn(6, 1).float(),
        r"got .*\(6, 1\): give .*\[:, 0\].long\(\), if they are classes; real",
    ),
    "floats": (
        CLASSES.float(),
        r"got torch.float32 of shape \(6,\): give .*.long\(\), if they are classes; real targets",
    ),
    "halves": (CLASSES + 0.5, "got torch.float"),
    "nan": (torch.full((6,), torch.nan), "got torch.float"),
    "negative": (CLASSES - 1, r"got torch.int64 of shape \(6,\) from -1 to 2(\n|$)"),
    "counted from one": (CLASSES + 1, r"got torch.int64 of shape \(6,\) from 1 to 4: count them from 0, .* - 1(\n|$)"),
    "too large": (CLASSES.to(torch.uint8) * 9, r"got torch.uint8 of shape \(6,\) from 0 to 27(\n|$)"),
    "too few": (CLASSES[:5], r"got torch.int64 of shape \(5,\)(\n|$)"),
    "of tokens": (CLASSES[:, None].expand(6, 3), r"got torch.int64 of shape \(6, 3\)(\n|$)"),
    "numpy": (np.arange(6), "got ndarray: give torch.as_tensor"),
}
