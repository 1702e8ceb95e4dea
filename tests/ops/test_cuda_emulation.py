"""The emulation of the CUDA C++ kernels catches faults: each is put into a kernel here, and switched on in turn."""

from typing import NamedTuple

import cuda_emulation
import pytest
import torch

from pyfast_xai import ops


class Fault(NamedTuple):
    """An edit of a kernel (see `cuda_emulation.with_fault`), the call that runs it, and what the emulation says."""

    edit: str
    call: str
    message: str


BARRIER = "@__syncthreads(); => ;@"
LOOP = "for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; @i < count => i <= count@; i += step) {\n    "
FIRST = "(i > 0 && sorted[i] == sorted[i - 1])"
SHUFFLE = "strongest_of_warp(best).index"
VOTE = "__ballot_sync(kAllLanes, value < 0)"
OUTSIDE = "out of bounds"

# By file and kernel: of each a barrier taken out where it has one, an index off by one, and a race.
FAULTS = {
    "bitmap: count, no barrier": Fault(f"{BARRIER}  // the storage serves the next chunk", "union", "race"),
    "bitmap: count, index": Fault("Sum(@i < total => i <= total@", "union", OUTSIDE),
    "bitmap: count, written by all": Fault("if (@threadIdx.x == 0 => true@) counts[c]", "union", "race"),
    "bitmap: scan, no barrier": Fault(f"before += sum;\n    {BARRIER}", "union", "race"),
    "bitmap: scan, index": Fault("if (@c < chunks => c <= chunks + 1@) counts[c] = before", "union", OUTSIDE),
    "bitmap: write, no barrier": Fault(f"first[c] + before);\n    {BARRIER}", "union", "race"),
    "bitmap: write, index": Fault("word = @i < total => i <= total@", "union", OUTSIDE),
    "bitmap: write, race": Fault("out + @first[c] => first[c] - (c > 0)@ + before", "union", "race"),
    "conv_trace: index": Fault("@c < conv.group_channels => c <= conv.group_channels@", "conv", OUTSIDE),
    "conv_trace: written by all": Fault("if (@lane == 0 => true@) out[p] = ravel", "conv", "race"),
    "conv_trace: half a warp": Fault(f"channel = @{SHUFFLE} => lane < 16 ? {SHUFFLE} : 0@;", "conv", "warp"),
    "linear_trace: select, not atomic": Fault(
        "@atomicOr(reinterpret_cast<unsigned long long*>(set + neuron / kWordBits), bit_of(neuron)); => "
        "set[neuron / kWordBits] |= bit_of(neuron);@",
        "linear",
        "race",
    ),
    "linear_trace: select, index": Fault(
        "selected + @(2 * row + (negative && negative[i])) => (1 + 2 * row + (negative && negative[i]))@",
        "linear",
        OUTSIDE,
    ),
    "linear_trace: sign, index": Fault("@column < columns => column <= columns@", "linear", OUTSIDE),
    "linear_trace: sign, written by all": Fault("if (@lane == 0 => true@)", "linear", "race"),
    "linear_trace: sign, half a warp": Fault(f"@{VOTE} => (lane < 16 ? {VOTE} : 0)@", "linear", "warp"),
    "linear_trace: unite, index": Fault("if (@word >= words => word > words@)", "linear", f"race|{OUTSIDE}"),
    "linear_trace: unite, race": Fault("up = above[row * words + @word => word / 2@]", "linear", "race"),
    "points_union: mark, not atomic": Fault(
        "@atomicOr(reinterpret_cast<unsigned long long*>(bits + points[i] / kWordBits), bit_of(points[i])); => "
        "bits[points[i] / kWordBits] |= bit_of(points[i]);@",
        "union",
        "race",
    ),
    "points_union: mark, index": Fault(f"{LOOP}if (!is_point(points[i]", "union", OUTSIDE),
    "points_union: mark_first, not atomic": Fault(
        "@atomicOr(reinterpret_cast<unsigned long long*>(bits + i / kWordBits), bit_of(i)); => "
        "bits[i / kWordBits] |= bit_of(i);@",
        "union of few",
        "race",
    ),
    "points_union: mark_first, index": Fault(f"@{FIRST} => (sorted[i] == sorted[i - 1])@", "union of few", OUTSIDE),
    "points_union: look_up, index": Fault(f"{LOOP}if (places[i]", "union of few", OUTSIDE),
    "points_union: look_up, race": Fault(
        "@places[i] = list[places[i]]; => places[i / 2] = list[places[i]];@", "union of few", "race"
    ),
}
# Blocks are small, so that a few thousand points take each loop more than one turn.
SMALLER = {
    "bitmap.cu": {"kThreads = 256;": "kThreads = 32;", "kScanThreads = 512;": "kScanThreads = 32;"},
}


def arguments(call):
    """The op of a call, and what it is called with."""
    generator = torch.Generator().manual_seed(0)
    if call == "union":
        return "points_union", (torch.arange(70_000), 70_000, None)
    if call == "union of few":
        return "points_union", (torch.randint(0, 1 << 40, (999,), generator=generator).repeat(2), 1 << 40, 999)
    if call == "linear":
        weight = torch.randn(70, 4_200, generator=generator)
        points = torch.arange(3 * 70)
        signs = ops.sign_bits(weight)
        return "linear_trace", (torch.randn(3, 4_200, generator=generator), *signs, points, points % 3 == 0, None)
    input, weight = torch.randn(1, 40, 6, 6, generator=generator), torch.randn(8, 40, 3, 3, generator=generator)
    padded = ([6, 6], [1, 1], [1, 1], [1, 1], 1, 0)
    return "conv_trace", (input, weight, torch.arange(8 * 36), None, *padded)


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """The kernels with all faults in them, none of them switched on."""
    namespace = f"{cuda_emulation.NAME}_faulty"
    texts = {path.name: path.read_text() for path in (cuda_emulation.SOURCES / "cuda").glob("*.cu")}
    for number, (name, fault) in enumerate(FAULTS.items(), 1):
        file = f"{name.split(':')[0]}.cu"
        texts[file] = cuda_emulation.with_fault(texts[file], number, fault.edit)
    for file, changes in SMALLER.items():
        for before, after in changes.items():
            assert before in texts[file]
            texts[file] = texts[file].replace(before, after)
    translated = {file: cuda_emulation.translate(text, namespace) for file, text in texts.items()}
    return cuda_emulation.Emulation(cuda_emulation.build(translated, tmp_path_factory.mktemp("faulty")), namespace)


def test_every_file_has_faults():
    files = {path.stem for path in (cuda_emulation.SOURCES / "cuda").glob("*.cu")}
    assert {name.split(":")[0] for name in FAULTS} == files


@pytest.mark.parametrize("name", FAULTS)
def test_faults_are_caught(faulty, name):
    op, options = arguments(FAULTS[name].call)
    expected = cuda_emulation.emulation().call(op, *options)
    assert torch.equal(faulty.call(op, *options), expected)  # without the fault nothing is said
    faulty.fault(list(FAULTS).index(name) + 1)
    try:
        with pytest.raises(RuntimeError, match=FAULTS[name].message):
            faulty.call(op, *options)
    finally:
        faulty.fault(0)


@pytest.mark.parametrize("call", ["union", "union of few", "linear", "conv"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_order_of_threads_gives_the_same(call, seed):
    emulation = cuda_emulation.emulation()
    op, options = arguments(call)
    before = emulation.accesses
    expected = emulation.call(op, *options)
    assert emulation.accesses > before
    emulation.seed(seed)
    try:
        assert torch.equal(emulation.call(op, *options), expected)
    finally:
        emulation.seed(0)
