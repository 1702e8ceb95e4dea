import copy
import errno
import json
import os
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from pyfast_xai import CLEAR, CNNFixations, EigenCAM, Saliency, UnsupportedOpError, datasets
from pyfast_xai.datasets.attachments import attached
from pyfast_xai.datasets.batching import BatchExplainer, out_of_memory
from pyfast_xai.datasets.folders import run_folder
from pyfast_xai.datasets.manifest import NAME, read_document, weights_digest
from pyfast_xai.datasets.run_worker import RunWorker
from pyfast_xai.datasets.schema import columns
from pyfast_xai.datasets.sources import Item, Source
from pyfast_xai.datasets.store import PartStore
from pyfast_xai.errors import InputError
from pyfast_xai.explainers.clear import ClassExplanation
from pyfast_xai.explainers.common.explainer import Explainer
from pyfast_xai.explanation import Explanation
from pyfast_xai.images import Preprocess
from pyfast_xai.models import LoadedModel


def run(folder, loaded, out, **how):
    return datasets.explain(
        folder, loaded, **{"method": "saliency", "out": out, "shard_size": 6, "batch_size": 4, **how}
    )


def rows(out):
    return [dict(row) for row in datasets.open(out)]


def parts(out):
    return sorted(name for name in os.listdir(out) if name.startswith("part-"))


def left_over():
    """Threads of an engine that still run; libraries begin others of their own."""
    return [one.name for one in threading.enumerate() if one.name.startswith(("decode", "feed", "write"))]


def steady(row):
    return {name: value for name, value in row.items() if name not in ("decode_ms", "explain_ms")}


def test_a_run_with_reduced_jpeg_files_says_so_and_shows_what_the_network_saw(tmp_path, loaded, make_picture):
    (tmp_path / "photos").mkdir()
    for n in range(3):
        (tmp_path / "photos" / f"{n}.jpg").write_bytes(make_picture(n, "JPEG", quality=95))
    Image.open(tmp_path / "photos" / "0.jpg").resize((800, 600)).save(tmp_path / "photos" / "0.jpg")
    run(str(tmp_path / "photos"), loaded, tmp_path / "plain")
    run(str(tmp_path / "photos"), loaded, tmp_path / "reduced", reduced_jpeg=True)
    plain, reduced = datasets.open(tmp_path / "plain"), datasets.open(tmp_path / "reduced")
    assert reduced.manifest.described["rows"]["reduced_jpeg"] is True
    assert "reduced_jpeg" not in plain.manifest.described["rows"]
    assert [(row["width"], row["height"]) for row in reduced] == [(800, 600), (32, 28), (32, 28)]
    assert [torch.equal(plain.picture(n), reduced.picture(n)) for n in range(3)] == [False, True, True]
    with pytest.raises(InputError, match=r"^out .* must be continued as it was begun, with rows.reduced_jpeg true"):
        run(str(tmp_path / "photos"), loaded, tmp_path / "reduced")


def test_an_accelerated_run_says_the_same_and_that_it_is_one(folder, loaded, tmp_path):
    run(str(folder), loaded, tmp_path / "plain")
    run(str(folder), loaded, tmp_path / "fast", accelerate=True)
    plain, fast = datasets.open(tmp_path / "plain"), datasets.open(tmp_path / "fast")
    assert fast.manifest.described["method"]["accelerated"] is True
    assert "accelerated" not in plain.manifest.described["method"]
    for n in range(len(plain)):
        assert (plain[n]["id"], plain[n]["target"]) == (fast[n]["id"], fast[n]["target"])
        torch.testing.assert_close(plain[n].explanation().heatmap, fast[n].explanation().heatmap, rtol=1e-3, atol=1e-6)
    with pytest.raises(InputError, match=r"^out .* must be continued as it was begun, with method.accelerated null"):
        run(str(folder), loaded, tmp_path / "plain", accelerate=True)


