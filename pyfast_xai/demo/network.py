"""The demo network: a small classifier of the cluttered digit scenes, with its trained weights."""

from importlib.resources import files

import torch
from torch import Tensor, nn

WEIGHTS = "digits.safetensors"


class _ConvBlock(nn.Module):
    """3x3 convolution, batch norm, ReLU; ``[N, c_in, H, W]`` to ``[N, c_out, H, W]``."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(c_out)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.norm(self.conv(x)))


class _ResidualBlock(nn.Module):
    """Two 3x3 convolutions beside a 1x1 projection; ``[N, c_in, H, W]`` to ``[N, c_out, H, W]``."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(c_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(c_out)
        self.project = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(c_out)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.relu1(self.norm1(self.conv1(x)))))
        return self.relu2(y + self.project_norm(self.project(x)))


class DigitsNet(nn.Module):
    """Classifier of ``[N, 3, 96, 96]`` scenes into ten digits.

    Convolutions and max-pools down to 12x12, a residual block with a projection, a global average pool, a hidden
    fully connected layer and the classifier: one of each kind of layer that an explanation has to trace through.
    ``block`` is the last convolutional stage, whose ``[N, 80, 12, 12]`` output class maps are read from.

    Example:
        >>> import torch
        >>> from pyfast_xai.demo import DigitsNet
        >>> DigitsNet().eval()(torch.rand(2, 3, 96, 96)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.stage1 = _ConvBlock(3, 16)
        self.pool1 = nn.MaxPool2d(2)
        self.stage2 = _ConvBlock(16, 32)
        self.pool2 = nn.MaxPool2d(2)
        self.stage3 = nn.Sequential(_ConvBlock(32, 40), _ConvBlock(40, 48))
        self.pool3 = nn.MaxPool2d(2)
        self.block = _ResidualBlock(48, 80)
        self.gap = nn.AdaptiveAvgPool2d(1)
        self.hidden = nn.Linear(80, 64)
        self.relu = nn.ReLU()
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Returns the scores of the ten digits.

        Args:
            x: ``[N, 3, 96, 96]`` float32, RGB in 0..1.

        Returns:
            ``[N, 10]`` float32 logits.
        """
        x = self.pool1(self.stage1(x))
        x = self.pool2(self.stage2(x))
        x = self.pool3(self.stage3(x))
        x = self.gap(self.block(x)).flatten(1)
        return self.classifier(self.relu(self.hidden(x)))


def load() -> DigitsNet:
    """Returns the trained network, in eval mode, on the CPU, with its parameters frozen.

    Gradients by the image still flow; none is kept for the weights. The global random state is left alone.

    Example:
        >>> import torch
        >>> from pyfast_xai import demo
        >>> model = demo.load()
        >>> model(torch.rand(2, 3, 96, 96)).shape, model.training
        (torch.Size([2, 10]), False)
    """
    from safetensors.torch import load as read

    stored = read(files("pyfast_xai.demo").joinpath(WEIGHTS).read_bytes())
    # Stored in half precision to keep the package small; the network computes in float32.
    state = {name: value.float() if value.is_floating_point() else value for name, value in stored.items()}
    # The initial weights are thrown away, so the draws they cost must not show; nor does a default device matter.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        net = DigitsNet()
    net.load_state_dict(state)
    return net.eval().requires_grad_(False)
