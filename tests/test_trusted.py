"""Whole models from files: not without being trusted, and then the explanations of the module they were made from."""

import copy
import functools
import inspect
import pickle
import warnings
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from pyfast_xai.datasets.manifest import weights_digest
from pyfast_xai.errors import InputError
from pyfast_xai.explainers import METHODS
from pyfast_xai.models import load_model, read_weights

SIDE = 24


class Net(nn.Module):
    """Modules with paths, a branch, and a view that the batch must survive."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(inplace=True)),
        )
        self.side = nn.Conv2d(8, 8, 1, groups=2)
        self.dropout = nn.Dropout()
        self.classifier = nn.Linear(8, 5)

    def forward(self, x):
        x = self.features(x)
        x = x + torch.relu(self.side(x))
        return self.classifier(self.dropout(torch.flatten(x.mean((2, 3)), 1)))


class Mixing(Net):
    """Its answers depend on who else is in the batch."""

    def forward(self, x):
        answers = super().forward(x)
        return answers - answers.mean(0)


class Keyword(Net):
    def forward(self, *, x):
        return super().forward(x)


class Written(Net):
    """The length of the batch is written into the program."""

    def forward(self, x):
        return super().forward(x.reshape(x.shape[0], 3, SIDE, SIDE) + torch.zeros(x.shape[0], 3, 1, 1))


def made(kind=Net):
    torch.manual_seed(0)
    net = kind()
    net.features[1].running_mean.uniform_(-0.2, 0.2)
    return net.eval()


IMAGES = torch.rand(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))
ANY = torch.export.Dim.DYNAMIC


def quiet(save):
    """Without what PyTorch has to say about the future of TorchScript and of its exporter."""

    @functools.wraps(save)
    def call(*args, **kwargs):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return save(*args, **kwargs)

    return call


@quiet
def exported(net, path, images=IMAGES[:1], **how):
    torch.export.save(torch.export.export(net, (images,), **how), path)


@quiet
def scripted(net, path, change=lambda archive: archive):
    torch.jit.save(change(torch.jit.script(net)), path)


@quiet
def traced(net, path):
    torch.jit.save(torch.jit.trace(net, IMAGES[:1]), path)


def dynamic(*lengths):
    return {"images": IMAGES[:2], "dynamic_shapes": (dict.fromkeys(lengths, ANY),)}


SAVED = {
    "pickle": ("net.pt", torch.save),
    "old pickle": ("old.pth", lambda net, path: torch.save(net, path, _use_new_zipfile_serialization=False)),
    "in a dict": ("last.ckpt", lambda net, path: torch.save({"model": net, "epoch": 3}, path)),
    "scripted": ("scripted.pt", scripted),
    "traced": ("traced.pt", traced),
    "one image": ("one.pt2", exported),
    "two images": ("two.pt2", lambda net, path: exported(net, path, IMAGES[:2])),
    "any batch": ("any.pt2", lambda net, path: exported(net, path, **dynamic(0))),
    "any size": ("size.pt2", lambda net, path: exported(net, path, **dynamic(0, 2, 3))),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same network in every form."""
    folder = tmp_path_factory.mktemp("saved")
    for name, save in SAVED.values():
        save(made(), folder / name)
    return {kind: str(folder / name) for kind, (name, _) in SAVED.items()}


def explain(model, method, **settings):
    used = inspect.signature(METHODS[method]).parameters
    options = {key: value for key, value in {"progress": lambda *_: None, "n_steps": 4}.items() if key in used}
    return METHODS[method](model, **{**options, **settings})(IMAGES, None if method == "eigen-cam" else 2)


def same(a, b):
    assert torch.equal(a.heatmap, b.heatmap)
    assert (a.points is None) == (b.points is None)
    if a.points is not None:
        assert all(torch.equal(one, other) for one, other in zip(a.points, b.points, strict=True))
    if a.score is not None:
        assert torch.equal(a.score, b.score)


@pytest.mark.parametrize("kind", SAVED)
def test_trusted_files_explain_as_the_module_does(files, kind):
    net, loaded = made(), load_model(files[kind], trust=True)
    assert torch.equal(loaded.model(IMAGES), net(IMAGES))
    # Three times: TorchScript runs otherwise once it knows what it is given.
    for method in (*("eigen-cam", "fixations", "saliency") * 3, "guided-backprop", "grad-cam", "integrated-gradients"):
        same(explain(loaded.model, method), explain(net, method))
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.labels is None