def test_a_run_tries_replays_unless_told_otherwise(folder, loaded, tmp_path):
    def explainer(**settings):
        return datasets.prepare(str(folder), loaded, out=tmp_path / "run", **settings).explainer

    assert explainer(method="saliency")._trial is not None
    assert explainer(method="saliency", accelerate=False)._trial is None
    assert explainer(method="saliency", accelerate=True).accelerated
    assert explainer(method=Saliency(loaded.model, accelerate=False))._trial is None
    with pytest.raises(InputError, match=r"^accelerate must be 'auto' or True where method is an explainer"):
        explainer(method=Saliency(loaded.model), accelerate=False)
    with pytest.raises(InputError, match=r"^accelerate must be one of True, False, 'auto', got 'on'"):
        explainer(method="saliency", accelerate="on")


@pytest.mark.parametrize("method", ["fixations", "eigen-cam", "saliency", "clear"])
def test_rows_say_what_the_explainer_says(folder, loaded, tmp_path, method):
    done = run(str(folder), loaded, tmp_path / "out", method=method)
    assert (done.items, done.rows, done.errors, done.before, done.complete) == (20, 20, 0, 0, True)
    result = datasets.open(tmp_path / "out")
    assert len(result) == 20
    explainer = {"fixations": CNNFixations, "eigen-cam": EigenCAM, "saliency": Saliency, "clear": CLEAR}[method]
    names = sorted(os.listdir(folder))
    for n, row in enumerate(result):
        with Image.open(folder / names[n]) as image:
            recorded, shown = loaded.preprocess(image.convert("RGB"))
        actual = explainer(loaded.model)(recorded[None])
        logits = loaded.model(recorded[None]).softmax(1)[0]
        assert (row["id"], row["index"], row["status"], row["error_type"]) == (names[n], n, "ok", None)
        assert (row["width"], row["height"], row["input_width"], row["input_height"]) == (32, 28, 24, 24)
        assert row["source"] == str(folder / names[n])
        assert row["topk_index"] == logits.argsort(descending=True).tolist()
        assert row["topk_score"] == pytest.approx(logits.sort(descending=True).values.tolist(), abs=1e-4)
        assert row["topk_name"] == [loaded.labels[c] for c in row["topk_index"]]
        if actual.target is None:
            assert row["target"] is row["class_name"] is row["score"] is None
        else:
            assert row["target"] == int(actual.target)
            assert row["class_name"] == loaded.labels[row["target"]]
            assert row["score"] == pytest.approx(float(actual.score), abs=1e-4)
        if names[n].endswith("png"):  # two JPEG decoders may differ by a grey level
            assert row["box"] == (None if actual.boxes().isnan().any() else actual.boxes()[0].tolist())
            assert (row["points"] is None) == (actual.points is None)
            if actual.points is not None:
                assert [[p["y"], p["x"]] for p in row["points"]] == actual.points[0].tolist()
            repeated = row.explanation()
            # float16 keeps 11 bits of each map's largest number.
            scale = float(actual.heatmap.max())
            assert torch.allclose(repeated.heatmap, actual.heatmap, rtol=0, atol=scale * 2**-10)
            assert torch.equal(repeated.images[0], shown)
            if isinstance(actual, ClassExplanation):
                assert torch.equal(repeated.dominant_class, actual.dominant_class)
            assert repeated.overlay().shape == (1, 3, 24, 24)


def test_maps_are_small_where_they_can_be(folder, loaded, tmp_path):
    for method, kind, shape in (
        ("eigen-cam", "rectified-first", [9, 9]),
        ("fixations", "points", None),
        ("saliency", "heatmap", [24, 24]),
    ):
        run(str(folder), loaded, tmp_path / method, method=method)
        row = rows(tmp_path / method)[0]
        assert (row["map_kind"], row["map_shape"]) == (kind, shape)
    run(str(folder), loaded, tmp_path / "full", method="eigen-cam", maps="heatmap", map_dtype="float32")
    result = datasets.open(tmp_path / "full")[0]
    assert result["map_shape"] == [24, 24]
    assert np.array_equal(result.map, result.explanation().heatmap[0].numpy())
    run(str(folder), loaded, tmp_path / "none", maps="none", pictures=True)
    result = datasets.open(tmp_path / "none")[0]
    assert result["map"] is None
    with pytest.raises(InputError, match="must have a map"):
        result.explanation()
    assert result["picture"]["bytes"].startswith(b"\x89PNG")


