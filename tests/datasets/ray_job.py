"""A run on a Ray cluster, for test_ray.py: `python ray_job.py PICTURES OUT ADDRESS`; slow enough to be killed."""

import sys
import time
from pathlib import Path

import torch
from torch import nn

from pyfast_xai.datasets.on_ray import explain_on_ray
from pyfast_xai.images import Preprocess
from pyfast_xai.models import LoadedModel

# Recorded, since the numbers of replays depend on how many calls there were before.
RUN = {"method": "integrated-gradients", "method_settings": {"n_steps": 60}, "shard_size": 4, "accelerate": False}


def network():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return LoadedModel(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 5)).eval(), Preprocess(24), None, "tiny")


class SlowAtFirst:
    """Tensors of which the first can be read only when two other shards are finished."""

    def __init__(self, out):
        self.out = out

    def __len__(self):
        return 24

    def __getitem__(self, index):
        end = time.monotonic() + 120
        while index == 0 and len(list(Path(self.out).glob("part-*.parquet"))) < 2:
            if time.monotonic() > end:
                raise TimeoutError("no other shard was done while this one was read")
            time.sleep(0.05)
        return torch.full((3, 24, 24), index / 24)


if __name__ == "__main__":
    pictures, out, address = sys.argv[1:]
    done = explain_on_ray(pictures, network(), out=out, address=address, actors=2, cpus=0.5, **RUN)
    print(done.rows, done.before)
