"""A run on Ray, for test_ray.py: `python ray_job.py PICTURES OUT`; slow enough to be killed in its middle."""

import sys

import torch
from torch import nn

from pyfast_xai.datasets.on_ray import explain_on_ray
from pyfast_xai.images import Preprocess
from pyfast_xai.models import LoadedModel

RUN = {"method": "integrated-gradients", "method_settings": {"steps": 60}, "shard_size": 4}


def network():
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3, stride=2), nn.ReLU(), nn.Conv2d(4, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
    return LoadedModel(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8, 5)).eval(), Preprocess(24), None, "tiny")


if __name__ == "__main__":
    done = explain_on_ray(sys.argv[1], network(), out=sys.argv[2], actors=2, cpus=0.5, **RUN)
    print(done.rows, done.before)
