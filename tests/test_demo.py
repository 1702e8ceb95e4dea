"""The demo scenes and the packaged network that reads them."""

import sys
from importlib.resources import files

import pytest
import torch

from pyfast_xai.demo import DigitsNet, load, make_scenes
from pyfast_xai.demo import scenes as painter
from pyfast_xai.demo.network import WEIGHTS
from pyfast_xai.errors import InputError


@pytest.fixture(scope="module")
def scenes():
    return make_scenes(96, seed=11)


@pytest.fixture(scope="module")
def net():
    return load()


def test_scenes_have_the_stated_shapes_and_ranges(scenes):
    assert scenes.images.shape == (96, 3, 96, 96)
    assert scenes.images.dtype == torch.float32
    assert scenes.labels.shape == (96,)
    assert scenes.labels.dtype == torch.int64
    assert scenes.boxes.shape == (96, 4)
    assert scenes.boxes.dtype == torch.int64
    assert scenes.images.min() >= 0
    assert scenes.images.max() <= 1
    assert set(scenes.labels.tolist()) == set(range(10))


def test_scenes_depend_on_seed_and_split_alone(scenes):
    repeated = make_scenes(96, seed=11)
    for first, second in zip(scenes, repeated, strict=True):
        assert torch.equal(first, second)
    fewer = make_scenes(70, seed=11)
    assert torch.equal(fewer.boxes, scenes.boxes[:70])
    assert torch.equal(fewer.labels, scenes.labels[:70])
    # A batch of another length may take another vector path through an operator: the last bit is free.
    torch.testing.assert_close(fewer.images, scenes.images[:70], rtol=0, atol=1e-5)
    assert not torch.equal(make_scenes(96, seed=12).images, scenes.images)
    assert not torch.equal(make_scenes(96, seed=11, split="train").images, scenes.images)


def test_scenes_leave_the_global_random_state_alone():
    before = torch.get_rng_state()
    make_scenes(2, seed=0)
    load()
    assert torch.equal(torch.get_rng_state(), before)


def test_a_default_device_does_not_matter(scenes):
    painter._digits.cache_clear()
    with torch.device("meta"):
        repeated = make_scenes(96, seed=11)
        network = load()
    assert torch.equal(repeated.images, scenes.images)
    assert {value.device.type for value in network.state_dict().values()} == {"cpu"}


def test_boxes_are_the_tight_bounds_of_what_the_digit_repaints(scenes):
    rows = painter._draw(96, 11)
    tiles, _ = painter._digits("test")
    without = torch.cat([painter._backdrop(part, tiles) for part in rows.split(painter._CHUNK)])
    changed = (scenes.images != without).any(1)
    for mask, (x1, y1, x2, y2) in zip(changed, scenes.boxes.tolist(), strict=True):
        ys, xs = mask.nonzero(as_tuple=True)
        assert (xs.min(), ys.min(), xs.max(), ys.max()) == (x1, y1, x2, y2)


def test_digits_lie_whole_within_the_scene_and_all_over_it():
    x1, y1, x2, y2 = make_scenes(512, seed=5).boxes.unbind(1)
    # A digit that never touches the border was not cut by it.
    assert min(x1.min(), y1.min()) >= 1
    assert max(x2.max(), y2.max()) <= painter.SIZE - 2
    height = y2 - y1 + 1
    assert height.min() >= 20
    assert height.max() <= 54
    centres = torch.stack(((x1 + x2) / 2, (y1 + y2) / 2))
    assert (centres.std(1) > 12).all()


def test_a_centre_guess_localises_badly():
    x1, y1, x2, y2 = make_scenes(512, seed=6).boxes.unbind(1)
    middle = (painter.SIZE - 1) / 2
    hit = (x1 <= middle) & (middle <= x2) & (y1 <= middle) & (middle <= y2)
    assert hit.float().mean() < 0.35
    width, height = 28, 40
    inter_x = (x2 + 0.5).clamp(max=middle + width / 2) - (x1 - 0.5).clamp(min=middle - width / 2)
    inter_y = (y2 + 0.5).clamp(max=middle + height / 2) - (y1 - 0.5).clamp(min=middle - height / 2)
    inter = inter_x.clamp(min=0) * inter_y.clamp(min=0)
    union = (x2 - x1 + 1) * (y2 - y1 + 1) + width * height - inter
    assert (inter / union >= 0.5).float().mean() < 0.12


def test_no_digit_is_in_both_splits():
    train, test = (painter.split_indices(1797, split) for split in ("train", "test"))
    assert not set(train.tolist()) & set(test.tolist())
    assert len(train) + len(test) == 1797
    assert len(test) == 359
    pools = [{tile.numpy().tobytes() for tile in painter._digits(split)[0]} for split in ("train", "test")]
    assert not pools[0] & pools[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 0), "count must be"),
        ((2.0, 0), "count must be"),
        ((1, -1), "seed must be"),
        ((1, 0, "valid"), "split must be"),
    ],
)
def test_a_wrong_argument_is_named(arguments, message):
    with pytest.raises(InputError, match=message):
        make_scenes(*arguments)


def test_a_missing_scikit_learn_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    painter._digits.cache_clear()
    with pytest.raises(InputError, match=r"pip install scikit-learn"):
        make_scenes(1, seed=0)


def test_packaged_weights_are_small():
    assert len(files("pyfast_xai.demo").joinpath(WEIGHTS).read_bytes()) < 600_000


def test_load_gives_a_frozen_network_in_eval_mode(net):
    assert isinstance(net, DigitsNet)
    assert not any(module.training for module in net.modules())
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert all(parameter.dtype == torch.float32 for parameter in net.parameters())


def test_gradients_by_the_image_flow_through_the_frozen_network(net, scenes):
    images = scenes.images[:2].clone().requires_grad_()
    net(images).gather(1, scenes.labels[:2, None]).sum().backward()
    assert images.grad.abs().amax((1, 2, 3)).min() > 0


def test_last_stage_is_twelve_by_twelve(net, scenes):
    maps = []
    hook = net.block.register_forward_hook(lambda module, inputs, output: maps.append(output))
    try:
        scores = net(scenes.images[:2])
    finally:
        hook.remove()
    assert scores.shape == (2, 10)
    assert maps[0].shape == (2, 80, 12, 12)


def test_network_reads_scenes_of_unseen_digits(net):
    scenes = make_scenes(256, seed=20_240)
    with torch.no_grad():
        correct = (net(scenes.images).argmax(1) == scenes.labels).float().mean()
    # 0.980 was measured on 4096 scenes; four standard errors of a share of 256 scenes are 0.035.
    assert correct >= 0.94