@pytest.mark.parametrize(("dtype", "off"), [("float32", 0), ("float16", 2**-11), ("uint8", 1 / 509)])
def test_dtypes_of_maps(folder, loaded, tmp_path, dtype, off):
    run(str(folder), loaded, tmp_path / "exact", map_dtype="float32")
    run(str(folder), loaded, tmp_path / "out", map_dtype=dtype)
    for exact, item in zip(datasets.open(tmp_path / "exact"), datasets.open(tmp_path / "out"), strict=True):
        assert np.abs(exact.map - item.map).max() <= off * np.abs(exact.map).max()


def test_bad_inputs_are_rows(folder, loaded, tmp_path, make_picture):
    (folder / "00.png").write_bytes(b"")
    (folder / "03.jpg").write_bytes(make_picture(3, "JPEG")[:300])
    (folder / "04.png").write_text("no picture")
    names = sorted(os.listdir(folder))
    source = datasets.Files([folder / name for name in names], names)
    (folder / "09.jpg").unlink()
    run(source, loaded, tmp_path / "out")
    result = rows(tmp_path / "out")
    assert [row["id"] for row in result] == source.ids
    bad = {row["id"]: row["error_message"] for row in result if row["status"] == "error"}
    assert set(bad) == {"00.png", "03.jpg", "04.png", "09.jpg"}
    assert "no such file" in bad["09.jpg"]
    for row in result:
        if row["status"] == "error":
            assert row["error_type"] == "ImageError"
            assert row["map"] is row["target"] is row["topk_index"] is row["box"] is row["points"] is None
    assert datasets.status(tmp_path / "out").kinds == {"ImageError": 4}
    # The others are what they are without them.
    with pytest.raises(InputError, match="must have an explanation, got ImageError"):
        datasets.open(tmp_path / "out")[0].explanation()


class Moody(Explainer):
    """Fails as it is told to; else a heat map of what the image is."""

    method = "moody"
    paper = ""

    def __init__(self, model, mood):
        super().__init__(model)
        self._mood, self.calls = mood, []

    def _explain(self, images, target, args, kwargs):
        self.calls.append(len(images))
        self._mood(images)
        logits = self.record(images).result
        heat = images.abs().mean(1)
        return Explanation(self.method, heat, target=logits.argmax(1), score=logits.softmax(1).amax(1))


def tensors(count, shapes=((3, 8, 8),)):
    class Data:
        def __len__(self):
            return count

        def __getitem__(self, index):
            return torch.full(shapes[index % len(shapes)], 1.0 + index)

    return Data()


def fails_on(number, error):
    def mood(images):
        if bool((images == 1.0 + number).flatten(1).any(1).any()):
            raise error

    return mood


@pytest.mark.parametrize("error", [UnsupportedOpError("no rule for aten::odd"), InputError("x"), ZeroDivisionError()])
def test_an_image_on_which_the_method_fails_is_a_row(loaded, tmp_path, error):
    method = Moody(loaded.model, fails_on(7, error))
    run(tensors(12), loaded, tmp_path / "out", method=method)
    result = rows(tmp_path / "out")
    assert [row["status"] for row in result] == ["ok"] * 7 + ["error"] + ["ok"] * 4
    assert (result[7]["error_type"], result[7]["error_message"]) == (
        type(error).__name__,
        str(error) or type(error).__name__,
    )


