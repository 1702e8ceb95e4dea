"""What is made of weights is made once, is bounded, and is shared; so is all that a replayed model keeps."""

import threading
from pathlib import Path

import pytest
import torch
from torch import nn

import pyfast_xai
from pyfast_xai.acceleration.replayed_model import MEMORY_LIMIT, ReplayedModel
from pyfast_xai.acceleration.weight_cache import WeightCache
from pyfast_xai.errors import InputError
from pyfast_xai.tape import record

KB = 1024


def copied(weight, *arguments):
    return weight.clone()


def weights(count, size=KB):
    return [torch.zeros(size // 4) for _ in range(count)]


def test_a_function_is_called_once_for_the_same():
    cache, calls = WeightCache(), []
    weight, other = weights(2)

    def counted(tensor, *arguments):
        calls.append(arguments)
        return tensor.clone()

    first = cache(counted, weight, 1)
    assert cache(counted, weight, 1) is first
    assert cache(counted, weight, 2) is not first
    assert cache(counted, other, 1) is not first
    assert cache(copied, weight, 1) is not first
    assert calls == [(1,), (2,), (1,)]
    assert 4 * KB < cache.nbytes < 4 * KB + 4 * KB


def test_what_was_used_longest_ago_goes_first():
    cache = WeightCache()
    options = weights(6, 10 * KB)
    limit = 45 * KB
    for weight in options[:4]:
        cache.next_call(limit)
        cache(copied, weight)
    cache.next_call(limit)
    saved = cache(copied, options[0])
    cache.next_call(limit)
    cache(copied, options[4])  # the second goes
    assert cache.nbytes <= limit
    cache.next_call(limit)
    assert cache(copied, options[0]) is saved
    assert cache.contains(saved)


def test_what_a_call_uses_is_not_thrown_out_by_the_same_call():
    """Else a model that is larger than the limit would have all of its weights made anew in every call."""
    cache, calls = WeightCache(), []

    def counted(weight):
        calls.append(weight)
        return weight.clone()

    options = weights(8, 10 * KB)
    for _ in range(3):
        cache.next_call(45 * KB)
        made = [cache(counted, weight) for weight in options]
        assert [result is not None for result in made] == [True] * 4 + [False] * 4
    assert len(calls) == 4


def test_what_is_pinned_stays_and_counts():
    cache = WeightCache()
    cache.next_call(25 * KB)
    pinned = cache(copied, weights(1, 20 * KB)[0], pinned=True)
    cache.next_call(25 * KB)
    assert cache(copied, weights(1, 20 * KB)[0]) is None
    assert cache.contains(pinned)


def test_results_that_lie_alike_are_one():
    cache, (weight,) = WeightCache(), weights(1, 100 * KB)
    alike = [cache(copied, weight, size, layout=lambda result: "one") for size in range(50)]
    assert len({id(result) for result in alike}) == 1
    other = cache(copied, weight, 99, layout=lambda result: "other")
    assert other is not alike[0]
    assert cache.nbytes < 2 * 100 * KB + 60 * 512
    cache.next_call(0)
    assert cache.nbytes == 0
    assert not cache.contains(alike[0])


def test_layouts_can_be_put_off():
    cache, (weight,) = WeightCache(), weights(1)
    cache.next_call(MEMORY_LIMIT, lay_out=False)
    assert cache(copied, weight, layout=lambda result: 1) is None
    assert cache(copied, weight, 1) is not None
    cache.next_call(MEMORY_LIMIT)
    made = cache(copied, weight, layout=lambda result: 1)
    cache.next_call(MEMORY_LIMIT, lay_out=False)
    assert cache(copied, weight, layout=lambda result: 1) is made


def test_threads_keep_the_books():
    cache, options = WeightCache(), weights(20, 10 * KB)

    def work(seed):
        order = torch.randperm(20, generator=torch.Generator().manual_seed(seed)).tolist()
        for index in order * 20:
            cache.next_call(95 * KB)
            result = cache(copied, options[index])
            assert result is None or torch.equal(result, options[index])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.nbytes <= 95 * KB
    assert cache.nbytes == len(cache._entries) * (10 * KB + 512)


# Of a replayed model


class Net(nn.Module):
    def __init__(self, width=48):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, width, 1), nn.ReLU()),
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x):
        positions = torch.linspace(0, 1, x.shape[-1]).repeat(1, 1, x.shape[-2], 1)  # a constant of each size
        return self.head(self.layers(x * positions).mean((2, 3)))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


