"""Further arguments of a model go with their images, however these are repeated, split or left out."""

import pytest
import torch
from torch import nn

from pyfast_xai import LIME, RISE, CNNFixations, FGVis, MeaningfulPerturbation, Occlusion
from pyfast_xai.explainers.common.tensors import take_rows


class WithTable(nn.Module):
    """An image and four numbers that belong to it, as a second argument, by name or within a dict."""

    def __init__(self):
        super().__init__()
        self.conv, self.mix, self.head = nn.Conv2d(3, 8, 3), nn.Linear(4, 8), nn.Linear(8, 5)

    def forward(self, x, table=None, *, extra=None, scale=None):
        table = extra["table"] if table is None else table
        y = self.conv(x).relu().mean((2, 3)) * self.mix(table).sigmoid()
        return self.head(y if scale is None else y * scale)


class Fixed(nn.Module):
    """The same network for one image, with its numbers built in."""

    def __init__(self, model, table):
        super().__init__()
        self.model, self.table = model, table

    def forward(self, x):
        return self.model(x, self.table.expand(len(x), -1))


METHODS = {
    "occlusion": lambda model: Occlusion(model, window=4, stride=4, batch_size=5),
    "rise": lambda model: RISE(model, n_masks=12, batch_size=5),
    "lime": lambda model: LIME(model, n_samples=12, feature_mask=torch.arange(256).view(16, 16) // 32, batch_size=5),
    "meaningful-perturbation": lambda model: MeaningfulPerturbation(model, n_iterations=3, scale=4, batch_size=3),
    "fgvis": lambda model: FGVis(model, n_iterations=12, patience=0, score_ratio=0.3),
    "crops": lambda model: CNNFixations(model, crops=12),
}
CALLS = {
    "as it stands": lambda table: ((table,), {}),
    "by name": lambda table: ((), {"table": table}),
    "in a dict": lambda table: ((), {"extra": {"table": table, "more": "words"}}),
    "beside one for all": lambda table: ((table,), {"scale": torch.tensor([1.0], dtype=table.dtype)}),
}


@pytest.mark.parametrize(
    ("count", "call"),
    [(1, "as it stands"), (2, "as it stands"), (7, "as it stands"), *((2, call) for call in list(CALLS)[1:])],
)
@pytest.mark.parametrize("method", METHODS)
def test_each_image_has_its_own(method, count, call):
    torch.manual_seed(count)
    model, images = WithTable().eval().double(), torch.randn(count, 3, 16, 16).double()
    table = torch.randn(count, 4).double() * 3
    targets = torch.arange(count) % 5 if method == "crops" else torch.stack([torch.arange(count) % 5] * 2, 1)
    targets[..., -1:] = (targets[..., -1:] + 1) % 5
    args, kwargs = CALLS[call](table)
    result = METHODS[method](model)(images, targets, *args, **kwargs)
    for n in range(count):
        expected = METHODS[method](Fixed(model, table[n : n + 1]).eval())(images[n : n + 1], targets[n : n + 1])
        each = len(expected)
        actual = result[n * each : (n + 1) * each]
        torch.testing.assert_close(actual.heatmap, expected.heatmap, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(actual.score, expected.score)


def test_rows_of_nested_arguments():
    by_image, shared = torch.arange(6).view(3, 2), torch.arange(4)
    arguments = ((by_image, None, 3), {"a": [by_image[:, 0], shared], "b": {"c": torch.tensor(5)}})
    (used, nothing, number), named = take_rows(arguments, 3, torch.tensor([2, 0, 0, 1]))
    assert used.tolist() == [[4, 5], [0, 1], [0, 1], [2, 3]]
    assert nothing is None
    assert number == 3
    assert named["a"][0].tolist() == [4, 0, 0, 2]
    assert named["a"][1] is shared
    assert int(named["b"]["c"]) == 5
