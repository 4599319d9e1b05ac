"""What all cases share: the arrays of a vector file, and their conversion."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, np.ndarray]


def t(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array))
