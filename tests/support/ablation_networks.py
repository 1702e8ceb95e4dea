"""Networks of images `[N, 3, 16, 12]` and five classes, with a layer `layer` of six channels to ablate."""

from torch import nn
from torch.nn import functional


class Stem(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.layer = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 6, 3, 2, 1)

    def forward(self, x):
        x = functional.relu(self.conv1(x))
        return self.above(self.layer(x), x)


class Average(Stem):
    """Nothing but an average and a linear layer follows."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 5)

    def above(self, x, below):
        return self.fc(functional.adaptive_avg_pool2d(functional.relu(x), 1).flatten(1))


class Flattened(Stem):
    """A linear layer reads the flattened map, and more layers follow."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6 * 6, 7), nn.Linear(7, 5)

    def above(self, x, below):
        x = functional.max_pool2d(functional.relu(x), 2, ceil_mode=True)[:, :, :2]
        x = functional.adaptive_avg_pool2d(x, (3, 2)).flatten(1)
        return self.fc2(functional.silu(self.fc1(x), inplace=True))


class Skip(Stem):
    """A value from below the layer joins above it."""

    def __init__(self):
        super().__init__()
        self.up, self.last = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 5, 1)

    def above(self, x, below):
        x = functional.interpolate(functional.silu(self.up(x)), below.shape[2:], mode="nearest")
        return self.last(functional.relu_(x.add_(below))).mean((2, 3))


class Shifted(Stem):
    """Zeros do not stay zeros on the way to the linear layer."""

    def __init__(self):
        super().__init__()
        self.bn, self.fc = nn.BatchNorm2d(6), nn.Linear(6, 5)
        self.bn.running_mean.normal_()

    def above(self, x, below):
        return self.fc(functional.relu(self.bn(x)).mean((2, 3)))


class Padded(Stem):
    """The borders of an average count zeros, which mixes the numbers of channels."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6 * 12, 5)

    def above(self, x, below):
        return self.fc(functional.avg_pool2d(x, 3, 1, 1).flatten(1))
