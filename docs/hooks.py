"""Hooks of MkDocs: pages that are made from the source, so that no list of names is written twice.

Modules are parsed, never imported: building the site needs neither torch nor a compiled library.
"""

import ast
import json
from pathlib import Path

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
EXPLAINERS = "pyfast_xai.explainers"
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
# Modules whose public names have a page, in the order of the navigation.
TITLES = {
    "pyfast_xai.explanation": "Explanation",
    "pyfast_xai.models": "Models",
    "pyfast_xai.zero_shot": "Image-text models",
    "pyfast_xai.segmentation": "Segmenters",
    "pyfast_xai.images": "Photographs",
    "pyfast_xai.render": "Pictures",
    "pyfast_xai.localize": "Boxes",
    "pyfast_xai.metrics": "Metrics",
    "pyfast_xai.evaluation": "Evaluation",
    "pyfast_xai.datasets": "Large data sets",
    "pyfast_xai.report": "Reports",
    "pyfast_xai.serve": "Servers",
    "pyfast_xai.demo": "Demo",
    "pyfast_xai.errors": "Errors",
    "pyfast_xai.memory": "Memory",
    "pyfast_xai.tape": "Tape",
    "pyfast_xai.rules.gradient": "Gradient rules",
    "pyfast_xai.rules.evidence": "Evidence rules",
    "pyfast_xai.rules.relevance": "Relevance rules",
    "pyfast_xai.ops": "Ops",
    "pyfast_xai.tuning": "Tuning",
    "pyfast_xai.compat.captum": "Drop-in for Captum",
    "pyfast_xai.compat.grad_cam": "Drop-in for pytorch-grad-cam",
    "pyfast_xai.compat.torchcam": "Drop-in for torch-cam",
    "pyfast_xai.compat.zennit": "Drop-in for zennit",
}
# Where a file of explainers has another title than its name.
FAMILIES = {
    "ablation_cam": "Ablation-CAM",
    "activation_cams": "CAMs of activations alone",
    "backprop": "Gradients",
    "cam": "Class activation maps",
    "clear": "CLEAR",
    "crp": "CRP",
    "common.explainer": "Explainer",
    "consensus": "Consensus",
    "deep_lift": "DeepLIFT",
    "drise": "D-RISE",
    "eigen_cam": "Eigen-CAM",
    "dff": "Deep feature factorization",
    "excitation": "Excitation backprop",
    "fgvis": "FGVis",
    "finer_cam": "Finer-CAM",
    "fixations": "CNN-Fixations",
    "forgrad": "FORGrad",
    "full_grad": "FullGrad",
    "hsic": "HSIC",
    "attention": "Attention",
    "lime": "LIME",
    "lrp": "LRP",
    "path_methods": "Gradients on a path",
    "rise": "RISE",
    "score_cam": "Score-CAM",
    "sess": "SESS",
    "shapley": "Shapley values",
    "smooth_grad_cam": "Smooth Grad-CAM++",
    "xrai": "XRAI",
}
# Modules of which the package's own names are public, and these.
PARTLY = {
    "pyfast_xai.explanation": [],
    "pyfast_xai.models": ["LoadedModel"],
    "pyfast_xai.images": ["ImageError"],
    "pyfast_xai.zero_shot": [],
    "pyfast_xai.segmentation": [],
    "pyfast_xai.memory": [],
}
# What explainers take beside their own arguments.
SETTINGS = [
    f"{EXPLAINERS}.common.explainer.Settings",
    f"{EXPLAINERS}.common.layer_explainer.LayerSettings",
    f"{EXPLAINERS}.common.perturbation_explainer.PerturbationSettings",
    f"{EXPLAINERS}.common.feature_explainer.FeatureSettings",
]
# Files outside docs/ to which pages link.
LINKED = (
    *("examples/detections.py", "examples/serve_fastapi.py", "examples/huggingface_pipeline.py"),
    "pyfast_xai/reproduce/tuning_pictures.txt",
)


def on_config(config):
    """Fills the empty sections of the navigation."""
    sections = {
        "API reference": [
            {"All names": "api/index.md"},
            *({title: place} for place, (title, _) in api_pages().items()),
        ],
        "Notebooks": [f"notebooks/{path.stem}.md" for path in NOTEBOOKS],
        "Decisions": [f"decisions/{path.name}" for path in sorted((ROOT / "docs/decisions").glob("*.md"))],
    }
    config.nav = _filled(config.nav, sections)
    return config


