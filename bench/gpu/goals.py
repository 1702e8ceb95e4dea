"""What the kernels are meant to reach, beside what was measured."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from gpu.architectures import NETWORKS

Row = dict[str, Any]


@dataclass
class Goal:
    """A figure that is aimed at.

    Attributes:
        name: what of.
        wanted: in words.
        value: measured, None where nobody did.
        reached: None where nobody measured.
    """

    name: str
    wanted: str
    value: float | None
    reached: bool | None

    def as_dict(self) -> Row:
        return asdict(self)


def _at_most(name: str, limit: float, unit: str, values: Iterable[float]) -> Goal:
    result = list(values)
    value = max(result) if result else None
    return Goal(name, f"at most {limit:g} {unit}", value, None if value is None else value <= limit)


def _at_least(name: str, limit: float, unit: str, values: Iterable[float]) -> Goal:
    result = list(values)
    value = min(result) if result else None
    return Goal(name, f"at least {limit:g} {unit}", value, None if value is None else value >= limit)


def _rows(rows: list[Row], **expected: Any) -> list[Row]:
    return [row for row in rows if all(row.get(key) == value for key, value in expected.items()) and "error" not in row]


def goals(rows: list[Row]) -> list[Goal]:
    """All goals, by the worst row that counts for each."""
    result = []
    for op in ("relu_forward", "relu_backward"):
        shares = [row["share"] for row in _rows(rows, kind="op", name=op, backend="triton") if row.get("share")]
        result.append(_at_least(op, 0.85, "of the copy bandwidth", shares))
    for method, limit, label in (("fixations", 1.25, "Fixations"), ("eigen-cam", 1.02, "Eigen-CAM")):
        for network in NETWORKS:
            actual = _rows(rows, kind="explainer", name=method, network=network, backend="best", dtype="bfloat16")
            result.append(_at_most(f"{label}, {network}", limit, "forwards", (row["forwards"] for row in actual)))
    for network in NETWORKS:
        actual = _rows(rows, kind="explainer", name="fgvis", network=network, backend="best", dtype="bfloat16")
        name = f"FGVis, an iteration, {network}"
        result.append(_at_most(name, 2.3, "forwards", (row["forwards"] for row in actual)))
    for shape in ("256 of 49x2048", "256 of 3136x256"):
        actual = _rows(rows, kind="op", name="leading_singular", shape=shape, backend="triton")
        other = _rows(rows, kind="op", name="leading_singular", shape=shape, backend="torch.linalg.svd")
        ratios = [other[0]["median_ms"] / row["median_ms"] for row in actual] if other else []
        result.append(_at_least(f"leading_singular, {shape}", 50, "times a batched SVD", ratios))
    for method, peer in (("saliency", "captum"), ("guided-backprop", "captum"), ("eigen-cam", "pytorch-grad-cam")):
        ratios = []
        for theirs in _rows(rows, kind="explainer", name=method, backend=peer):
            ours = _rows(
                rows, kind="explainer", name=method, backend="best", network=theirs["network"], dtype="float32"
            )
            ratios += [theirs["median_ms"] / row["median_ms"] for row in ours]
        result.append(_at_least(f"{method}, beside {peer}", 10, "times as fast", ratios))
    return result