def test_maps_that_are_not_finite_are_errors(loaded, tmp_path):
    class Nan(Moody):
        def __call__(self, images, target=None):
            result = super().__call__(images, target)
            result.heatmap[(images == 3).flatten(1).any(1)] = torch.nan
            return result

    run(tensors(9), loaded, tmp_path / "out", method=Nan(loaded.model, lambda _: None))
    result = rows(tmp_path / "out")
    assert [row["id"] for row in result if row["status"] == "error"] == ["2"]
    assert "must be finite" in result[2]["error_message"]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("method", "top_k"), [("grad-cam", 5), ("eigen-cam", 5), ("eigen-cam", 0), ("dff", 0), ("saliency", 0)]
)
def test_a_model_whose_output_is_not_finite_makes_error_rows(folder, loaded, tmp_path, method, top_k, value):
    class Odd(nn.Module):
        """Answers with one odd class for some images."""

        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, images):
            logits = self.network(images)
            is_odd = images.mean((1, 2, 3)) > 0
            column = torch.arange(logits.shape[1]) == 2
            return torch.where(is_odd[:, None] & column, torch.full_like(logits, value), logits)

    model = LoadedModel(Odd(loaded.model).eval(), loaded.preprocess, loaded.labels, "odd")
    run(str(folder), model, tmp_path / "out", method=method, top_k=top_k)
    result = datasets.open(tmp_path / "out")
    odd = []
    for row in result:
        with Image.open(folder / row["id"]) as image:
            odd.append(bool(loaded.preprocess(image.convert("RGB"))[0].mean() > 0))
    assert True in odd
    assert False in odd
    assert [row["status"] == "error" for row in result] == odd
    for row in result:
        if row["status"] == "error":
            assert "the model's output is not finite" in row["error_message"]
            assert row["target"] is row["topk_index"] is row["score"] is None


def test_rows_that_cannot_be_made_are_error_rows(loaded, tmp_path):
    class Odd(Moody):
        def __call__(self, images, target=None):
            explanation = super().__call__(images, target)
            if bool((images == 3).any()):
                explanation.target = explanation.target[:, None, None].expand(-1, 2, 2)
                explanation.dominant_class = torch.zeros(1)
            return explanation

    class MuteError(Exception):
        def __str__(self):
            raise ValueError

    run(tensors(9), loaded, tmp_path / "out", method=Odd(loaded.model, lambda _: None))
    result = rows(tmp_path / "out")
    assert len(result) == 9
    assert result[2]["status"] == "error"
    assert result[8]["status"] == "ok"
    run(tensors(9), loaded, tmp_path / "mute", method=Moody(loaded.model, fails_on(4, MuteError())))
    assert [row["error_message"] for row in rows(tmp_path / "mute") if row["status"] == "error"] == ["MuteError"]


def test_a_method_that_always_fails_ends_the_run(folder, loaded, tmp_path):
    with pytest.raises(InputError, match="layer"):
        run(str(folder), loaded, tmp_path / "out", method="eigen-cam", method_settings={"layer": "none such"})
    assert parts(tmp_path / "out") == []
    # Asked for, it is as many rows.
    done = run(
        str(folder), loaded, tmp_path / "out", method="eigen-cam", method_settings={"layer": "none such"}, max_errors=99
    )
    assert (done.rows, done.errors, done.too_many_errors) == (20, 20, False)


