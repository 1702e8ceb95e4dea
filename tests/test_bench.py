"""What benchmarks stand on: right calls, figures by turns, rows that are found again, a page drawn from them."""

import importlib
import sys
from pathlib import Path

import pytest
import torch

from pyfast_xai.ops.registry import OPS
from pyfast_xai.proof.networks import SMALL, Sizes, calls, outcome, single_dtype_calls

BENCH = Path(__file__).resolve().parents[1] / "bench"
if not (BENCH / "turns.py").is_file():
    pytest.skip("bench/ is not part of a source distribution", allow_module_level=True)


@pytest.fixture(scope="module")
def part():
    """A module of the benchmarks."""
    sys.path.insert(0, str(BENCH))
    yield importlib.import_module
    sys.path.remove(str(BENCH))


class Turns:
    """Stands in for the fixture of pytest-benchmark."""

    def pedantic(self, target, setup, rounds, warmup_rounds):
        for _ in range(rounds):
            setup()
            target()


def small_calls():
    return [*calls("cpu", torch.float32, SMALL), *single_dtype_calls("cpu", SMALL)]


def test_calls_cover_every_op():
    assert {call.op for call in small_calls()} == set(OPS)


def test_every_backend_is_right_on_the_calls():
    for call in small_calls():
        arguments = call.arguments()
        expected = outcome(call, "reference", arguments)
        for backend in ("numba", "cpp"):
            if OPS[call.op].missing(backend, "cpu") is None:
                assert call.agree(outcome(call, backend, arguments), expected), (call.op, backend)


def test_listed_calls_have_the_shapes_they_name():
    listed = {call.op: call for call in single_dtype_calls("cpu", Sizes(images=1, matrices=1))}
    points, size, _ = listed["points_union"].arguments()
    assert listed["points_union"].shape == f"{len(points)} points of {size}"
    points, *map_shape, _ = listed["point_density"].arguments()
    assert listed["point_density"].shape == f"{len(points)} points, {'x'.join(map(str, map_shape))}"


def test_ops_are_measured_beside_plain_pytorch(part, monkeypatch):
    measured = part("test_ops")
    monkeypatch.setattr(measured, "BUDGET", 0.0)
    call = next(item for item in small_calls() if item.op == "points_union")
    rows = []
    measured.test_op(Turns(), rows, {"copy": 1e9, "float32": 1e9}, call)
    served = {name for name in ("numba", "cpp") if OPS[call.op].missing(name, "cpu") is None}
    assert {row["backend"] for row in rows} == served
    assert all(row["times"] > 0 for row in rows)


def test_traced_windows_lie_on_the_map():
    """The geometry of a convolution that keeps its size: no window has nothing but padding."""
    for call in calls("cpu", torch.float32, Sizes(images=1, matrices=1)):
        if call.op == "conv_trace":
            side = int(call.shape.split("x")[2])
            kernel = int(call.shape.split(", ")[1][0])
            _, weight, _, _, size, stride, padding, dilation, _, _ = call.arguments()
            assert list(weight.shape[2:]) == [kernel, kernel]
            assert [
                (side + 2 * p - d * (kernel - 1) - 1) // s + 1
                for p, d, s in zip(padding, dilation, stride, strict=True)
            ] == size


def test_a_call_that_was_undone_has_its_work_to_do_again():
    call = next(item for item in small_calls() if item.op == "response_argmax")
    arguments = call.arguments()
    before = arguments[2].clone()
    call.kernel("reference")(*arguments)
    assert not torch.equal(arguments[2], before)
    call.reset(*arguments)
    assert torch.equal(arguments[2], before)


def test_figures_are_of_the_same_rounds(part):
    turns = part("turns")
    cost = turns.quotients([2.0, 30.0, 8.0, 12.0, 5.0], [1.0, 10.0, 2.0, 2.0, 1.0])
    assert (cost.median, cost.low, cost.high) == (4.0, 3.0, 5.0)


def test_calls_take_turns(part):
    order = []
    calls = {name: lambda name=name: order.append(name) for name in "ab"}
    seconds = part("turns").take_turns(Turns(), calls, 3, settled=1, before=lambda: order.append("-"))
    assert "".join(order) == "-a-b" * 4
    assert {name: len(item) for name, item in seconds.items()} == {"a": 3, "b": 3}


def test_what_is_above_its_goal_falls_short(part):
    quick = part("quick")
    common = {"network": "vgg16", "batch": 8, "what": "Saliency", "quotient": quick.OF_PEER, "goal": 0.8}
    rows = [common | {"value": value} for value in (0.5, 0.7, 0.9)]
    rows.append(common | {"quotient": quick.OF_PEER_RECORDED, "value": 2.0, "goal": None})
    assert quick.shortfalls(rows) == [
        f"vgg16, batch 8: Saliency, {quick.OF_PEER}: 0.90, goal 0.8",
        f"batch 8: {quick.OF_PEER}, median: 0.70, goal 0.6",
    ]


def test_replays_are_called_until_nothing_is_left_to_prepare(part):
    calls = []
    part("quick").settle(lambda: calls.append(1), lambda: min(len(calls), 3))
    assert len(calls) == 4