@pytest.mark.parametrize("kind", SAVED)
def test_sizes_and_names(files, kind):
    loaded = load_model(files[kind], trust=True)
    known = kind in ("one image", "two images", "any batch")
    assert loaded.preprocess.shape == ((SIDE, SIDE) if known else (224, 224))
    name, _, digest = loaded.name.partition("@")
    assert (name, len(digest)) == (SAVED[kind][0], 12)
    assert load_model(files[kind], trust=True).name == loaded.name
    # A run that goes on sees the same network.
    assert weights_digest(load_model(files[kind], trust=True).model) == weights_digest(loaded.model)


@pytest.mark.parametrize("kind", ["one image", "any batch"])
@pytest.mark.parametrize("layer", ["features.3", "features", "side"])
def test_layers_of_a_program_have_their_paths(files, kind, layer):
    loaded = load_model(files[kind], trust=True)
    for method in ("eigen-cam", "grad-cam"):
        same(explain(loaded.model, method, layer=layer), explain(made(), method, layer=layer))


@pytest.mark.parametrize("kind", SAVED)
def test_copies(files, kind):
    model = load_model(files[kind], trust=True).model
    same(explain(quiet(copy.deepcopy)(model), "saliency"), explain(made(), "saliency"))
    if not kind.endswith(("image", "images", "batch", "size")):
        same(explain(pickle.loads(pickle.dumps(model)), "eigen-cam"), explain(made(), "eigen-cam"))


def test_the_model_is_unchanged_where_its_forward_is_ended_early(files):
    model = load_model(files["scripted"], trust=True).model
    before = copy.deepcopy(model.state_dict())
    explain(model, "eigen-cam")
    with pytest.raises(InputError, match="layer"):
        explain(model, "eigen-cam", layer="nowhere")
    assert all(torch.equal(before[key], tensor) for key, tensor in model.state_dict().items())


def test_errors_within_an_archive_stay_errors(files):
    model = load_model(files["scripted"], trust=True).model
    with pytest.raises(RuntimeError, match="channels"):
        model(torch.rand(1, 4, SIDE, SIDE))


@pytest.mark.parametrize("kind", SAVED)
def test_without_trust_nothing_is_loaded(files, kind, monkeypatch):
    for loader in (torch.jit, torch.export):
        monkeypatch.setattr(loader, "load", None)
    monkeypatch.setattr("pyfast_xai.trusted.read", None)
    with pytest.raises(InputError, match=r"must be trusted by --trust-model \(trust=True\)"):
        load_model(files[kind])
    with pytest.raises(InputError, match=r"must be safetensors or a saved state dict, got .*--trust-model"):
        read_weights(files[kind])


@pytest.mark.parametrize("kind", SAVED)
def test_weights_of_a_trusted_file(files, kind):
    state, actual = read_weights(files[kind], trust=True), made().state_dict()
    assert state.keys() == actual.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in actual.items())


def test_checkpoint_with_more_than_tensors(tmp_path, monkeypatch):
    class Settings:
        pass

    monkeypatch.setattr(inspect.getmodule(Net), "Settings", Settings, raising=False)
    Settings.__qualname__ = "Settings"
    net = nn.DataParallel(made())
    torch.save({"state_dict": net.state_dict(), "settings": Settings()}, tmp_path / "epoch.ckpt")
    with pytest.raises(InputError, match=r"a pickle with more than tensors \(.*Settings\), which --trust-model"):
        read_weights(tmp_path / "epoch.ckpt")
    assert read_weights(tmp_path / "epoch.ckpt", trust=True).keys() == made().state_dict().keys()


def test_weights_on_top_of_a_whole_model(files, tmp_path):
    other = made()
    nn.init.normal_(other.classifier.weight)
    save_file(other.state_dict(), tmp_path / "other.safetensors")
    for kind in ("pickle", "any batch"):
        loaded = load_model(files[kind], tmp_path / "other.safetensors", trust=True)
        assert torch.equal(loaded.model(IMAGES), other(IMAGES))