MEMORY = [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"),
          RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory: you tried"),
          RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")]  # fmt: skip


@pytest.mark.parametrize("error", MEMORY)
def test_memory_that_runs_out_halves_the_batch(loaded, tmp_path, error):
    def mood(images):
        if len(images) > 3:
            raise error

    method = Moody(loaded.model, mood)
    output = []
    done = run(
        tensors(40), loaded, tmp_path / "out", method=method, batch_size=16, shard_size=20, progress=output.append
    )
    assert (done.rows, done.errors) == (40, 0)
    # 16, 8 and 4 are too many; two go through, and no larger batch is tried again.
    assert method.calls[:3] == [16, 8, 4]
    assert max(method.calls[3:]) == 2
    assert output[-1].batch_size == 2
    assert PartStore(tmp_path / "out").finished()[1].batch_size == 2
    # A run that goes on begins with what it had.
    os.remove(tmp_path / "out" / parts(tmp_path / "out")[0])
    repeated = Moody(loaded.model, mood)
    run(tensors(40), loaded, tmp_path / "out", method=repeated, batch_size="auto", shard_size=20)
    assert set(repeated.calls) == {2}


def test_an_image_that_alone_is_too_large_is_a_row(loaded, tmp_path):
    def mood(images):
        if images.shape[-1] > 8:
            raise MemoryError

    run(tensors(8, ((3, 8, 8), (3, 9, 9))), loaded, tmp_path / "out", method=Moody(loaded.model, mood))
    assert [row["error_type"] for row in rows(tmp_path / "out")] == [None, "MemoryError"] * 4


def test_other_errors_are_no_lack_of_memory():
    for error in (RuntimeError("shape mismatch"), ValueError("not enough memory"), InputError("out of memory")):
        assert not out_of_memory(error)


def test_images_of_several_shapes(loaded, tmp_path):
    shapes = ((3, 8, 8), (3, 8, 9), (3, 12, 8))
    method = Moody(loaded.model, lambda _: None)
    run(tensors(20, shapes), loaded, tmp_path / "out", method=method, shard_size=20, map_dtype="float32")
    result = datasets.open(tmp_path / "out")
    assert [tuple(row["map_shape"]) for row in result] == [shapes[n % 3][1:] for n in range(20)]
    assert all(np.all(row.map == 1.0 + n) for n, row in enumerate(result))
    assert sum(method.calls) == 20
    assert max(method.calls) == 4


def test_answers_cost_no_forward_where_the_method_has_them(loaded):
    calls = []
    hook = loaded.model.register_forward_hook(lambda *_: calls.append(1))
    images = torch.rand(3, 3, 24, 24)
    for method, more in ((Saliency, 0), (CNNFixations, 0), (EigenCAM, 1)):
        batches = BatchExplainer(method(loaded.model), 2, 4)
        method(loaded.model)(images)  # the first call of a kind is compared with the model in the other memory format
        calls.clear()
        method(loaded.model)(images)
        alone = len(calls)
        calls.clear()
        (result,) = batches(images, None)
        assert len(calls) == alone + more
        shares, classes = loaded.model(images).softmax(1).topk(2)
        assert torch.equal(result.top[0], classes)
        assert torch.allclose(result.top[1], shares, atol=1e-6)
        (result,) = BatchExplainer(method(loaded.model), 0, 4)(images, None)
        assert result.top is None
    hook.remove()


def test_a_model_without_classes(tmp_path, loaded):
    class Maps(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, x):
            return self.conv(x).relu()

    model = LoadedModel(Maps().eval(), loaded.preprocess, None, "maps")
    run(tensors(3), model, tmp_path / "out", method="eigen-cam")
    assert [row["topk_index"] for row in rows(tmp_path / "out")] == [None] * 3


def test_targets(folder, loaded, tmp_path):
    run(str(folder), loaded, tmp_path / "all", target=3)
    assert {row["target"] for row in rows(tmp_path / "all")} == {3}
    names = sorted(os.listdir(folder))
    listed = [f"{name},{n % 5 if n != 4 else ''}" for n, name in enumerate(names)]
    (folder / "list.csv").write_text("path,label\n" + "\n".join(listed))
    run(str(folder / "list.csv"), loaded, tmp_path / "own", target="label")
    result = rows(tmp_path / "own")
    assert [row["target"] for row in result] == [None if n == 4 else n % 5 for n in range(20)]
    assert [row["label"] for row in result] == [None if n == 4 else n % 5 for n in range(20)]
    assert "must be there where it is explained" in result[4]["error_message"]
    for wrong in (-1, "cat", 1.5, True):
        with pytest.raises(InputError, match="target must be"):
            run(str(folder), loaded, tmp_path / "no", target=wrong)


def test_options_come_as_one_object_as_keywords_or_as_both(folder, loaded, tmp_path):
    options = datasets.RunOptions(method="saliency", out=tmp_path / "out", shard_size=6, batch_size=4)
    assert datasets.explain(folder, loaded, options).before == 0
    assert run(folder, loaded, tmp_path / "out").before == 20
    assert datasets.explain(folder, loaded, options, workers=1).before == 20
    with pytest.raises(InputError, match=r"with shard_size 6, got 7"):
        datasets.explain(folder, loaded, options, shard_size=7)
    with pytest.raises(TypeError, match="shards"):
        datasets.explain(folder, loaded, options, shards=7)
    with pytest.raises(AttributeError):
        options.batch_size = 3


@pytest.mark.parametrize("threads", [None, 1, 3])
def test_rows_do_not_depend_on_how_many_threads_decode(folder, loaded, tmp_path, threads):
    run(folder, loaded, tmp_path / "plain", workers=2)
    recorded = []
    run(folder, loaded, tmp_path / "out", workers=threads, progress=recorded.append)
    assert [steady(row) for row in rows(tmp_path / "out")] == [steady(row) for row in rows(tmp_path / "plain")]
    most = threads or len(os.sched_getaffinity(0))
    assert all(1 <= progress.threads <= most for progress in recorded if progress.images)


def test_the_same_call_goes_on(folder, loaded, tmp_path):
    run(str(folder), loaded, tmp_path / "whole", method="eigen-cam")
    out = tmp_path / "out"
    output = []

    def stop(progress):
        output.append(progress)
        if progress.images > 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(str(folder), loaded, out, method="eigen-cam", progress=stop)
    assert parts(out) == parts(tmp_path / "whole")[:1]
    assert [name for name in os.listdir(out) if name.endswith(".tmp")] == []
    assert not left_over()
    done = run(str(folder), loaded, out, method="eigen-cam")
    assert (done.before, done.rows, done.progress.images) == (6, 20, 14)
    assert [steady(row) for row in rows(out)] == [steady(row) for row in rows(tmp_path / "whole")]
    assert run(str(folder), loaded, out, method="eigen-cam").progress.images == 0


class Full:
    """`os`, on a disk with room for so many bytes."""

    def __init__(self, room):
        self.room = room

    def __getattr__(self, name):
        return getattr(os, name)

    def write(self, handle, data):
        part = bytes(data[: min(len(data), 1000)])
        self.room -= len(part)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return os.write(handle, part)


def test_a_full_disk_stops_cleanly_and_goes_on(folder, loaded, tmp_path):
    out = tmp_path / "out"
    job = datasets.prepare(str(folder), loaded, method="saliency", out=out, shard_size=6, batch_size=4)
    out.mkdir()
    store = PartStore(out, Full(45_000))
    job.manifest.write(PartStore(out).folder, job.settings.stored.schema)
    worker = RunWorker(replace(job, store=store))
    with pytest.raises(OSError, match=r"No space left .*part-0000000\d\.parquet'"):
        worker.run(range(len(job.shards)))
    there = parts(out)
    assert 0 < len(there) < 4
    assert sorted(os.listdir(out)) == [NAME, *there]
    assert not left_over()
    assert run(str(folder), loaded, out).complete
    assert not datasets.verify(out).faults


def test_a_file_in_the_place_of_the_folder_is_refused(folder, loaded, tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=r"^out must be a folder, got .*, which is or lies below a file$"):
            run(str(folder), loaded, out)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("change", ["swapped", "over another", "beyond the last"])
def test_parts_in_the_place_of_others_are_refused(folder, loaded, tmp_path, change):
    out = tmp_path / "out"
    run(str(folder), loaded, out)
    one, two = out / "part-00000001.parquet", out / "part-00000002.parquet"
    data = one.read_bytes()
    if change == "swapped":
        one.write_bytes(two.read_bytes())
    (out / "part-00000009.parquet" if change == "beyond the last" else two).write_bytes(data)
    with pytest.raises(InputError, match=r"^part .* must be of this run, got one of another$"):
        run(str(folder), loaded, out)
    assert datasets.verify(out).faults


def test_a_part_that_is_lost_while_the_run_works_is_made_by_the_next(folder, loaded, tmp_path):
    out = tmp_path / "out"

    def lose(progress):
        if progress.rows >= 6:
            (out / "part-00000000.parquet").unlink(missing_ok=True)

    run(str(folder), loaded, out, progress=lose)
    assert len(parts(out)) == 3
    repeated = run(str(folder), loaded, out)
    assert (repeated.before, repeated.rows) == (14, 20)
    assert [row["index"] for row in datasets.open(out)] == list(range(20))
    assert datasets.verify(out).faults == []


def test_a_source_that_fails_ends_the_run(loaded, tmp_path):
    class Gone(Source):
        kind, ids = "gone", [str(n) for n in range(30)]

        def __init__(self, last):
            self.last = last

        def items(self, start, stop):
            for index in range(start, stop):
                if index == self.last:
                    raise OSError("the network is gone")
                yield Item(self.ids[index], index, "", lambda: torch.rand(3, 8, 8))

        def stamps(self):
            return []

    with pytest.raises(OSError, match="network is gone"):
        run(Gone(15), loaded, tmp_path / "out")
    assert len(parts(tmp_path / "out")) == 2
    assert not left_over()
    assert run(Gone(99), loaded, tmp_path / "out").complete

    class Short(Gone):
        def items(self, start, stop):
            return super().items(start, min(stop, 20))

    with pytest.raises(InputError, match="as many items as its listing"):
        run(Short(99), loaded, tmp_path / "short")


def test_too_many_errors_stop_after_their_part(folder, loaded, tmp_path):
    for n in (1, 3, 7, 9, 11, 13):
        (folder / f"{n:02d}.jpg").write_bytes(b"")
    for limit, stopped in ((1, True), (0.05, True), (6, False), (0.5, False)):
        out = tmp_path / f"out-{limit}"
        done = run(str(folder), loaded, out, max_errors=limit)
        assert done.too_many_errors == stopped
        assert done.complete or stopped
        assert len(parts(out)) >= 1
    out = tmp_path / "out-1"
    assert run(str(folder), loaded, out, max_errors=1).progress.images == 0
    assert run(str(folder), loaded, out, max_errors=20).complete
    for wrong in (-1, 1.5, True):
        with pytest.raises(InputError, match="max_errors must be"):
            run(str(folder), loaded, tmp_path / "x", max_errors=wrong)


def test_another_run_is_refused_with_the_difference(folder, loaded, tmp_path):
    out = tmp_path / "out"
    run(str(folder), loaded, out)
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}
    other = LoadedModel(copy.deepcopy(loaded.model), loaded.preprocess, loaded.labels, "tiny")
    with torch.no_grad():
        other.model[0].weight[0, 0, 0, 0] += 1e-6
    preprocess = type(loaded.preprocess)(24, mean=(0.5,) * 3)
    cases = {
        "with model.weights": {"model": other},
        'with method.name "saliency", got "eigen-cam"': {"method": "eigen-cam"},
        'with method.settings.reduction null, got "norm"': {"method_settings": {"reduction": "norm"}},
        "with shard_size 6, got 7": {"shard_size": 7},
        "with rows.target null, got 2": {"target": 2},
        'with rows.map_dtype "float16", got "uint8"': {"map_dtype": "uint8"},
        "with preprocess.mean": {"preprocess": preprocess},
    }
    for message, change in cases.items():
        with pytest.raises(InputError, match="must be continued as it was begun") as caught:
            run(str(folder), change.pop("model", loaded), out, **change)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    (folder / "00.png").touch()
    with pytest.raises(InputError, match="the same files, got some of another size or time of change"):
        run(str(folder), loaded, out)
    (folder / "more.png").touch()
    with pytest.raises(InputError, match=r"with source.items 20, got 21"):
        run(str(folder), loaded, out)
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before


