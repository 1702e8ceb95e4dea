"""The same rows on Ray as in one process, also where a worker or the driver is killed; one cluster serves all tests."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from pyfast_xai import datasets
from pyfast_xai.datasets.on_ray import explain_on_ray
from pyfast_xai.errors import InputError
from pyfast_xai.images import Preprocess
from pyfast_xai.models import load_model

ray = pytest.importorskip("ray")
# One worker of pytest-xdist runs them all, so that there is one cluster.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("ray"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray.data.context"),  # of settings that Ray sets itself
]

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module")
def cluster():
    """The address of a Ray cluster of two cores on this machine, to which this process belongs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(FOLDER), *filter(None, sys.path)]))
        patch.syspath_prepend(FOLDER)
        context = ray.init(
            num_cpus=2,
            object_store_memory=100 << 20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
        )
        yield context.address_info["address"]
        ray.shutdown()


@pytest.fixture
def job(cluster):
    """The module of a run on Ray, which the workers of the cluster import by its name."""
    import ray_job

    return ray_job


@pytest.fixture
def many(folder, tmp_path):
    """A hundred pictures, and two files that are none."""
    many = tmp_path / "many"
    many.mkdir()
    for n in range(100):
        os.link(folder / f"{n % 20:02d}.{('png', 'jpg')[n % 2]}", many / f"{n:03}.{('png', 'jpg')[n % 2]}")
    (many / "bad.png").write_bytes(b"no picture")
    (many / "empty.jpg").write_bytes(b"")
    return many


@pytest.fixture
def expected(job, many, tmp_path):
    """The summary of a run in this process, and its rows."""
    done = datasets.explain(str(many), job.network(), out=tmp_path / "plain", **job.RUN)
    return done, rows(tmp_path / "plain")


@pytest.fixture
def start(cluster, job, many, tmp_path):
    """Starts a driver in a process of its own."""

    def start():
        command = [sys.executable, job.__file__, str(many), str(tmp_path / "out"), cluster]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start


def rows(out):
    return [{k: v for k, v in row.items() if not k.endswith("_ms")} for row in datasets.open(out)]


def parts(out):
    return len(list(out.glob("part-*.parquet")))


def wait_for_parts(process, out, count):
    while process.poll() is None and parts(out) < count:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()


def is_below(process, ancestor):
    """Returns whether a process was started by another, or by one that this started."""
    while process > 1 and process != ancestor:
        try:
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return process == ancestor


def workers():
    """Returns the processes of the actors of runs on this cluster."""
    result = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                name = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if name.startswith("ray::MapWorker") and is_below(int(entry.name), os.getpid()):
                result.append(int(entry.name))
    return result


def test_a_killed_worker_and_a_killed_driver_cost_no_row(start, tmp_path, expected):
    out = tmp_path / "out"
    driver = start()
    wait_for_parts(driver, out, 2)
    os.kill(workers()[0], signal.SIGKILL)
    wait_for_parts(driver, out, parts(out) + 2)
    driver.kill()
    driver.communicate()
    assert 0 < parts(out) < 26
    while workers():  # they end when the cluster notices
        time.sleep(0.05)
    before = sum(1 for _ in datasets.open(out))
    done, errors = start().communicate(timeout=240)
    total, result = map(int, done.split())
    assert total == 102, errors
    assert result >= before > 0
    assert rows(out) == expected[1]
    assert datasets.verify(out).faults == []


def test_the_same_rows_as_here(job, many, tmp_path, expected):
    here, expected = expected
    done = explain_on_ray(str(many), job.network(), out=tmp_path / "out", actors=2, cpus=0.5, **job.RUN)
    assert (done.rows, done.before) == (102, 0)
    assert rows(tmp_path / "out") == expected
    print(f"102 pictures: {here.progress.seconds:.1f} s here, {done.progress.seconds:.1f} s on Ray with its start")


def test_other_shards_go_on_beside_a_slow_one(job, tmp_path):
    out = tmp_path / "out"
    done = explain_on_ray(job.SlowAtFirst(out), job.network(), out=out, actors=2, cpus=0.5, **job.RUN)
    assert (done.rows, done.errors, done.before) == (24, 0, 0)
    assert parts(out) == 6
    assert datasets.verify(out).faults == []


def test_a_fault_of_the_method_is_raised_as_it_is(job, many, tmp_path):
    settings = {"method": "fixations", "method_settings": {"stop_layer": "nowhere"}, "shard_size": 50}
    with pytest.raises(InputError, match="nowhere"):
        explain_on_ray(str(many), job.network(), out=tmp_path / "out", actors=1, **settings)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_whole_models_on_ray(job, many, tmp_path):
    """Workers get the network from the driver, not from its file; a model that cannot be sent is refused."""
    network, images = job.network(), torch.rand(2, 3, 24, 24)
    settings = {"method": "eigen-cam", "shard_size": 51}
    torch.jit.save(torch.jit.trace(network.model, images), tmp_path / "net.pt")
    traced = load_model(str(tmp_path / "net.pt"), trust=True)
    (tmp_path / "net.pt").unlink()
    datasets.explain(many, network.model, preprocess=Preprocess(24), out=tmp_path / "plain", **settings)
    explain_on_ray(many, traced, preprocess=Preprocess(24), out=tmp_path / "out", actors=1, **settings)
    assert rows(tmp_path / "out") == rows(tmp_path / "plain")
    exported = torch.export.export(network.model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))
    torch.export.save(exported, tmp_path / "net.pt2")
    program = load_model(str(tmp_path / "net.pt2"), trust=True)
    with pytest.raises(InputError, match="model must be one that can be sent to workers"):
        explain_on_ray(many, program, out=tmp_path / "none", actors=1, **settings)
    assert not parts(tmp_path / "none")
