"""What came from elsewhere runs nothing, escapes no folder and no page, whichever door it comes in by."""

import io
import json
import os
import pickle
import re
import sys
import tarfile
import warnings
import zipfile

import pytest
import torch
from PIL import Image

pytest.importorskip("pyarrow")

from pyfast_xai import datasets, demo
from pyfast_xai.datasets.attachments import attached
from pyfast_xai.datasets.folders import run_folder
from pyfast_xai.datasets.manifest import NAME, read_document
from pyfast_xai.datasets.schema import COLUMNS

INPUT = ("--size", 96, "--mean", "0,0,0", "--std", "1,1,1")


class Trap:
    """Leaves a folder behind when it is unpickled."""

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return os.mkdir, (self.mark,)


def program(path, inputs=None):
    """The network of the demo, exported; `inputs` takes the place of the pickle of its example inputs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dynamic = ({0: torch.export.Dim.DYNAMIC},)
        whole = torch.export.export(demo.load(), (torch.rand(2, 3, 96, 96),), dynamic_shapes=dynamic)
        torch.export.save(whole, path)
    if inputs is not None:
        with zipfile.ZipFile(path) as archive:
            parts = {name: archive.read(name) for name in archive.namelist()}
        (name,) = (name for name in parts if "sample_inputs" in name and name.endswith("model.pt"))
        sink = io.BytesIO()
        torch.save(inputs, sink)
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for item, content in (parts | {name: sink.getvalue()}).items():
                archive.writestr(item, content)


def scripted(path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(demo.load(), torch.rand(1, 3, 96, 96)), path)


EVIL = {
    "evil.pt": lambda path, trap: torch.save({"weight": torch.zeros(3), "trap": trap}, path),
    "evil.pth": lambda path, trap: torch.save(trap, path, _use_new_zipfile_serialization=False),
    "evil.pkl": lambda path, trap: path.write_bytes(pickle.dumps(trap, protocol=2)),
    "evil.pt2": program,
}
WHOLE = {"whole.pt": lambda path: torch.save(demo.load(), path), "whole.pt2": program, "script.pt": scripted}


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """Whole models, and files that are none and leave a mark where they are loaded."""
    saved = tmp_path_factory.mktemp("saved")
    for name, write in EVIL.items():
        write(saved / name, Trap(saved / "mark"))
    for name, write in WHOLE.items():
        write(saved / name)
    return saved


@pytest.fixture
def mark(saved):
    """There once something ran that should not."""
    yield saved / "mark"
    if (saved / "mark").exists():
        (saved / "mark").rmdir()


@pytest.fixture
def commands(folder, tmp_path):
    """How each command is called that loads a model, but for the model."""
    truth, out = tmp_path / "annotations.json", ("--out", tmp_path / "out")
    truth.write_text(json.dumps([{"file": "0.png", "label": 1, "boxes": [[1, 1, 9, 9]]}]))
    return {
        "explain": ("explain", folder, *out, "--method", "eigen-cam"),
        "evaluate": ("evaluate", folder, *out, "--annotations", truth, "--methods", "eigen-cam"),
        "run": ("run", folder, *out),
    }  # fmt: skip


def told(result):
    return " ".join(result.output.split())


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("command", ["explain", "evaluate", "run"])
def test_nothing_that_is_not_trusted_runs(run, commands, saved, mark, tmp_path, command, name, monkeypatch):
    # PyTorch would run pickles by this wish of the environment where the caller says nothing.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = saved / name
    assert "must be trusted by --trust-model" in told(run(*commands[command], "--model", path, code=2))
    refused = told(run(*commands[command], "--model", "digits", "--weights", path, code=2))
    assert "must be safetensors or a saved state dict, got" in refused
    assert "--trust-model" in refused
    assert not mark.exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", EVIL)
@pytest.mark.parametrize("door", ["--model", "--weights"])
def test_what_is_trusted_does_run(run, commands, saved, mark, name, door):
    options = ("--model", saved / name) if door == "--model" else ("--model", "digits", "--weights", saved / name)
    # None of these holds a network; what they left shows that the door is the one that was opened.
    run(*commands["explain"], *options, "--trust-model", code=2)
    assert mark.exists()


@pytest.mark.parametrize("door", ["--model", "--weights"])
@pytest.mark.parametrize(
    ("command", "name"),
    [("explain", "whole.pt"), ("explain", "whole.pt2"), ("evaluate", "script.pt"), ("run", "whole.pt")],
)
def test_trusted_models(run, commands, saved, command, door, name):
    options = ("--model", saved / name) if door == "--model" else ("--model", "digits", "--weights", saved / name)
    assert "--trust-model" in told(run(*commands[command], *INPUT, *options, code=2))
    run(*commands[command], *INPUT, *options, "--trust-model")


@pytest.mark.parametrize("name", WHOLE)
def test_rows_are_those_of_the_network(run, folder, saved, tmp_path, name):
    options = ("--method", "fixations", "--set", "fixations.variant=paper")
    named = "pyfast_xai.demo:load"  # prepared as what a file holds is, which digits are not
    run("run", folder, "--model", named, *INPUT, *options, "--out", tmp_path / "named")
    run("run", folder, "--model", saved / name, *INPUT, *options, "--trust-model", "--out", tmp_path / "whole")
    rows = [[(row["target"], row["score"], row["points"], row["box"]) for row in datasets.open(tmp_path / out)]
            for out in ("named", "whole")]  # fmt: skip
    assert rows[0] == rows[1]
    assert any(points for _, _, points, _ in rows[0])


@pytest.fixture
def begun(run, folder, saved, tmp_path):
    """A run by a trusted model, with a row to try again; and a function that changes its manifest."""
    (folder / "1.png").write_bytes(b"")
    out = tmp_path / "out"
    run("run", folder, "--model", saved / "whole.pt", *INPUT, "--trust-model", "--out", out)

    def change(**request):
        noted = read_document(run_folder(out))
        noted["made"]["request"].update(request)
        (out / NAME).write_bytes(attached(json.dumps(noted).encode(), COLUMNS))

    return out, change


def test_trust_is_asked_for_each_time(run, folder, saved, begun):
    out, change = begun
    whole = saved / "whole.pt"
    noted = read_document(run_folder(out))
    assert not [key for part in (noted, noted["made"], noted["made"]["request"]) for key in part if "trust" in key]
    options = ("run", folder, "--model", whole, *INPUT, "--out", out)
    assert "must be trusted by --trust-model" in told(run(*options, code=2))
    run(*options, "--trust-model")
    assert "must be trusted by --trust-model" in told(run("retry", out, code=2))
    assert "must be trusted by --trust-model" in told(run("retry", out, "--model", whole, code=2))
    assert "model must be named again where it is trusted" in told(run("retry", out, "--trust-model", code=2))
    run("retry", out, "--model", whole, "--trust-model", code=3)
    change(weights=str(whole))
    options = ("retry", out, "--model", whole, "--trust-model")
    assert "weights must be named again where they are trusted" in told(run(*options, code=2))
    run(*options, "--weights", whole, code=3)


@pytest.mark.parametrize("name", EVIL)
def test_a_manifest_is_not_believed(run, begun, saved, mark, name):
    out, change = begun
    written, whole = (out / NAME).read_bytes(), saved / "whole.pt"
    for requests in ({"model": str(saved / name)}, {"model": "digits", "weights": str(saved / name)}):
        change(**requests)
        for more in ((), ("--trust-model",), ("--model", whole), ("--model", "digits")):
            run("retry", out, *more, code=2)
        (out / NAME).write_bytes(written)
    change(model=str(saved / name), trust_model=True)
    run("retry", out, code=2)
    for place in (lambda told: told["made"], lambda told: told, lambda told: told["model"]):
        noted = read_document(run_folder(out))
        place(noted).update(trust=True, trust_model=True)
        noted["made"]["request"]["model"] = str(saved / name)
        (out / NAME).write_bytes(attached(json.dumps(noted).encode(), COLUMNS))
        run("retry", out, code=2)
        (out / NAME).write_bytes(written)
    assert not mark.exists()


def test_a_changed_file_is_another_model(run, folder, tmp_path, begun):
    """The same weights in another file, which may do other things with them."""
    out, _ = begun
    torch.save({"model": demo.load(), "epoch": 3}, tmp_path / "whole.pt")
    options = ("run", folder, "--model", tmp_path / "whole.pt", *INPUT, "--trust-model", "--out", out)
    assert "must be continued as it was begun" in told(run(*options, code=2))


def test_how_to_go_on_says_who_was_trusted(run, folder, saved, tmp_path, monkeypatch):

    def full(old, new):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    options = ("run", folder, "--model", saved / "whole.pt", *INPUT, "--out", tmp_path / "out")
    last = run(*options, "--trust-model", code=1).stderr.strip().splitlines()[-1]
    assert last.startswith(f"resume  pyfast-xai run {folder} --model {saved}/whole.pt ")
    assert last.endswith(" --trust-model --out " + str(tmp_path / "out"))


def test_a_module_that_was_not_named_is_not_imported(run, commands, tmp_path, mark, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "whole_net.py").write_text(f"import os\nos.mkdir({str(mark)!r})\nnet = None\n")
    for options in ("whole_net", "torchvision/whole_net:net", "timm/whole_net:net", "whole_net.py"):
        run(*commands["explain"], "--model", options, code=2)
    assert "whole_net" not in sys.modules
    assert not mark.exists()


def test_a_tar_stays_where_it_is(run, tmp_path, scenes, mark):
    """Members that lead elsewhere, links, pickles: rows or nothing, and no file outside of the run's folder."""
    picture = io.BytesIO()
    Image.fromarray((scenes.images[0] * 255).byte().permute(1, 2, 0).numpy()).save(picture, "PNG")
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture.getvalue())
    trap = pickle.dumps(Trap(mark))
    place = tmp_path / "in"
    place.mkdir()
    with tarfile.open(place / "evil.tar", "w") as tar:

        def add(name, content=b"", **what):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            for key, value in what.items():
                setattr(member, key, value)
            tar.addfile(member, io.BytesIO(content))

        for name in ("../../escaped.png", f"{tmp_path}/absolute.png", "a/../../b.png", "fine.png"):
            add(name, picture.getvalue())
        for name in ("c.pkl", "c.pth", "c.pyd", "c.cls", "c.json"):
            add(name, trap)
        add("link.png", type=tarfile.SYMTYPE, linkname=str(secret))
        add("hard.png", type=tarfile.LNKTYPE, linkname="../secret.png")
    before = set(tmp_path.rglob("*"))
    out = tmp_path / "out"
    run("run", place / "evil.tar", "--model", "digits", "--out", out)
    after = {path for path in tmp_path.rglob("*") if out not in (path, *path.parents)}
    assert after == before
    assert not mark.exists()
    rows = [dict(row) for row in datasets.open(out)]
    assert [row["status"] for row in rows if ".png" in row["id"] and "link" not in row["id"]].count("ok") == 4
    assert not any(row["status"] == "ok" for row in rows if "link" in row["id"] or "hard" in row["id"])
    for kind, made in (("webdataset", "tars"), ("csv", "rows.csv")):
        run("export", out, "--to", kind, "--out", tmp_path / made)
    for path in (tmp_path / "tars").glob("*.tar"):
        with tarfile.open(path) as tar:
            assert tar.getnames()
            assert not any(".." in name.split("/") or name.startswith("/") for name in tar.getnames())


def test_a_page_says_names_and_runs_none(run, folder, tmp_path):
    odd = '"><img src=x onerror=alert(1)><script>alert(2)<!script>.png'
    (folder / "0.png").rename(folder / odd)
    (folder / f"bad{odd}").write_bytes(b"")
    run("run", folder, "--model", "digits", "--out", tmp_path / "out")
    run("report", tmp_path / "out", "--out", tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "onerror=alert(1)" in page
    assert not re.search(r"<img src=x|<script>alert", page)
