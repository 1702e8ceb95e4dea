"""Replays that are tried out: the faster way serves, no answer is stale, and what raises or disagrees is recorded."""

import copy
import gc
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from pyfast_xai import CNNFixations, GradCAM, Saliency, SmoothGrad, tuning
from pyfast_xai.acceleration.replayed_model import ReplayedModel
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.common import explainer as explainers
from pyfast_xai.explainers.common.replay_trial import ReplayTrial
from pyfast_xai.tape import record
from pyfast_xai.tuning import Verdict, Verdicts

SETTLED = 16  # calls after which replays have nothing left to prepare, and times were taken
ANYTHING = 1e9  # a share of recorded calls that allows preparing in every call


class Small(nn.Module):
    scale = 1.0

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, x):
        return self.fc(torch.relu(self.norm(self.conv(x))).mean((2, 3)) * self.scale)


class Clock:
    """Makes up times: so many seconds for a recorded and for a replayed call of a trial."""

    def __init__(self, recorded, replayed):
        self.seconds = {"recorded": recorded, "replayed": replayed}
        self.last = "recorded"

    def __call__(self, device, threads):
        return lambda: self.seconds[self.last]


class Caller:
    """A trial on a model, and how each call was done."""

    def __init__(self, recorded=2.0, replayed=1.0, model=None, share=ANYTHING, **settings):
        self.model = model or Small().eval()
        self.clock = Clock(recorded, replayed)
        self.trial = ReplayTrial(self.model, stopwatch=self.clock, share=share, **settings)
        self.ways = []
        self.raises = self.draws = False
        self.agree = None

    def __call__(self, images, signature="images"):
        def run():
            replayed = self.trial.current
            self.clock.last = "recorded" if replayed is None else "replayed"
            self.ways.append(self.clock.last)
            if replayed is not None and self.raises:
                raise RuntimeError("no kernel")
            result = record(self.model, images).result if replayed is None else replayed.record(images).result
            return torch.rand(3) if self.draws else result

        return self.trial(run, signature=signature, agree=self.agree)

    def settled(self, images, calls=SETTLED):
        """Returns how the last call was done."""
        for _ in range(calls):
            close(self(images), self.model(images))
        return self.ways[-1]


def winners(trial):
    return [winner for winner, _ in trial.verdicts().values()]


