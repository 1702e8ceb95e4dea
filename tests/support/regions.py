"""Regions for XRAI that need no segmentation."""

import torch


def quarters(image):
    """Returns the four quarters of an image `[C, H, W]`, bool `[4, H, W]`."""
    height, width = image.shape[1:]
    low, right = torch.arange(height)[:, None] >= height // 2, torch.arange(width) >= width // 2
    return torch.stack([(low == below) & (right == beside) for below in (False, True) for beside in (False, True)])
