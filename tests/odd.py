"""Tensors without values that can be computed with, and things that are no numbers."""

import numpy as np
import torch
from torch import Tensor, nn

WITHOUT_VALUES = {
    "sparse": Tensor.to_sparse,
    "opaque": lambda x: x.float().to_mkldnn(),
    "meta": lambda x: x.to("meta"),
    "nested": lambda x: torch.nested.nested_tensor([x, x]),
    "jagged": lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.qint8),
    "stored": lambda x: x.to(torch.float8_e4m3fn),
}
NO_NUMBERS = {
    "word": "2",
    "mapping": {},
    "object": object(),
    "module": nn.Linear(1, 1),
    "complex": 1j,
    "nan": float("nan"),
    "beyond floats": 10**400,
    "words": np.array(["2"]),
    "nothing in it": [None],
}