def close(result, expected):
    torch.testing.assert_close(result, expected.detach(), rtol=0, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.fixture
def images():
    return torch.randn(2, 3, 12, 12)


def test_the_first_two_calls_of_a_signature_are_recorded(images):
    call = Caller()
    for signature in ("one", "other"):
        for _ in range(3):
            call(images, signature)
    assert call.ways == ["recorded", "recorded", "replayed"] * 2


@pytest.mark.parametrize(
    ("recorded", "replayed", "winner"),
    [(2, 1, "replayed"), (1, 1.1, "recorded"), (1, 3, "recorded"), (1, 0.97, "recorded"), (1, 0.9, "replayed")],
    ids=["faster", "slower", "far-slower", "within-noise", "a-little-faster"],
)
def test_the_faster_serves_and_within_noise_the_recorded_call(images, recorded, replayed, winner):
    call = Caller(recorded, replayed)
    assert call.settled(images) == winner
    assert winners(call.trial) == [winner]
    assert (call.trial.nbytes > 0) is (winner == "replayed")  # who lost takes no memory


def test_a_verdict_is_looked_at_again(images, monkeypatch):
    monkeypatch.setitem(ReplayTrial.__call__.__globals__, "_RETRY_AFTER", {"replayed": 20, "recorded": 20})
    call = Caller(2, 1)
    assert call.settled(images) == "replayed"
    call.clock.seconds = {"recorded": 1, "replayed": 2}
    assert call.settled(images, 30) == "recorded"
    call.clock.seconds = {"recorded": 2, "replayed": 1}
    assert call.settled(images, 70) == "replayed"


def test_a_replay_that_raises_is_recorded_for_good(images):
    call = Caller()
    call.raises = True
    call.settled(images)
    assert call.ways == ["recorded", "recorded", "replayed", *["recorded"] * (SETTLED - 2)]


def test_a_replay_that_disagrees_is_recorded_for_good(images):
    call, compared = Caller(), []
    call.agree = lambda came, expected: compared.append((came, expected)) or len(compared) > 1
    assert call.settled(images) == "recorded"
    ((came, expected),) = compared
    close(came, expected)
    assert "replayed" not in call.ways[-4:]


def test_random_numbers_of_a_call_that_is_made_twice_are_drawn_as_if_it_were_made_once(images):
    call = Caller()
    call.draws, call.agree = True, lambda came, expected: torch.equal(came, expected)
    torch.manual_seed(1)
    result = [call(images) for _ in range(SETTLED)]
    assert call.ways[-1] == "replayed"
    torch.manual_seed(1)
    assert torch.equal(torch.stack(result), torch.stack([torch.rand(3) for _ in range(SETTLED)]))


@pytest.mark.parametrize("change", ["weight", "attribute", "module"])
def test_no_answer_is_of_the_model_as_it_was(images, change):
    call = Caller()
    assert call.settled(images) == "replayed"
    before = call(images)
    with torch.no_grad():
        if change == "weight":
            call.model.conv.weight.data.mul_(2)
        elif change == "attribute":
            call.model.scale = 3.0
        else:
            call.model.fc = nn.Linear(8, 5)
    result = call(images)
    close(result, call.model(images))
    assert not torch.allclose(result, before)
    assert call.settled(images, 5) == "recorded"  # it waits for twice as many calls
    assert call.settled(images) == "replayed"


def test_hooks_run_and_calls_with_them_are_recorded(images):
    call, recorded = Caller(), []
    assert call.settled(images) == "replayed"
    handle = call.model.norm.register_forward_hook(lambda *_: recorded.append(1))
    for _ in range(3):
        call(images)
    assert recorded == [1, 1, 1]
    assert call.ways[-3:] == ["recorded"] * 3
    handle.remove()
    everywhere = nn.modules.module.register_module_forward_pre_hook(lambda *_: recorded.append(2))
    try:
        call(images)
    finally:
        everywhere.remove()
    assert 2 in recorded


def test_hooks_of_modules_that_are_not_registered_run(images):
    class Aside(Small):
        def __init__(self):
            super().__init__()
            self.aside = [nn.ReLU()]

        def forward(self, x):
            return super().forward(self.aside[0](x))

    call, recorded = Caller(model=Aside().eval()), []
    assert call.settled(images) == "replayed"
    call.model.aside[0].register_forward_hook(lambda *_: recorded.append(1))
    for _ in range(3):
        call(images)
    assert recorded == [1, 1, 1]


def test_lazy_modules_get_their_own_error():
    explain = Saliency(nn.Sequential(nn.LazyConv2d(4, 3)).eval(), accelerate="auto")
    with pytest.raises(InputError, match="model must have run before it is explained"):
        explain(torch.rand(1, 3, 8, 8))


def test_a_model_that_draws_random_numbers_is_recorded(images):
    class Draws(Small):
        def forward(self, x):
            return super().forward(x) + torch.rand(1)

    call = Caller(model=Draws().eval())
    for _ in range(SETTLED):
        call(images)
    assert call.trial.nbytes == 0
    assert call.ways[-1] == "recorded"


def test_signatures_that_cannot_be_told_apart_are_recorded(images):
    call = Caller()
    for _ in range(SETTLED):
        call(images, None)
    assert set(call.ways) == {"recorded"}


def test_trials_of_a_process_share_the_memory(images):
    first = Caller()
    assert first.settled(images) == "replayed"
    used = first.trial.nbytes
    second = Caller(memory_limit=int(1.5 * used))
    assert second.settled(images) == "replayed"
    assert second.trial.nbytes > 0
    assert first.trial.nbytes == 0
    assert first.settled(images, 2) == "recorded"
    del second
    gc.collect()


def test_verdicts_are_kept_for_other_processes(images, monkeypatch, tmp_path):
    monkeypatch.setenv("PYFAST_XAI_TUNING", "on")
    saved = Verdicts(tmp_path, {})
    monkeypatch.setattr(tuning, "store_verdict", saved.put)
    monkeypatch.setattr(tuning, "known_verdict", Verdicts(tmp_path, {}).get)
    call = Caller(1, 3, job="a job")
    call.settled(images)
    (site,) = saved.all()
    assert (site.op, site.threads) == ("a job", torch.get_num_threads())
    assert saved.get(site).fastest() == "recorded"
    other = Caller(3, 1, job="a job")
    other.settled(images)
    assert set(other.ways) == {"recorded"}
    saved.put(site, Verdict({"recorded": [2.0], "replayed": [1.0]}))
    assert Caller(3, 1, job="a job").settled(images) == "recorded"  # what is in memory is not read again


def test_threads_get_what_the_model_gives(images):
    call = Caller()
    batches = [images * (i + 1) for i in range(48)]
    with ThreadPoolExecutor(4) as pool:
        result = list(pool.map(call, batches))
    for item, batch in zip(result, batches, strict=True):
        close(item, call.model(batch))


def test_times_of_calls_that_ran_side_by_side_do_not_count(images):
    outside, inside = Caller(), Caller()
    for _ in range(60):
        outside.trial(lambda: inside(images), signature="images")
    for call in (outside, inside):
        assert winners(call.trial) == ["recorded"]


# Explainers


@pytest.fixture
def clock(monkeypatch):
    """Every explainer finds its replays twice as fast."""

    class Timed(ReplayTrial):
        def __init__(self, *args, **settings):
            self.recent = Clock(2.0, 1.0)
            super().__init__(*args, **{**settings, "stopwatch": self.took, "share": ANYTHING})

        def took(self, device, threads):
            def seconds():
                return self.recent.seconds["replayed" if self.was_replayed else "recorded"]

            return seconds

        def _replay(self, actual, run):
            result = super()._replay(actual, run)
            self.was_replayed = True
            return result

        def _timed(self, run, device, **waits):
            self.was_replayed = False
            return super()._timed(run, device, **waits)

    monkeypatch.setattr(explainers, "ReplayTrial", Timed)


@pytest.mark.parametrize("kind", [Saliency, GradCAM, CNNFixations], ids=lambda kind: kind.method)
@pytest.mark.usefixtures("clock")
def test_explanations_are_the_recorded_ones(images, kind):
    model = Small().eval()
    plain, tried = kind(model), kind(model, accelerate="auto")
    for call in range(SETTLED):
        options = images * (1 + call / 8)
        result, expected = tried(options, [1, 3]), plain(options, [1, 3])
        torch.testing.assert_close(result.heatmap, expected.heatmap, rtol=1e-4, atol=1e-5)
    assert winners(tried._trial) == ["replayed"]
    assert not tried.accelerated  # outside a call


@pytest.mark.usefixtures("clock")
def test_batches_of_one_call_are_calls(images):
    explain = Saliency(Small().eval(), accelerate="auto", batch_size=2)
    explain(images.repeat(SETTLED, 1, 1, 1))
    assert winners(explain._trial) == ["replayed"]


@pytest.mark.usefixtures("clock")
def test_noise_is_the_same_noise(images):
    model = Small().eval()
    settings = {"n_samples": 2, "seed": 3} if "seed" in SmoothGrad.__signature__.parameters else {"n_samples": 2}
    plain, tried = SmoothGrad(model, **settings), SmoothGrad(model, accelerate="auto", **settings)
    for item in (plain, tried):
        torch.manual_seed(0)
        item.found = [item(images, 1).heatmap for _ in range(SETTLED)]
    torch.testing.assert_close(torch.stack(tried.found), torch.stack(plain.found), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
@pytest.mark.usefixtures("clock")
def test_a_copy_tries_by_itself(images, copied, monkeypatch):
    explain = Saliency(Small().eval(), accelerate="auto")
    explain._trial = ReplayTrial(explain.model, share=ANYTHING)
    for _ in range(4):
        explain(images, 1)
    other = copied(explain)
    assert other._trial.model is other.model is not explain.model
    assert not other._trial._signatures
    assert torch.equal(other(images, 1).heatmap, Saliency(other.model)(images, 1).heatmap)


def test_another_model_is_another_trial(images):
    explain = Saliency(Small().eval(), accelerate="auto")
    for _ in range(5):
        explain(images, 1)
    explain.model = Small().eval()
    assert torch.equal(explain(images, 1).heatmap, Saliency(explain.model)(images, 1).heatmap)


def test_accelerate_pins_the_replay(images):
    explain = Saliency(Small().eval(), accelerate="auto").accelerate()
    explain(images)
    assert explain.accelerated
    assert isinstance(explain.accelerated_model, ReplayedModel)


def test_a_wrong_setting_is_refused():
    with pytest.raises(InputError, match="accelerate must be one of True, False, 'auto', got 'always'"):
        Saliency(Small(), accelerate="always")


def test_a_wrong_target_is_an_error_whether_replayed_or_not(images):
    explain = Saliency(Small().eval(), accelerate="auto")
    for _ in range(5):
        explain(images, 1)
        with pytest.raises(InputError, match="target"):
            explain(images, 99)
