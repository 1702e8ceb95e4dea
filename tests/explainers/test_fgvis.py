import numpy as np
import pytest
import torch
from case_ids import case_id
from oracles import fgvis as slow_fgvis
from torch import nn
from torch.nn import functional as F

from pyfast_xai.errors import InputError
from pyfast_xai.explainers.fgvis import GAMES, FGVis
from pyfast_xai.rules.gradient.bounds import Bounding, Clipped, bounds_of
from pyfast_xai.tape import record

DOUBLE = torch.float64
SCORE = 0.5


class Net(nn.Module):
    """Every kind of nonlinearity, a module called twice, in place and functional ones, and a skip."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (nn.Conv2d(i, o, 3, padding=1) for i, o in ((3, 6), (6, 6), (6, 8)))
        self.relu, self.fc = nn.ReLU(inplace=True), nn.Linear(8, 5)

    def forward(self, x):
        def act(function, y):
            return function(y)

        return self.written(x, act, self.relu)

    def written(self, x, act, relu=torch.relu):
        x = act(relu, self.conv1(x))
        x = F.max_pool2d(x + act(F.silu, self.conv2(x)), 2)
        x = act(relu, self.conv3(x))
        x = act(torch.tanh, x)
        x = act(F.relu6, 4 * x)
        return self.fc(act(lambda y: F.leaky_relu(y, 0.1), x.mean((2, 3))))


@pytest.fixture
def net():
    net = Net().to(DOUBLE).eval()
    with torch.no_grad():
        net.fc.weight.mul_(20)
        for conv in (net.conv1, net.conv2, net.conv3):
            conv.bias.fill_(0.02)  # alive on a grey image, and hardly excited
    return net


@pytest.fixture
def images():
    return torch.randn(3, 3, 8, 8, dtype=DOUBLE)


def slow(net, images, target, reference, **settings):
    return [
        slow_fgvis.play(
            lambda x, act: net.written(x, act), images[n : n + 1], reference[n : n + 1], target[n], **settings
        )
        for n in range(len(images))
    ]


@pytest.mark.parametrize("similarity", ["cross-entropy", "softmax"])
@pytest.mark.parametrize("defence", ["gradient", "forward", "none"])
@pytest.mark.parametrize("game", GAMES)
def test_masks_are_those_of_the_paper(net, images, game, defence, similarity):
    recorded = []
    explainer = FGVis(
        net, game=game, defence=defence, similarity=similarity, n_iterations=6, sparsity=0.05, lr=0.2, patience=99,
        stop_at="class", progress=False,
    )  # fmt: skip
    evaluate = explainer._evaluate

    def watched(policy, match, *rest):
        result = evaluate(policy, match, *rest)
        recorded.append((match.mask.clone(), result[1]))
        return result

    explainer._evaluate = watched
    target = [1, 4, 0]
    explainer(images, target)
    expected = slow(
        net, images, target, torch.zeros_like(images), game=game, defence=defence, similarity=similarity,
        sparsity=[0.05] * 6, rate=0.2, iterations=6,
    )  # fmt: skip
    for i, (masks, scores) in enumerate(recorded):
        for n in range(3):
            torch.testing.assert_close(masks[n], expected[n][0][i][0], rtol=0, atol=1e-9)
            assert scores[n].item() == pytest.approx(expected[n][1][i], abs=1e-6)
    assert not torch.equal(recorded[0][0], recorded[-1][0])


def test_bounds_are_held_at_every_call(net, images):
    """Without the forward changed, a gradient stops where an activation goes further than on the image."""
    bounds = bounds_of(record(net, images, policy=Bounding()))
    assert len(bounds) == 6  # the module that runs twice has two
    tape = record(net, images * 1.5, policy=(policy := Clipped(bounds)))
    assert torch.equal(tape.result, net(images * 1.5))
    stopped = 0
    for node in tape:
        if node.name in bounds:
            stopped += "within" in node.saved or "bits" in node.saved
    assert stopped == 6
    assert policy.rule_of(tape.nodes[1]) is not None


def test_the_answer_itself_has_no_bound(images):
    model = nn.Sequential(nn.Conv2d(3, 5, 8, dtype=DOUBLE), nn.ReLU(), nn.Flatten(), nn.ReLU()).eval()
    bounds = bounds_of(record(model, images, policy=Bounding()))
    assert list(bounds) == ["1.relu"]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=case_id)
def test_at_the_image_every_gradient_passes(net, memory_format):
    """At m = 1 each activation lies on its bound, and a tie passes: defended and not, the first step is the same."""
    images = torch.randn(6, 3, 8, 8, dtype=DOUBLE).contiguous(memory_format=memory_format)
    masks = []
    for defence in ("gradient", "none"):
        explainer = FGVis(
            net, defence=defence, n_iterations=2, sparsity=0.0, stop_at="class", progress=False, patience=9
        )
        recorded = []
        explainer._evaluate = watch(explainer._evaluate, recorded)
        explainer(images)
        masks.append(recorded[1])
    assert torch.equal(*masks)
    assert (masks[0] < 1).any()


def watch(evaluate, recorded):
    def watched(policy, match, *rest):
        result = evaluate(policy, match, *rest)
        recorded.append(match.mask.clone())
        return result

    return watched


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_holds_in_a_batch_whose_images_leave(net, images, dtype):
    net, images = net.to(dtype), images.to(dtype)
    together = FGVis(net, n_iterations=60, score_ratio=SCORE, patience=4, progress=False)(images)
    assert together.iterations.unique().numel() > 1
    for n in range(3):
        alone = FGVis(net, n_iterations=60, score_ratio=SCORE, patience=4, progress=False)(images[n : n + 1])
        # In float32 another batch rounds otherwise.
        torch.testing.assert_close(
            alone.mask[0], together.mask[n], rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-9
        )
        assert alone.iterations.item() == together.iterations[n].item()


@pytest.mark.parametrize("game", GAMES)
def test_a_game_that_is_won_has_the_score_that_was_asked_for(net, images, game):
    result = FGVis(net, game=game, n_iterations=150, score_ratio=SCORE, progress=False)(images)
    repeated = net(result.perturbed).softmax(1).gather(1, result.target[:, None])[:, 0]
    torch.testing.assert_close(result.after, repeated.float(), rtol=0, atol=1e-5)
    saved = GAMES[game].keeps
    expected = repeated >= SCORE * result.score if saved else repeated <= (1 - SCORE) * result.score
    assert result.reached.any()
    assert torch.equal(result.reached, expected)
    assert ((result.mask >= 0) & (result.mask <= 1)).all()
    size = result.evidence.mean((1, 2, 3))
    assert (size[result.reached] < 0.9).all()


def test_games_that_are_over_change_no_more(net, images):
    """Whatever else is played: nothing that is handed back, and not the mask."""
    game = FGVis(net, n_iterations=60, score_ratio=SCORE, patience=2, progress=False)
    iterate, recorded = game._iterate, []

    def watched(match, *rest):
        over, before = match.done.clone(), [tensor.clone() for tensor in match]
        output = iterate(match, *rest)
        for name, old, new in zip(match._fields, before, match, strict=True):
            assert torch.equal(new[over], old[over]), name
        assert output.tolist() == [int((~match.done).sum()), pytest.approx(float(match.after.mean()))]
        recorded.append(int(over.sum()))
        return output

    game._iterate = watched
    result = game(torch.cat([images, 2 * images]))
    assert max(recorded) > 0
    assert result.reached.all()


def test_how_outputs_are_read_is_decided_on_the_images(images):
    """Outputs that are a distribution by accident on some perturbed image are still taken for logits."""

    class Model(nn.Module):
        def forward(self, x):
            return 8 * x[:, :, 0, 0] + torch.tensor([0.3, 0.3, 0.4], dtype=x.dtype)  # a distribution where x is zero

    result = FGVis(Model().eval(), game="generation", n_iterations=1, progress=False)(images.abs() + 1, 0)
    expected = torch.tensor([0.3, 0.3, 0.4]).softmax(0)[0]
    torch.testing.assert_close(result.after, expected.expand(3))


def test_a_game_that_is_lost_is_said_once(net, images, caplog):
    lost = FGVis(net, n_iterations=1, progress=False)
    with caplog.at_level("WARNING", "pyfast_xai"):
        assert not lost(images).reached.any()
        lost(images)
    (output,) = caplog.messages
    assert output.startswith(f"fgvis: {len(images)} of {len(images)} games were not won in 1 iterations")
    caplog.clear()
    with caplog.at_level("WARNING", "pyfast_xai"):
        assert FGVis(net, n_iterations=150, score_ratio=0.01, progress=False)(images).reached.all()
    assert not caplog.messages


def test_what_comes_out(net, images):
    result = FGVis(net, n_iterations=5, baseline="blur", progress=False)(images, [[0, 1], [2, 3], [4, 0]])
    assert result.target.tolist() == [0, 1, 2, 3, 4, 0]
    assert result.mask.shape == (6, 3, 8, 8)
    assert result.heatmap.shape == (6, 8, 8)
    torch.testing.assert_close(result.heatmap, (1 - result.mask).mean(1).float())
    torch.testing.assert_close(
        result.perturbed + result.complement, result.images + result.images * 0 + blurred(images)
    )
    assert result.rgb().shape == (6, 3, 8, 8)
    assert result[2:4].mask.shape == (2, 3, 8, 8)
    assert result[1].reached.shape == (1,)
    assert len(result.rows()) == 6


def blurred(images):
    from pyfast_xai.explainers.common.baselines import blurred

    return blurred(images, 10.0).repeat_interleave(2, 0)


def test_blur_is_a_gaussian():
    from scipy.ndimage import gaussian_filter

    from pyfast_xai.explainers.common.baselines import blurred

    image = torch.randn(1, 2, 40, 50, dtype=DOUBLE)
    expected = [gaussian_filter(channel.numpy(), 2, mode="mirror", truncate=3) for channel in image[0]]
    torch.testing.assert_close(blurred(image, 2.0)[0], torch.from_numpy(np.stack(expected)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("reference", ["zero", "blur", "noise", torch.full((3, 1, 1), 0.3)])
def test_reference(net, images, reference):
    result = FGVis(net, game="generation", n_iterations=1, baseline=reference, progress=False)(images)
    assert (result.mask == 0).all()
    repeated = FGVis(net, game="generation", n_iterations=1, baseline=reference, progress=False)(images)
    assert torch.equal(result.perturbed, repeated.perturbed)
    assert not torch.equal(result.perturbed, images)


def test_progress_is_told(net, images):
    output = []
    FGVis(net, n_iterations=4, patience=99, progress=output.append)(images)
    assert [(progress.done, progress.total) for progress in output] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert all(0 <= progress.details["score"] <= 1 and progress.details["images"] == 3 for progress in output)


def test_a_bar_on_stderr(net, images, capsys):
    FGVis(net, n_iterations=2, progress=True)(images)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"game": "chess"}, "game must be one of"),
        ({"similarity": "l2"}, "similarity must be one of"),
        ({"baseline": "black"}, "baseline must be one of"),
        ({"defence": None}, "defence must be one of"),
        ({"n_iterations": 0}, "n_iterations must be at least 1, got 0"),
        ({"lr": 0}, "lr must be positive, got 0"),
        ({"sparsity": -1}, "sparsity must not be negative, got -1"),
        ({"sparsity_growth": 1}, "sparsity_growth must be larger than 1, got 1"),
        ({"score_ratio": 1.5}, "score_ratio must lie between 0 and 1, got 1.5"),
        ({"stop_at": "never"}, "stop_at must be one of"),
    ],
)
def test_bad_settings(net, settings, message):
    with pytest.raises(InputError, match=message):
        FGVis(net, **settings)


def test_a_baseline_that_does_not_fit(net, images):
    with pytest.raises(InputError, match=r"baseline must broadcast to the images, \[3, 3, 8, 8\], got \[2, 1, 1\]"):
        FGVis(net, baseline=torch.zeros(2, 1, 1))(images)


def test_probabilities_are_taken_as_they_are(net, images):
    """A model that ends in a softmax plays the same game; only the rounding of the logarithm differs."""
    with_softmax = nn.Sequential(net, nn.Softmax(1)).eval()
    one = FGVis(net, n_iterations=5, progress=False)(images)
    other = FGVis(with_softmax, n_iterations=5, progress=False)(images)
    torch.testing.assert_close(one.mask, other.mask, rtol=0, atol=1e-9)