@pytest.mark.parametrize("limit", [0, 100 * KB, 400 * KB, 2**20])
@pytest.mark.parametrize("explainer", [pyfast_xai.Saliency, pyfast_xai.GradCAM])
def test_the_limit_holds_and_explanations_are_right(model, limit, explainer):
    plain, fast = explainer(model), explainer(model).accelerate(memory_limit=limit)
    least = 30 * 2048  # one tape stays
    for number, size in enumerate(list(range(8, 20)) * 2):
        images = torch.rand(1 + number % 3, 3, size, 11)
        expected = plain(images).heatmap
        torch.testing.assert_close(fast(images).heatmap, expected, rtol=1e-3, atol=1e-3 * float(expected.max()))
        assert fast.accelerated_model.nbytes <= limit + least


def test_signatures_that_were_used_last_are_kept(model):
    accelerated = ReplayedModel(model, memory_limit=2**20)
    sizes = [torch.rand(1, 3, 8, size) for size in range(8, 40)]
    for images in sizes:
        accelerated.record(images)
    saved = list(accelerated._templates)
    assert 1 < len(saved) < len(sizes)
    with torch.no_grad():
        for images in sizes[-len(saved) :]:
            accelerated.record(images)
    assert list(accelerated._templates) == saved


def test_a_limit_below_zero_is_refused(model):
    with pytest.raises(InputError, match="memory_limit must be a number of bytes, 0 or larger, got -1"):
        pyfast_xai.Saliency(model).accelerate(memory_limit=-1)


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20


def soak(model, calls, sizes, limit):
    """MiB that the process has grown by in the second half of the calls."""
    fast, plain = pyfast_xai.GradCAM(model).accelerate(memory_limit=limit), pyfast_xai.GradCAM(model)
    half = 0.0
    for call in range(calls):
        images = torch.rand(1, 3, 24 + 2 * (call % sizes % 20), 24 + 2 * (call % sizes // 20))
        result = fast(images)
        assert fast.accelerated_model.nbytes <= limit + 30 * 2048
        if call % 97 == 0:
            torch.testing.assert_close(result.score, plain(images).score, rtol=1e-3, atol=1e-4)
        if call == calls // 2:
            half = resident()
    return resident() - half


reads_proc = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="this system has no /proc")


@reads_proc
def test_memory_stays_flat():
    torch.manual_seed(0)
    assert soak(Net().eval(), 160, 40, 4 * 2**20) < 32


@reads_proc
@pytest.mark.extended
def test_memory_stays_flat_over_many_sizes():
    torch.manual_seed(0)
    assert soak(Net(128).eval(), 2000, 200, 64 * 2**20) < 48


def test_views_that_the_new_layout_does_not_allow_are_taken_of_a_copy(model, caplog):
    """A convolution in channels_last gives what cannot be viewed as the contiguous map that the model viewed."""

    class Views(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
            self.head = nn.Linear(8, 5)

        def forward(self, x):
            x = torch.relu(self.one(x).contiguous())
            x = x.view(len(x), 2, 4, -1).transpose(1, 2).contiguous()  # groups of channels, shuffled
            x = self.two(x.view(len(x), 8, 12, 10))
            return self.head(x.view(len(x), 8, -1).mean(2))

    torch.manual_seed(0)
    views = Views().eval()
    for layout in (torch.contiguous_format, torch.channels_last):
        accelerated = ReplayedModel(views)
        for _ in range(4):
            images = torch.rand(2, 8, 12, 10).contiguous(memory_format=layout)
            try:
                expected = record(views, images).result
            except RuntimeError:  # the model itself cannot
                continue
            torch.testing.assert_close(accelerated.record(images).result, expected, rtol=1e-4, atol=1e-5)
    assert not caplog.messages
