"""Trains the demo network and writes its weights: ``python examples/train_digits.py``.

Needs the ``demo`` extra (scikit-learn). Every training step sees fresh scenes, so the network
cannot learn a clutter by heart; the test scenes are painted from digits that are never trained on.
"""

import argparse
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save

import pyfast_xai.demo
from pyfast_xai.demo.network import WEIGHTS, DigitsNet
from pyfast_xai.demo.scenes import Scenes, make_scenes

WINDOWS = ((0.4, 56), (0.6, 72), (1.0, 96))
"""Side of the training windows, in pixels, up to each share of the steps."""


def half_state(net: DigitsNet) -> dict[str, torch.Tensor]:
    """The network's state with floating point tensors rounded to float16, as it is stored."""
    return {
        name: (value.half() if value.is_floating_point() else value).contiguous()
        for name, value in net.state_dict().items()
    }


@torch.no_grad()
def accuracy(net: DigitsNet, count: int, seed: int) -> float:
    """Share of ``count`` test scenes that the network labels correctly."""
    net.eval()
    scenes = make_scenes(count, seed, "test")
    scores = torch.cat([net(images) for images in scenes.images.split(128)])
    net.train()
    return (scores.argmax(1) == scenes.labels).float().mean().item()


def crop(scenes: Scenes, side: int, generator: torch.Generator) -> torch.Tensor:
    """Windows ``[N, 3, side, side]`` of the scenes, placed at random so that each holds its whole digit."""
    limit = scenes.images.shape[-1] - side
    low = (scenes.boxes[:, 2:] - side + 1).clamp(0, limit)
    high = scenes.boxes[:, :2].clamp(0, limit)
    corner = low + (torch.rand(low.shape, generator=generator) * (high - low + 1)).long()
    windows = scenes.images.unfold(2, side, 1).unfold(3, side, 1)
    return windows[torch.arange(len(corner)), :, corner[:, 1], corner[:, 0]]


def train(steps: int, batch: int, rate: float, seed: int) -> DigitsNet:
    """Trains a network from scratch with AdamW and a one-cycle learning rate.

    The first steps see only a window around each digit: what a digit looks like is learned several times sooner
    there than where clutter dominates the average pool. The windows grow to whole scenes.
    """
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    net = DigitsNet().train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.2)
    start = time.perf_counter()
    with ThreadPoolExecutor(1) as painter:

        def paint(step: int) -> Future[Scenes]:
            return painter.submit(make_scenes, batch, seed * 1_000_000 + step, "train")

        upcoming = paint(1)
        for step in range(1, steps + 1):
            scenes, upcoming = upcoming.result(), paint(step + 1)
            side = next(side for until, side in WINDOWS if step <= until * steps)
            images = crop(scenes, side, generator).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(net(images), scenes.labels, label_smoothing=0.05)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            if step % 200 == 0 or step == steps:
                print(
                    f"step {step:5d}/{steps}  window {side}  loss {loss.item():.3f}"
                    f"  test accuracy {accuracy(net, 512, seed):.3f}  {time.perf_counter() - start:.0f} s",
                    flush=True,
                )
    return net


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the demo network on cluttered digit scenes.")
    parser.add_argument("--steps", type=int, default=1500, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=64, help="fresh scenes a step (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=4e-3, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="seed of weights and scenes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads an operator uses (default: %(default)s)")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path(pyfast_xai.demo.__file__).with_name(WEIGHTS),
        help="where to write the weights (default: inside the package)",
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    net = train(args.steps, args.batch, args.rate, args.seed)
    state = half_state(net)
    args.out.write_bytes(save(state))
    stored = DigitsNet()
    stored.load_state_dict(state)
    parameters = sum(p.numel() for p in stored.parameters())
    print(f"{parameters} parameters, {args.out.stat().st_size / 1000:.0f} kB in {args.out.name}")
    print(f"test accuracy of the stored weights on 4096 scenes: {accuracy(stored, 4096, seed=987654):.4f}")


if __name__ == "__main__":
    main()