def test_what_does_not_decide_what_a_row_says_may_change(folder, loaded, tmp_path):
    out = tmp_path / "out"
    run(str(folder), loaded, out)
    os.remove(out / parts(out)[2])
    assert run(str(folder), loaded, out, batch_size=3, workers=1, max_errors=3).complete


def test_a_manifest_that_was_touched_is_refused(folder, loaded, tmp_path):
    out = tmp_path / "out"
    run(str(folder), loaded, out)
    document = read_document(run_folder(out))
    whole = (out / NAME).read_bytes()
    contents = [b"", b"[]", b"{", b"null", b'{"made": 3}', b"[" * 100_000]
    contents.append(json.dumps(document | {"shard_size": 7}).encode())
    files = [attached(content, columns()) for content in contents]
    for wrong in (*files, b"", b"{}", b"PAR1", whole[:-1], whole[5:], b"PAR1" + b"\xff" * 8 + b"PAR1"):
        (out / NAME).write_bytes(wrong)
        for command in (datasets.open, datasets.status, datasets.verify):
            with pytest.raises(InputError, match=r"_run\.parquet"):
                command(out)
    os.remove(out / NAME)
    with pytest.raises(InputError, match=r"with parts and no _run\.parquet"):
        run(str(folder), loaded, out)


def test_a_part_of_another_run_is_refused(folder, loaded, tmp_path):
    run(str(folder), loaded, tmp_path / "a")
    run(str(folder), loaded, tmp_path / "b", target=1)
    name = parts(tmp_path / "a")[1]
    (tmp_path / "b" / name).write_bytes((tmp_path / "a" / name).read_bytes())
    with pytest.raises(InputError, match="must be of this run"):
        run(str(folder), loaded, tmp_path / "b", target=1)