def test_the_last_of_rows_that_measure_the_same_is_kept(part, tmp_path, monkeypatch):
    measured = part("measured")
    monkeypatch.setattr(measured, "DATA", tmp_path / "data")
    assert measured.read("cpu_memory", "network") == []
    row = {"network": "a", "batch": 1, "who": "captum", "model_mib": 1.0}
    measured.append("cpu_memory", [row | {"increment_mib": 5.0}, row | {"network": "b", "increment_mib": 6.0}])
    measured.append("cpu_memory", [row | {"increment_mib": 7.0}])
    result = measured.read("cpu_memory", "network", "batch", "who")
    assert [(item["network"], item["increment_mib"]) for item in result] == [("b", "6.0"), ("a", "7.0")]
    assert result[0]["threads"] == str(torch.get_num_threads())


def test_the_page_shows_all_that_was_measured(part, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    measured, report = part("measured"), part("report")
    monkeypatch.setattr(measured, "DATA", tmp_path / "data")
    monkeypatch.setattr(report, "DOCUMENT", tmp_path / "performance.md")
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    report.DOCUMENT.write_text(f"by hand\n\n{report.BEGIN}\n\nstale\n\n{report.END}\n\nbelow\n")
    cost = {"forward_ms": 2.0, "explain_ms": 4.0, "forwards": 2.0, "low": 1.5, "high": 2.5, "rounds": 3}
    cost |= {"network": "vgg16", "batch": 8, "method": "saliency"}
    saved = cost | {"freed": "kept"}
    measured.append("cpu", [saved | {"backend": "cpp"}, saved | {"backend": "captum", "forwards": 3.0}])
    measured.append("cpu", [cost | {"freed": "given back", "backend": "cpp", "forwards": 4.0}])
    axes = [cost | {"axis": axis, "value": value, "backend": "cpp"} for axis in report.AXES for value in (1, 2)]
    measured.append("cpu_growth", [*axes, axes[-1] | {"backend": "NumPy loop", "explain_ms": 84.0}])
    op = {"op": "relu_forward", "shape": "9x9", "backend": "cpp", "ms": 1.0, "beside": "reference", "beside_ms": 2.0}
    op |= {"times": 2.0, "low": 1.0, "high": 3.0, "bytes": 10**6, "operations": 10**5, "copy": 2e9, "float32": 1e11}
    op |= {"share": 0.5, "bound": "copy"}
    measured.append("cpu_ops", [op, op | {"beside": "pytorch-grad-cam", "share": "", "bound": ""}])
    measured.append(
        "cpu_memory", [{"network": "vgg16", "batch": 2, "who": "captum", "increment_mib": 9, "model_mib": 1}]
    )
    cold = {"what": "EigenCAM", "backend": "auto", "first_ms": 20.0, "low": 18.0, "high": 30.0, "again_ms": 3.0}
    measured.append("cpu_cold_start", [cold])
    report.README.write_text(f"{report.BEGIN}\n\nstale\n\n{report.END}\n")
    goal = {"network": "vgg16", "batch": 1, "what": "saliency", "ms": 1, "beside_ms": 1, "rounds": 3, "load": 2.4}
    ways = {report.quick.RECORDED: (2.5, None), report.quick.FASTER: (1.5, 1.9)}
    measured.append("quick", [goal | {"quotient": name, "value": v, "goal": g} for name, (v, g) in ways.items()])
    eight = {"batch": 8, "instruction_set": "AVX-512"}
    measured.append("quick", [goal | eight | {"quotient": report.quick.FASTER, "value": 0.5, "goal": 0.85}])
    shares = {report.quick.OF_PEER_RECORDED: 0.9, report.quick.OF_PEER: 0.5}
    peer = goal | {"what": "Saliency", "goal": 0.9}
    measured.append("quick", [peer | {"quotient": name, "value": value} for name, value in shares.items()])
    row = {
        "date": "2026-11-30",
        "instructions": "AVX512",
        "threads": 1,
        "batch": 8,
        "peer": "captum",
        "name": "Occlusion",
    }
    row |= {"seconds": 6.0, "peer_seconds": 12.0, "ratio": 0.5, "load": 2}
    (measured.DATA / "peers.csv").write_text(",".join(row) + "\n" + ",".join(map(str, row.values())) + "\n")
    report.main()
    text = report.DOCUMENT.read_text()
    assert (text[:7], text[-6:]) == ("by hand", "below\n")
    assert "stale" not in text + report.README.read_text()
    assert "| saliency | in forwards | 0.85 | 0.50 |" in report.README.read_text()
    assert "| saliency | in forwards | 1.9 | 2.50 / 1.50 |" in text
    assert "| saliency | 2.00 |\n| saliency of captum | 3.00 |" in text
    assert "| Occlusion | captum | 8 | AVX512 | 1 | 2 | 6.0 | 12.0 | 0.5 |" in text
    assert "freed memory kept" in text
    assert "freed memory given back" in text
    assert text.count("| saliency | 4.00 |") == 1
    assert "| relu_forward | 9x9 | 1 |  | 2 (1 to 3) |  | 50 % | bandwidth |" in text
    assert "| 2 | vgg16, batch 8 | 4 | 84 | 21 |" in text
    assert "| EigenCAM | auto | 20 (18 to 30) | 3.0 |" in text
    drawn = {path.name for path in tmp_path.glob("*.png")}
    names = ("drop-ins", "batch-8", "peers-8", "memory", "growth", "roofline")
    assert drawn == {f"performance-{name}.png" for name in names}
    assert all(f"({name})" in text for name in drawn)
