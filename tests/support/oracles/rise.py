"""The masks of RISE as the authors' code draws them, in NumPy."""

import numpy as np
import torch
from skimage.transform import resize


def slow_masks(count, cells, p1, size, seed):
    """`generate_masks` of eclique/RISE; only the random numbers come from torch."""
    generator = torch.Generator().manual_seed(seed)
    cell_size = np.ceil(np.array(size) / cells).astype(int)
    up_size = (cells + 1) * cell_size
    masks = np.empty((count, *size))
    for i in range(count):
        grid = torch.rand(cells, cells, generator=generator).numpy() < p1
        x, y = (int(torch.randint(int(c), (), generator=generator)) for c in cell_size)
        enlarged = resize(grid.astype(np.float64), up_size, order=1, mode="reflect", anti_aliasing=False)
        masks[i] = enlarged[x : x + size[0], y : y + size[1]]
    return masks