def test_digests_tell_weights_apart(loaded):
    first = weights_digest(loaded.model)
    assert weights_digest(loaded.model) == first
    with torch.no_grad():
        loaded.model[0].bias[0] += 1
    assert weights_digest(loaded.model) != first
    assert weights_digest(nn.Linear(2, 2)) != weights_digest(nn.Linear(2, 2))
    assert len({weights_digest(nn.Sequential(layer)) for layer in (nn.ReLU(), nn.GELU())}) == 2
    weights_digest(nn.BatchNorm2d(3).bfloat16())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "none such"}, "method must be one of"),
        ({"method_settings": {"none": 1}}, "method_settings must be those of saliency"),
        ({"batch_size": 0}, "batch_size must be"),
        ({"batch_size": "large"}, "batch_size must be"),
        ({"shard_size": 0}, "shard_size must be at least 1"),
        ({"workers": 0}, "workers must be at least 1"),
        ({"top_k": -1}, "top_k must be at least 0"),
        ({"maps": "large"}, "maps must be"),
        ({"map_dtype": "int3"}, "map_dtype must be"),
        ({"max_pixels": 0}, "max_pixels must be"),
    ],
)
def test_settings_that_cannot_be(folder, loaded, tmp_path, change, message):
    with pytest.raises(InputError, match=message):
        run(str(folder), loaded, tmp_path / "out", **change)


