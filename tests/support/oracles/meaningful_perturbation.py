"""Meaningful perturbation as the paper writes it (Fong and Vedaldi, 2017), one image at a time, with autograd."""

import numpy as np
import torch
from scipy.ndimage import gaussian_filter
from torch.nn import functional


def blur_matrix(size, sigma):
    """Gaussian of SciPy along one side, edges mirrored, cut at three deviations, as a matrix."""
    reach = min(int(np.ceil(3 * sigma)), size - 1)
    columns = [gaussian_filter(row, sigma, mode="mirror", radius=reach) for row in np.eye(size)]
    return torch.from_numpy(np.stack(columns, 1))


def blur(x, sigma):
    rows, columns = (blur_matrix(size, sigma) for size in x.shape[-2:])
    return rows @ x @ columns.T


def enlarge(mask, scale, size, sigma):
    """Each cell becomes scale x scale pixels; then the Gaussian."""
    at = [torch.arange(side) // scale for side in size]
    whole = mask[at[0]][:, at[1]]
    return blur(whole, sigma) if sigma else whole


def total_variation(mask, beta):
    """`tv` of optimize_mask.py: forward differences, zero past the edge."""
    down, right = torch.zeros_like(mask), torch.zeros_like(mask)
    down[:-1] = mask[1:] - mask[:-1]
    right[:, :-1] = mask[:, 1:] - mask[:, :-1]
    squares = down**2 + right**2
    return (squares[squares > 0] ** (beta / 2)).sum()


def circle(model, image, null, target, scale):
    """`test_circular_masks` and the mask that starts from it, with lengths in shares of 224 pixels."""
    height, width = image.shape[1:]
    side = min(height, width)
    y, x = np.ogrid[-(height // 2) : height - height // 2, -(width // 2) : width - width // 2]

    def score(shown):
        return model(shown[None]).softmax(1)[0, target].item()

    before, least = score(image), score(null)
    for radius in np.arange(0, 175, 5) * side / 224:
        grid = (x * x + y * y <= radius * radius).astype(float)
        disc = 1 - blur(torch.from_numpy(grid), 10 * side / 224)
        after = score(disc * image + (1 - disc) * null)
        if after - least <= 0.01 * (before - least):
            break
    rows = [min(i * scale + scale // 2, (height - 1)) for i in range(-(-height // scale))]
    columns = [min(i * scale + scale // 2, (width - 1)) for i in range(-(-width // scale))]
    return disc[rows][:, columns]


def optimise(
    model, image, null, target, mask, iterations, lr, l1, tv, beta, scale, smooth, jitter, noise, generator, score
):
    """The mask after each iteration; `score` is a function of the outputs of one image."""
    size = image.shape[1:]
    mask = mask.clone().requires_grad_()
    adam = torch.optim.Adam([mask], lr=lr)
    room = [side + jitter for side in size]
    large, large_null = (
        functional.interpolate(x[None], room, mode="bilinear", align_corners=False)[0] if jitter else x
        for x in (image, null)
    )
    masks = []
    for _ in range(iterations):
        y, x = (int(torch.randint(max(1, jitter), (), generator=generator)) for _ in range(2))
        shaken = mask
        if noise:
            shaken = mask + noise * torch.randn(1, *mask.shape, generator=generator)[0].double()
        m = enlarge(shaken.clamp(0, 1), scale, size, smooth)
        recorded, gone = (whole[:, y : y + size[0], x : x + size[1]] for whole in (large, large_null))
        perturbed = m * recorded + (1 - m) * gone
        loss = l1 * (1 - mask).abs().sum() + tv * total_variation(mask, beta) + score(model(perturbed[None])[0])
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            mask.clamp_(0, 1)
        masks.append(mask.detach().clone())
    return masks
