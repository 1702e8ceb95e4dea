"""The emulation of the CUDA C++ kernels catches faults: each is put into a kernel here."""

import cuda_emulation
import pytest
import torch

PADDED = ([6, 6], [1, 1], [1, 1], [1, 1], 1, 0)
BARRIER = "    __syncthreads();  // the storage serves the next chunk\n"
ATOMIC = "atomicOr(reinterpret_cast<unsigned long long*>(bits + points[i] / kWordBits), bit_of(points[i]));"
FAULTS = {
    "a barrier taken out": ("bitmap.cu", BARRIER, "", "points_union", "race"),
    "an update that is not atomic": (
        "points_union.cu",
        ATOMIC,
        "bits[points[i] / kWordBits] |= bit_of(points[i]);",
        "points_union",
        "race",
    ),
    "an index off by one": (
        "conv_trace.cu",
        "c < conv.group_channels",
        "c <= conv.group_channels",
        "conv_trace",
        "out of bounds",
    ),
    "a write by every lane": ("conv_trace.cu", "if (lane == 0) out[p] = ravel", "out[p] = ravel", "conv_trace", "race"),
    "a shuffle of half a warp": (
        "conv_trace.cu",
        "const int64_t channel = strongest_of_warp(best).index;",
        "const int64_t channel = lane < 16 ? strongest_of_warp(best).index : 0;",
        "conv_trace",
        "warp",
    ),
}


def arguments(op):
    if op == "points_union":
        return torch.arange(300_000), 300_000, None
    input, weight = torch.randn(1, 40, 6, 6), torch.randn(8, 40, 3, 3)
    return input, weight, torch.arange(8 * 36), None, *PADDED


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """An emulation for each fault."""
    built = {}
    for number, (name, (file, before, after, op, _)) in enumerate(FAULTS.items()):
        namespace = f"{cuda_emulation.NAME}_fault_{number}"
        texts = {}
        for needed in {"bitmap.cu", f"{op}.cu"}:
            text = (cuda_emulation.SOURCES / "cuda" / needed).read_text()
            if needed == file:
                assert before in text, f"{file} no longer has what is taken out"
                text = text.replace(before, after)
            texts[needed] = cuda_emulation.translate(text, namespace)
        library = cuda_emulation.build(texts, tmp_path_factory.mktemp(namespace))
        built[name] = cuda_emulation.Emulation(library, namespace)
    return built


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_caught(faulty, fault):
    *_, op, message = FAULTS[fault]
    with pytest.raises(RuntimeError, match=message):
        faulty[fault].call(op, *arguments(op))


@pytest.mark.parametrize("op", ["points_union", "conv_trace"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_any_order_of_threads_gives_the_same(op, seed):
    emulation = cuda_emulation.emulation()
    given = arguments(op)
    before = emulation.accesses
    expected = emulation.call(op, *given)
    assert emulation.accesses > before
    emulation.seed(seed)
    try:
        assert torch.equal(emulation.call(op, *given), expected)
    finally:
        emulation.seed(0)