def test_a_plain_module_needs_preprocessing(folder, loaded, tmp_path):
    with pytest.raises(InputError, match="preprocess must say"):
        run(str(folder), loaded.model, tmp_path / "out")
    assert run(str(folder), loaded.model, tmp_path / "out", preprocess=loaded.preprocess).complete


def test_preprocessing_of_an_own_class_is_refused(folder, loaded, tmp_path):
    class Inverted(Preprocess):
        def __call__(self, image):
            pixels, shown = super().__call__(image)
            return -pixels, shown

    with pytest.raises(InputError, match=r"^preprocess must be a Preprocess itself, .*, got a .*Inverted$"):
        run(str(folder), loaded, tmp_path / "out", preprocess=Inverted(24))
    assert not (tmp_path / "out").exists()


def test_the_model_is_left_as_it_came(folder, loaded, tmp_path):
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    explainer = Saliency(loaded.model)
    run(str(folder), loaded, tmp_path / "out", method=explainer)
    assert "record" not in vars(explainer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in loaded.model.state_dict().items())
    assert not loaded.model._forward_hooks


def test_decoding_runs_ahead_of_the_model_and_not_too_far(loaded, tmp_path):
    requests, explained, ahead = [], [], []

    class Counting:
        def __len__(self):
            return 200

        def __getitem__(self, index):
            requests.append(index)
            return torch.full((3, 8, 8), float(index))

    def mood(images):
        time.sleep(0.005)
        ahead.append(len(requests) - sum(explained))
        explained.append(len(images))

    run(Counting(), loaded, tmp_path / "out", method=Moody(loaded.model, mood), batch_size=5, shard_size=50, workers=2)
    # A batch of its own, and room for two more and for two images a worker; and across the border of a part.
    assert max(ahead) <= 3 * 5 + 2 * 2 + 2
    assert max(ahead) > 5


def test_slow_methods_show_no_bar_a_batch(folder, loaded, tmp_path):
    explainer = datasets.prepare(str(folder), loaded, method="fgvis", out=tmp_path / "out").explainer
    assert explainer.progress is False