def on_files(files, config):
    """Adds the pages that no file holds, and the files that pages link to."""
    pages = {place: _api_page(title, names) for place, (title, names) in api_pages().items()}
    pages["api/index.md"] = _all_names()
    pages["changelog.md"] = (ROOT / "CHANGELOG.md").read_text().replace("](docs/", "](")
    for path in NOTEBOOKS:
        pages[f"notebooks/{path.stem}.md"] = _notebook(path)
    for place, text in pages.items():
        files.append(File.generated(config, place, content=text))
    for name in LINKED:
        files.append(File.generated(config, name, content=(ROOT / name).read_bytes()))
    return files


def on_page_markdown(markdown, page, config, files):
    """Turns links to files of the repository into links to those of the site."""
    above = "../" * page.file.src_uri.count("/")
    for name in LINKED:
        markdown = markdown.replace(f"](../{above}{name})", f"]({above}{name})")
    return markdown


def api_pages():
    """Returns the title and the full names on each page of the API by its place, `api/<module>.md`."""
    homes = _imports("pyfast_xai.explainers")
    pages = {}
    for name, module in _imports("pyfast_xai").items():
        home = homes.get(name, f"{EXPLAINERS}.common.explainer") if module == EXPLAINERS else module
        pages.setdefault(home, []).append(f"pyfast_xai.{name}")
    for module in TITLES:
        inside = [f"{module}.{name}" for name in PARTLY.get(module, _public(module))]
        known = {full.rpartition(".")[2] for full in pages.get(module, [])}
        pages.setdefault(module, []).extend(full for full in inside if full.rpartition(".")[2] not in known)
    pages[f"{EXPLAINERS}.common.explainer"].extend(SETTINGS)
    families = sorted((module for module in pages if module not in TITLES), key=_title)
    return {
        f"api/{module.removeprefix('pyfast_xai.')}.md": (_title(module), pages[module])
        for module in [*families, *TITLES]
    }


def _title(module):
    if module in TITLES:
        return TITLES[module]
    stem = module.removeprefix(f"{EXPLAINERS}.")
    return FAMILIES.get(stem, stem.replace("_", " ").capitalize())


def _api_page(title, names):
    return "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)])


def _all_names():
    lines = [
        "# API reference",
        "Everything that a user calls. Names under `pyfast_xai` are imported from the package itself.",
    ]
    for title, names in api_pages().values():
        lines.append(f"- **{title}**: " + ", ".join(f"[`{name.rpartition('.')[2]}`][{name}]" for name in names))
    return "\n\n".join(lines)


def _notebook(path):
    """Returns a notebook as a page, with what `docs/notebooks/run.py` kept of its outputs."""
    texts = json.loads(path.with_suffix(".json").read_text())
    parts = []
    for number, cell in enumerate(json.loads(path.read_text())["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        if text := texts.get(str(number)):
            parts.append(f"```text\n{text.rstrip()}\n```")
        if path.with_name(f"{path.stem}-{number}.jpg").exists():
            parts.append(f"![Output of the code above]({path.stem}-{number}.jpg)")
    title, *rest = parts
    heading, _, introduction = title.partition("\n")
    download = f"[Download this notebook]({path.name})"
    return "\n\n".join([heading, introduction.strip(), download, *rest])


def _tree(module):
    path = ROOT.joinpath(*module.split("."))
    return ast.parse((path / "__init__.py" if path.is_dir() else path.with_suffix(".py")).read_text())


def _imports(module):
    """Returns the module from which a module imports each name, also for type checkers alone."""
    return {
        alias.asname or alias.name: node.module
        for node in ast.walk(_tree(module))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("pyfast_xai")
        for alias in node.names
    }


def _public(module):
    """Returns `__all__` of a module, else the classes and functions that it defines, sorted."""
    body = _tree(module).body
    for node in body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return sorted(ast.literal_eval(node.value))
    defined = (node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef))
    return sorted(name for name in defined if not name.startswith("_"))


def _filled(entries, sections):
    """Returns the navigation with each section that is empty in it filled."""
    filled = []
    for entry in entries:
        for title, below in entry.items():
            if isinstance(below, list):
                below = _filled(below, sections) if below else sections[title]
            filled.append({title: below})
    return filled
