"""Linear models of weighted samples, in place of the scikit-learn models that Captum fits."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


class LinearModel:
    """Base of models that are fitted to samples with weights, with an intercept, in float64.

    Attributes:
        linear: the fitted layer of F features and one output; None before. Its first values are random numbers of the
            process, as of Captum's models, so that samples behind it are the same.
    """

    linear: nn.Linear | None = None

    def fit(self, train_data: Iterable[tuple[Tensor, Tensor, Tensor]]) -> None:
        """Fits the model.

        Args:
            train_data: batches of features `[m, F]`, outputs `[m]` and weights `[m]`.
        """
        features, outputs, weights = (torch.cat(parts) for parts in zip(*train_data, strict=True))
        kind = torch.promote_types(outputs.dtype, torch.float32)
        x, y, w = (part.detach().double().cpu() for part in (features, outputs, weights))
        w = w / w.sum()
        root = w.sqrt()
        middle, level = w @ x, w @ y
        coefficients = self._solve(root[:, None] * (x - middle), root * (y - level))
        self.linear = nn.Linear(len(coefficients), 1)
        self.linear.weight.data = coefficients[None].to(outputs.device, kind)
        self.linear.bias.data = (level - coefficients @ middle)[None].to(outputs.device, kind)

    @staticmethod
    def draw(features: int) -> None:
        """Draws the random numbers of the process that `fit` draws with a `DataLoader` of so many features."""
        next(iter(DataLoader(TensorDataset(torch.zeros(1)))))
        nn.Linear(features, 1)

    def representation(self) -> Tensor:
        """Returns the coefficient of each feature, `[1, F]`."""
        assert self.linear is not None
        return self.linear.weight.detach()

    def _solve(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns the coefficients for centred samples times the roots of their weights, which add up to one."""
        raise NotImplementedError


class LinearRegression(LinearModel):
    """Least squares; of several solutions the shortest."""

    def _solve(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.linalg.lstsq(x, y[:, None], driver="gelsd").solution[:, 0]


class Lasso(LinearModel):
    """Half the weighted mean square of the errors, and alpha times the sum of the coefficients' sizes, made smallest.

    One coefficient after the other takes its best value until none moves by more than `tol` of the largest.

    Args:
        alpha: weight of the penalty.
        tol: when to stop.
        max_iter: rounds at most.
    """

    def __init__(self, alpha: float = 1.0, tol: float = 1e-8, max_iter: int = 10_000) -> None:
        self.alpha, self.tol, self.max_iter = alpha, tol, max_iter

    def _solve(self, x: Tensor, y: Tensor) -> Tensor:
        columns, lengths = x.T.contiguous(), x.square().sum(0).tolist()
        coefficients, residual = [0.0] * len(columns), y.clone()
        for _ in range(self.max_iter):
            largest = moved = 0.0
            for j, (column, length) in enumerate(zip(columns, lengths, strict=True)):
                if length == 0:
                    continue
                before = coefficients[j]
                slope = float(column @ residual) + length * before
                after = (slope - min(max(slope, -self.alpha), self.alpha)) / length
                if after != before:
                    residual.add_(column, alpha=before - after)
                coefficients[j] = after
                largest, moved = max(largest, abs(after)), max(moved, abs(after - before))
            if moved <= self.tol * largest:
                break
        return torch.tensor(coefficients, dtype=torch.float64)