@pytest.mark.parametrize("trust", [True, False])
def test_files_of_tensors_are_read_as_such_also_where_they_are_trusted(tmp_path, monkeypatch, trust):
    monkeypatch.setattr("pyfast_xai.trusted.read", None)
    torch.save(made().state_dict(), tmp_path / "net.pt")
    save_file(made().state_dict(), tmp_path / "net.safetensors")
    for name in ("net.pt", "net.safetensors"):
        assert read_weights(tmp_path / name, trust=trust).keys() == made().state_dict().keys()
    torch.save(made(), tmp_path / "lie.safetensors")
    with pytest.raises(InputError, match="must be safetensors"):
        read_weights(tmp_path / "lie.safetensors", trust=trust)


def test_programs_check_the_size_of_images(files):
    model = load_model(files["one image"], trust=True).model
    with pytest.raises(InputError, match=r"exported for, \[any, 3, 24, 24\], got \[1, 3, 24, 25\]"):
        METHODS["eigen-cam"](model)(torch.rand(1, 3, 24, 25))


def test_a_program_for_so_many_images_at_most(tmp_path):
    exported(made(), tmp_path / "few.pt2", IMAGES, dynamic_shapes=({0: torch.export.Dim("batch", max=8)},))
    model = load_model(str(tmp_path / "few.pt2"), trust=True).model
    assert torch.equal(model(IMAGES[:1]), made()(IMAGES[:1]))
    with pytest.raises(InputError, match=r"\[0 to 8, 3, 24, 24\], got \[9, 3, 24, 24\]"):
        model(torch.rand(9, 3, SIDE, SIDE))


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda path: exported(made(Mixing), path), "must be exported for any number of images .*, got one for 1"),
        (lambda path: exported(made(Written), path, IMAGES[:2]), "must be exported for any number of images"),
        (lambda path: exported(made().train(), path, IMAGES), r"after model.eval\(\), got .*batch_norm.* in training"),
        (
            lambda path: torch.export.save(torch.export.export(made(Keyword), (), {"x": IMAGES}), path),
            r"must take images \[N, C, H, W\] and nothing else",
        ),
        (
            lambda path: torch.export.save(torch.export.export(nn.Linear(4, 2).eval(), (torch.rand(3, 4),)), path),
            r"must take images \[N, C, H, W\] and nothing else",
        ),
        (
            lambda path: scripted(made(), path, torch.jit.freeze),
            "must be saved before torch.jit.freeze",
        ),
        (lambda path: torch.save(made().state_dict(), path), "must hold a torch.nn.Module, got a OrderedDict; "),
        (lambda path: torch.save([1], path), "must hold a torch.nn.Module, got a list"),
        (lambda path: path.write_bytes(b"no model"), "must be a pickle that can be loaded here, got UnpicklingError"),
        (lambda path: zipfile.ZipFile(path, "w").writestr("m/archive_format", "pt2"), "must be an exported program"),
        (lambda path: zipfile.ZipFile(path, "w").writestr("m/constants.pkl", "x"), "must be a TorchScript archive"),
    ],
)  # fmt: skip
def test_what_cannot_be_explained_is_refused(tmp_path, save, message):
    path = tmp_path / "net.pt2"
    save(path)
    with pytest.raises(InputError, match=message) as caught:
        load_model(str(path), trust=True)
    assert "\n" not in str(caught.value)


def test_pickle_of_a_class_that_is_not_here(tmp_path, monkeypatch):
    (tmp_path / "own_classes.py").write_text("import torch\nclass Own(torch.nn.Linear): pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    actual = __import__("own_classes")
    torch.save(actual.Own(3, 2), tmp_path / "net.pt")
    monkeypatch.undo()
    monkeypatch.delitem(__import__("sys").modules, "own_classes")
    with pytest.raises(InputError, match="got ModuleNotFoundError: No module named 'own_classes'"):
        load_model(str(tmp_path / "net.pt"), trust=True)
    monkeypatch.chdir(tmp_path)  # the working folder is searched
    assert isinstance(load_model("net.pt", trust=True).model, nn.Linear)
    __import__("sys").modules.pop("own_classes")


def test_the_number_of_classes_is_that_of_the_file(files):
    with pytest.raises(InputError, match="num_classes must be None"):
        load_model(files["pickle"], num_classes=3, trust=True)
