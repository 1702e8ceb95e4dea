"""What preparing replays costs: nothing in a short run, never more than a share of a recorded one, and it ends."""

import random

import pytest
import torch

from pyfast_xai import METHODS, SESS, Consensus, Saliency, tuning
from pyfast_xai.explainers.common.explainer import Explainer
from pyfast_xai.explainers.common.preparation_budget import SHARE, PreparationBudget
from pyfast_xai.explainers.common.replay_trial import ReplayTrial
from pyfast_xai.serve import Explained
from pyfast_xai.tuning import Verdict, Verdicts


class Replays:
    """Stands for the replays of a model: so many calls prepare something, which takes so many seconds more."""

    disabled = outdated = has_forward_hooks = False
    nbytes = 0

    def __init__(self, steps):
        self.steps = list(steps)
        self.preparations = self.replays = 0

    def forget(self):
        pass


class Process:
    """Calls of one signature by a made-up clock: a recorded call takes 1 second, a replay of it `replayed`."""

    def __init__(self, steps, replayed=0.5, **settings):
        self.trial = ReplayTrial(torch.nn.Identity(), stopwatch=self.stopwatch, **settings)
        self.trial._replayed = self.replays = Replays(steps)
        self.replayed, self.now, self.seconds, self.ways = replayed, 0.0, [], []

    def stopwatch(self, device, threads):
        start = self.now
        return lambda: self.now - start

    def run(self):
        if self.trial.current is None:
            self.now += 1.0
            return "recorded"
        self.replays.replays += 1
        self.now += self.replayed
        if self.replays.steps:
            self.replays.preparations += 1
            self.now += self.replays.steps.pop(0)
        return "replayed"

    def __call__(self, calls, agree=None):
        for _ in range(calls):
            start = self.now
            self.ways.append(self.trial(self.run, signature="images", agree=agree))
            self.seconds.append(self.now - start)
        return self.ways


def test_a_script_of_five_calls_is_recorded():
    assert Process([0.1])(6) == ["recorded"] * 6


@pytest.mark.parametrize("steps", [[1.5] * 8, [2.0, 1.5, 1.0, 0.5], [0.7] * 3], ids=str)
def test_a_long_run_becomes_fast_and_costs_at_most_a_quarter_more_on_the_way(steps):
    process = Process(steps)
    assert process(400)[-100:] == ["replayed"] * 100
    for calls in range(1, 401):
        assert sum(process.seconds[:calls]) <= (1 + SHARE) * calls + 1e-9
    assert sum(process.seconds) < 300
    assert max(process.seconds) <= 2.5


def test_the_comparison_of_both_ways_is_paid_from_the_budget():
    process = Process([1.0, 1.0])
    process(200, agree=lambda replay, recording: (replay, recording) == ("replayed", "recorded"))
    assert process.ways[-1] == "replayed"
    for calls in range(1, 201):
        assert sum(process.seconds[:calls]) <= (1 + SHARE) * calls + 1e-9


@pytest.mark.parametrize("seed", range(8))
def test_whatever_a_step_costs_the_run_exceeds_the_share_by_one_step_at_most(seed):
    drawn = random.Random(seed)
    steps = [drawn.uniform(0, 6) for _ in range(12)]
    process = Process(steps)
    process(600)
    for calls in range(1, 601):
        assert sum(process.seconds[:calls]) <= (1 + SHARE) * calls + max(steps)


def test_a_replay_that_is_never_ready_costs_the_share_at_most():
    process = Process([1.2] * 10_000, replayed=1.0)
    process(1000)
    assert sum(process.seconds) <= (1 + SHARE) * 1000 + 1e-9


def test_with_a_verdict_on_disk_the_third_call_prepares(monkeypatch, tmp_path):
    monkeypatch.setenv("PYFAST_XAI_TUNING", "on")
    saved = Verdicts(tmp_path, {})
    monkeypatch.setattr(tuning, "store_verdict", saved.put)
    monkeypatch.setattr(tuning, "known_verdict", Verdicts(tmp_path, {}).get)
    assert Process([0.2], job="a job")(60)[:3] == ["recorded"] * 3
    (verdict,) = saved.all().values()
    assert verdict.fastest() == "replayed"
    assert Process([0.2], job="a job")(3) == ["recorded", "recorded", "replayed"]


def test_a_verdict_that_says_recorded_prepares_nothing(monkeypatch):
    monkeypatch.setenv("PYFAST_XAI_TUNING", "on")
    monkeypatch.setattr(tuning, "known_verdict", lambda site: Verdict({"recorded": [1.0], "replayed": [2.0]}))
    assert set(Process([0.2], job="a job")(300)) == {"recorded"}


def test_one_call_of_several_at_a_time_prepares():
    process, inside = Process([0.5] * 3, share=1e9), []

    def outer():
        way = process.run()
        if way == "replayed" and not inside:
            replayed = process.trial._thread.replayed
            process.trial._thread.replayed = None  # as in another thread
            inside.append(process.trial(process.run, signature="images"))
            process.trial._thread.replayed = replayed
        return way

    for _ in range(4):
        process.trial(outer, signature="images")
    assert inside == ["recorded"]


def test_a_call_that_raises_leaves_room_for_the_next_to_prepare():
    process = Process([0.5], share=1e9)
    process(2)

    def raises():
        raise ValueError("of the user's model")

    with pytest.raises(ValueError, match="of the user's model"):
        process.trial(raises, signature="images")
    assert process.trial._signatures[("images", torch.get_num_threads())].preparing is None


@pytest.fixture
def _deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
def test_deterministic_algorithms_are_recorded():
    process = Process([0.1], share=1e9)
    assert set(process(50)) == {"recorded"}
    assert not process.trial._signatures


def test_the_budget_counts_a_recorded_call_by_the_fastest():
    budget = PreparationBudget(share=0.5, first_step=1.0)
    for seconds in (100.0, 2.0):
        budget.count_recorded(seconds)
    assert budget.earned == 2.0
    assert budget.allows()
    budget.count_preparing(5.0)
    assert budget.spent == 3.0
    assert not budget.allows()
    for _ in range(3):
        budget.count_served()
    assert budget.earned == 6.0
    assert budget.allows()


def test_explainers_try_replays_unless_told_otherwise():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
    assert Explainer.__signature__.parameters["accelerate"].default == "auto"
    assert all(kind.__signature__.parameters["accelerate"].default == "auto" for kind in METHODS.values())
    assert Saliency(model)._trial is not None
    assert Saliency(model, accelerate=False)._trial is None
    assert Saliency(model, accelerate=True).accelerated
    assert Explained(model, "saliency").explainer._trial is not None


def test_an_explainer_that_calls_another_leaves_the_trial_to_it():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
    tried, pinned = SESS(model), SESS(model, accelerate=False)
    assert tried._trial is None
    assert tried.base._trial is not None
    assert pinned.base._trial is None
    assert not pinned.base.accelerated
    assert SESS(model, accelerate=True).base.accelerated


def test_an_explainer_that_records_for_its_parts_tries_by_itself():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten())
    tried = Consensus(model)
    assert tried._trial is not None
    assert tried.fixations._trial is None
    assert Consensus(model, accelerate=False)._trial is None
    assert Consensus(model, accelerate=True).accelerated
