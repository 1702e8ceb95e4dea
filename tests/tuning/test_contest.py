import threading
import time

import kernels_to_isolate
import pytest
import torch

from pyfast_xai import tuning
from pyfast_xai.errors import InputError
from pyfast_xai.tuning import Candidate, Contest, Site, Verdicts

VALUES = torch.arange(1.0, 9)


class Clock:
    """Seconds that pass only while a made-up kernel runs."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class Kernel:
    """A made-up kernel that takes the given seconds, one number a run, the last one for all later runs."""

    def __init__(self, clock, *seconds, result=lambda values: values * 2):
        self.clock, self.seconds, self.result, self.runs = clock, list(seconds), result, 0

    def __call__(self, values):
        self.clock.now += self.seconds[min(self.runs, len(self.seconds) - 1)]
        self.runs += 1
        return self.result(values)


@pytest.fixture(autouse=True)
def _on(monkeypatch):
    monkeypatch.setenv("PYFAST_XAI_TUNING", "on")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def contest(clock):
    return Contest(Verdicts(None, {}), clock)


def candidates(**kernels):
    return [Candidate(name, kernel) for name, kernel in kernels.items()]


def winner(contest, field, site="site", values=VALUES, **options):
    return contest.choose(Site(site, "", "cpu", 1), field, (values,), **{"tolerance": 1e-5, **options}).name


def test_the_fastest_serves(contest, clock):
    field = candidates(plain=Kernel(clock, 0.03), fast=Kernel(clock, 0.01), other=Kernel(clock, 0.02))
    assert winner(contest, field) == "fast"


def test_within_noise_the_simplest_serves(contest, clock):
    assert winner(contest, candidates(plain=Kernel(clock, 0.0102), other=Kernel(clock, 0.01))) == "plain"


def test_one_lucky_round_does_not_win(contest, clock):
    lucky = Kernel(clock, 0.012, 0.012, 0.005, 0.012)
    assert winner(contest, candidates(plain=Kernel(clock, 0.01), lucky=lucky)) == "plain"


def test_one_unlucky_round_does_not_lose(contest, clock):
    unlucky = Kernel(clock, 0.008, 0.019, 0.008)
    assert winner(contest, candidates(plain=Kernel(clock, 0.0085, 0.01), unlucky=unlucky)) == "unlucky"


def test_the_first_run_is_not_timed(contest, clock):
    compiles = Kernel(clock, 5.0, 0.005)
    assert winner(contest, candidates(plain=Kernel(clock, 0.01), compiles=compiles)) == "compiles"


@pytest.mark.parametrize(
    "result",
    [
        lambda values: values * 2.001,
        lambda values: (values * 2)[1:],
        lambda values: (values * 2).double(),
        lambda values: torch.where(values == 3, torch.nan, values * 2),
    ],
    ids=["numbers", "shape", "dtype", "nan"],
)
def test_a_wrong_kernel_never_serves(contest, clock, result):
    wrong = Kernel(clock, 0.001, result=result)
    field = candidates(plain=Kernel(clock, 0.03), wrong=wrong, fast=Kernel(clock, 0.01))
    assert winner(contest, field) == "fast"
    assert winner(contest, field) == "fast"


def test_agreement_is_within_the_tolerance(contest, clock):
    near = Kernel(clock, 0.001, result=lambda values: values * 2 + 1e-3)
    field = candidates(plain=Kernel(clock, 0.01), near=near)
    assert winner(contest, field, "strict", tolerance=1e-5) == "plain"
    assert winner(contest, field, "lenient", tolerance=1e-3) == "near"


def test_what_is_not_finite_may_be_the_right_result(contest, clock):
    values = torch.tensor([1.0, torch.inf, torch.nan])
    field = candidates(plain=Kernel(clock, 0.03), fast=Kernel(clock, 0.01))
    assert winner(contest, field, values=values) == "fast"


def test_whole_numbers_must_be_equal(contest, clock):
    wrong = Kernel(clock, 0.001, result=lambda values: values * 2 + (values == 3))
    field = candidates(plain=Kernel(clock, 0.01), wrong=wrong)
    assert winner(contest, field, values=torch.arange(9)) == "plain"


def test_every_result_of_several_must_agree(contest, clock):
    plain = Kernel(clock, 0.01, result=lambda values: (values, values * 2))
    wrong = Kernel(clock, 0.001, result=lambda values: (values, values * 3))
    fast = Kernel(clock, 0.002, result=lambda values: [values, values * 2])
    assert winner(contest, candidates(plain=plain, wrong=wrong, fast=fast)) == "fast"


def test_a_kernel_that_raises_never_serves(contest, clock):
    def broken(values):
        raise RuntimeError("illegal instruction")

    field = [Candidate("plain", Kernel(clock, 0.03)), Candidate("broken", broken)]
    assert winner(contest, field) == "plain"
    assert "illegal instruction" in contest.verdicts.get(Site("site", "", "cpu", 1)).failed["broken"]


def test_an_error_of_the_reference_is_the_callers(contest, clock):
    def broken(values):
        raise ValueError("wrong shape")

    with pytest.raises(ValueError, match="wrong shape"):
        winner(contest, [Candidate("broken", broken), Candidate("other", Kernel(clock, 0.01))])


def test_a_verdict_is_found_out_once(contest, clock):
    plain, fast = Kernel(clock, 0.03), Kernel(clock, 0.01)
    winner(contest, candidates(plain=plain, fast=fast))
    runs = plain.runs, fast.runs
    assert winner(contest, candidates(plain=plain, fast=fast)) == "fast"
    # One run of each, since agreement depends on the data.
    assert (plain.runs, fast.runs) == (runs[0] + 1, runs[1] + 1)


def test_agreement_that_does_not_depend_on_data_is_looked_at_once(contest, clock):
    plain, fast, wrong = Kernel(clock, 0.03), Kernel(clock, 0.01), Kernel(clock, 0.001, result=lambda values: values)
    field = [
        Candidate("plain", plain),
        Candidate("fast", fast, depends_on_data=False),
        Candidate("wrong", wrong, depends_on_data=False),
    ]
    assert winner(contest, field) == "fast"
    runs = plain.runs, fast.runs, wrong.runs
    assert winner(contest, field) == "fast"
    assert (plain.runs, fast.runs, wrong.runs) == runs


def test_where_the_reference_won_nothing_runs_again(contest, clock):
    plain, slow = Kernel(clock, 0.01), Kernel(clock, 0.03)
    winner(contest, candidates(plain=plain, slow=slow))
    runs = plain.runs, slow.runs
    assert winner(contest, candidates(plain=plain, slow=slow)) == "plain"
    assert (plain.runs, slow.runs) == runs


def test_on_other_data_the_next_best_serves(contest, clock):
    def overflows(values):
        return values * 2 if values.max() < 100 else values * 3

    fastest = Kernel(clock, 0.01, result=overflows)
    field = candidates(plain=Kernel(clock, 0.012), second=Kernel(clock, 0.011), fastest=fastest)
    assert winner(contest, field) == "fastest"
    assert winner(contest, field, values=VALUES * 1000) == "second"
    assert winner(contest, field) == "fastest"


def test_a_new_candidate_gets_its_contest(contest, clock):
    plain, fast = Kernel(clock, 0.03), Kernel(clock, 0.01)
    assert winner(contest, candidates(plain=plain)) == "plain"
    assert winner(contest, candidates(plain=plain, fast=fast)) == "fast"
    assert winner(contest, candidates(plain=plain, fast=fast, faster=Kernel(clock, 0.001))) == "faster"


def test_the_cost_is_bounded(contest, clock):
    short, shorter = Kernel(clock, 1e-4), Kernel(clock, 0.9e-4)
    winner(contest, candidates(short=short, shorter=shorter), "short")
    assert max(short.runs, shorter.runs) <= 4
    # Long jobs are timed once, and so is who is far behind.
    long, longer = Kernel(clock, 2.0), Kernel(clock, 2.1)
    winner(contest, candidates(long=long, longer=longer), "long")
    assert max(long.runs, longer.runs) <= 2
    fast, slow = Kernel(clock, 0.01), Kernel(clock, 0.05)
    winner(contest, candidates(fast=fast, slow=slow), "slow")
    assert slow.runs == 2


def test_runs_of_a_round_are_interleaved(contest, clock):
    order = []
    field = candidates(
        one=Kernel(clock, 0.01, result=lambda values: order.append("one") or values),
        two=Kernel(clock, 0.01, result=lambda values: order.append("two") or values),
    )
    winner(contest, field)
    assert order[2:] == ["one", "two"] * (len(order) // 2 - 1)


def test_off_takes_the_order_in_the_source(contest, clock, monkeypatch):
    monkeypatch.setenv("PYFAST_XAI_TUNING", "off")
    plain, fast = Kernel(clock, 0.03), Kernel(clock, 0.01)
    assert winner(contest, candidates(plain=plain, fast=fast)) == "plain"
    assert winner(contest, candidates(plain=plain, fast=fast), untuned="fast") == "fast"
    assert winner(contest, candidates(plain=plain), untuned="fast") == "plain"
    assert plain.runs == fast.runs == 0


def test_another_setting_is_an_error(contest, clock, monkeypatch):
    monkeypatch.setenv("PYFAST_XAI_TUNING", "yes")
    with pytest.raises(InputError, match="PYFAST_XAI_TUNING must be on or off, got 'yes'"):
        winner(contest, candidates(plain=Kernel(clock, 0.03)))


def test_threads_share_a_contest(contest, clock):
    plain, fast = Kernel(clock, 0.03), Kernel(clock, 0.01)
    field, start, winners = candidates(plain=plain, fast=fast), threading.Barrier(8), []

    def choose():
        start.wait()
        winners.append(winner(contest, field))

    threads = [threading.Thread(target=choose) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert winners == ["fast"] * 8
    assert plain.runs <= 4 + 7


def test_sites_differ_by_all_that_matters():
    image, other = torch.zeros(1, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    sites = [
        Site.of("conv2d", image, 1),
        Site.of("conv2d", image, 2),
        Site.of("relu", image, 1),
        Site.of("conv2d", other, 1),
        Site.of("conv2d", image.double(), 1),
        Site.of("conv2d", other.contiguous(memory_format=torch.channels_last), 1),
    ]
    assert len(set(sites)) == len(sites)
    assert sites[0] == Site.of("conv2d", torch.ones(1, 3, 8, 8), 1)
    assert sites[0].threads == torch.get_num_threads()


@pytest.mark.parametrize(
    ("kernel", "reason"),
    [
        ("raises", "RuntimeError: no such instruction"),
        ("crashes", "it was ended by SIGSEGV"),
        ("hangs", "it did not end within"),
    ],
)
def test_a_kernel_that_takes_its_process_down_is_never_run_here(kernel, reason):
    contest = Contest(Verdicts(None, {}), time_limit=15 if kernel == "hangs" else 120)
    field = [
        Candidate("plain", kernels_to_isolate.doubled),
        Candidate(kernel, getattr(kernels_to_isolate, kernel), isolate=True),
    ]
    assert winner(contest, field) == "plain"
    assert reason in contest.verdicts.get(Site("site", "", "cpu", 1)).failed[kernel]
    assert winner(contest, field) == "plain"


def test_a_kernel_that_runs_in_its_own_process_may_win(clock):
    assert tuning.prove(kernels_to_isolate.doubled, (VALUES,), 120) is None


def test_only_what_another_process_finds_can_be_isolated():
    for kernel in (lambda values: values, Kernel(Clock(), 1.0), VALUES.mul):
        assert "not at the top level of a module" in tuning.prove(kernel, (VALUES,), 120)


def test_a_first_run_that_prepares_nothing_is_timed(contest, clock):
    plain, slow, fast = Kernel(clock, 0.01), Kernel(clock, 0.05), Kernel(clock, 0.009, 0.005)
    field = [
        Candidate("plain", plain, prepares=False),
        Candidate("slow", slow, prepares=False),
        Candidate("fast", fast),
    ]
    assert winner(contest, field) == "fast"
    assert slow.runs == 1


def test_a_caller_bounds_the_rounds(contest, clock):
    one, other = Kernel(clock, 0.01), Kernel(clock, 0.0095)
    winner(contest, candidates(one=one, other=other), seconds=0.001)
    assert (one.runs, other.runs) == (2, 2)


def test_time_on_a_processor_is_that_of_this_process():
    past = tuning.stopwatch("cpu", 1)
    time.sleep(0.2)
    asleep = past()
    end = time.thread_time() + 0.05
    while time.thread_time() < end:
        pass
    assert asleep < 0.1
    assert past() >= 0.05
