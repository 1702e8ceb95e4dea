import measured
import pytest

import pyfast_xai

NETWORKS = (
    *("alexnet", "vgg16", "googlenet", "resnet50", "resnet101"),
    *("densenet121", "mobilenet_v2", "vit_b_16"),
)
MEASURED = pytest.StashKey[dict[str, list[measured.Row]]]()
FREED = ("kept", "given back")


def pytest_addoption(parser):
    parser.addoption("--rows", action="store_true", help="append what was measured to the files in bench/data")
    parser.addoption("--networks", default=",".join(NETWORKS), help="of torchvision, separated by commas")
    parser.addoption("--batches", default="8", help="images at a time, separated by commas")
    parser.addoption(
        "--freed",
        choices=FREED,
        default=FREED[0],
        help="what becomes of freed memory, of models and peers, too: glibc's default is to give it back, and how much "
        "of it goes depends on all that the process did before",
    )
    parser.addoption("--rounds", type=int, default=7, help="pairs of forward and explanation that are timed")


def pytest_configure(config):
    config.stash[MEASURED] = {"cpu": [], "cpu_growth": [], "cpu_ops": []}
    if config.getoption("--freed") == "kept" and not pyfast_xai.keep_freed_memory():
        raise pytest.UsageError("--freed kept needs glibc: give --freed 'given back'")


def pytest_generate_tests(metafunc):
    if "network" in metafunc.fixturenames:
        names, batches = (metafunc.config.getoption(name).split(",") for name in ("--networks", "--batches"))
        cases = [(name, int(batch)) for name in names for batch in batches]
        metafunc.parametrize("network", cases, ids=[f"{n}-{b}" for n, b in cases], indirect=True, scope="module")


@pytest.fixture(scope="session")
def rows(request):
    """Rows of explanations."""
    return request.config.stash[MEASURED]["cpu"]


@pytest.fixture(scope="session")
def growth_rows(request):
    """Rows of explanations along an axis."""
    return request.config.stash[MEASURED]["cpu_growth"]


@pytest.fixture(scope="session")
def op_rows(request):
    """Rows of ops."""
    return request.config.stash[MEASURED]["cpu_ops"]


def pytest_sessionfinish(session):
    if session.config.getoption("--rows"):
        for name, rows in session.config.stash[MEASURED].items():
            if rows:
                freed = {"freed": session.config.getoption("--freed")}
                measured.append(name, [freed | row for row in rows])


def pytest_terminal_summary(terminalreporter, config):
    shown = {
        "cpu": ("network", "batch", "method", "backend", "forwards", "low", "high", "explain_ms", "forward_ms"),
        "cpu_growth": ("axis", "value", "network", "method", "backend", "forwards", "low", "high", "explain_ms"),
        "cpu_ops": ("op", "shape", "backend", "ms", "beside", "times", "low", "high", "share", "bound"),
    }
    for name, rows in config.stash[MEASURED].items():
        if rows:
            where = measured.taken()
            freed = config.getoption("--freed")
            terminalreporter.section(
                f"{where['cpu']}, {where['threads']} threads, torch {where['torch']}, freed memory {freed}"
            )
            cells = [[_cell(row.get(column, "")) for column in shown[name]] for row in rows]
            terminalreporter.write_line(measured.table([shown[name], *cells]))


def _cell(value):
    return f"{value:.3g}" if isinstance(value, float) else str(value)
