"""The same rows on Ray as in one process, also where a worker or the driver is killed."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyfast_xai import datasets

pytestmark = pytest.mark.slow
pytest.importorskip("ray")

JOB = Path(__file__).with_name("ray_job.py")
ENVIRONMENT = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def many(folder, tmp_path):
    """A hundred pictures, two of them bad."""
    many = tmp_path / "many"
    many.mkdir()
    for n in range(100):
        os.link(folder / f"{n % 20:02d}.{('png', 'jpg')[n % 2]}", many / f"{n:03}.{('png', 'jpg')[n % 2]}")
    (many / "bad.png").write_bytes(b"no picture")
    (many / "empty.jpg").write_bytes(b"")
    return many


def start(many, out):
    command = [sys.executable, str(JOB), str(many), str(out)]
    return subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def parts(out):
    return len(list(out.glob("part-*.parquet")))


def wait_for_parts(process, out, count):
    while process.poll() is None and parts(out) < count:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()


def is_below(process, ancestor):
    """Whether a process was started by another, or by one that this started."""
    while process > 1 and process != ancestor:
        try:
            process = int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            return False
    return process == ancestor


def lives(process):
    """Whether a process is there, and no zombie."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def workers(driver):
    """Processes of the actors of a driver."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                name = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:
                continue
            if name.startswith("ray::MapWorker") and is_below(int(entry.name), driver.pid):
                found.append(int(entry.name))
    return found


def rows(out):
    return [{k: v for k, v in row.items() if not k.endswith("_ms")} for row in datasets.open(out)]


@pytest.fixture
def expected(many, tmp_path):
    spec = importlib.util.spec_from_file_location("ray_job", JOB)
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    datasets.explain(str(many), job.network(), out=tmp_path / "plain", **job.RUN)
    return rows(tmp_path / "plain")


def ended(process):
    told, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return [int(number) for number in told.split()[-2:]]


def test_a_killed_worker_and_a_killed_driver_cost_no_row(many, tmp_path, expected):
    out = tmp_path / "out"
    driver = start(many, out)
    wait_for_parts(driver, out, 2)
    os.kill(workers(driver)[0], signal.SIGKILL)
    there = parts(out)
    wait_for_parts(driver, out, there + 2)
    left = workers(driver)
    driver.kill()
    driver.communicate()
    assert 0 < parts(out) < 26
    while any(map(lives, left)):  # they go once they notice
        time.sleep(0.1)
    before = sum(1 for _ in datasets.open(out))
    total, found = ended(start(many, out))
    assert total == 102
    assert found >= before > 0
    assert rows(out) == expected
    assert datasets.verify(out).faults == []


def test_other_shards_go_on_beside_a_slow_one(tmp_path):
    out = tmp_path / "out"
    assert ended(start("slow", out)) == [24, 0]
    assert parts(out) == 6
    assert {row["status"] for row in datasets.open(out)} == {"ok"}
    assert datasets.verify(out).faults == []


def test_the_same_rows_as_here(many, tmp_path, expected, record_property):
    driver = start(many, tmp_path / "out")
    told, errors = driver.communicate(timeout=240)
    assert driver.returncode == 0, errors
    seconds, total, before = told.split()[-3:]
    record_property("seconds_on_ray", float(seconds))
    assert (total, before) == ("102", "0")
    assert rows(tmp_path / "out") == expected


def test_a_fault_of_the_method_is_raised_as_it_is(many, tmp_path):
    code = (
        f"import sys; sys.path.insert(0, {str(JOB.parent)!r})\n"
        "from ray_job import *\n"
        f"try: explain_on_ray({str(many)!r}, network(), out={str(tmp_path / 'out')!r}, method='fixations',\n"
        "    method_settings={'stop_layer': 'nowhere'}, shard_size=50, actors=1)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "InputError" in done.stdout
    assert "nowhere" in done.stdout


def test_whole_models_on_ray(many, tmp_path):
    """Workers get the network from the driver, not its file; what cannot be sent is told in a sentence."""
    code = (
        f"import sys; sys.path.insert(0, {str(JOB.parent)!r})\n"
        "from ray_job import *\n"
        "from pathlib import Path\n"
        "from pyfast_xai import datasets\n"
        "from pyfast_xai.models import load_model\n"
        f"many, place = {str(many)!r}, Path({str(tmp_path)!r})\n"
        "images, settings = torch.rand(2, 3, 24, 24), {'method': 'eigen-cam', 'shard_size': 51}\n"
        "torch.jit.save(torch.jit.trace(network().model, images), place / 'net.pt')\n"
        "traced = load_model(str(place / 'net.pt'), trust=True)\n"
        "(place / 'net.pt').unlink()\n"
        "datasets.explain(many, network().model, preprocess=Preprocess(24), out=place / 'plain', **settings)\n"
        "explain_on_ray(many, traced, preprocess=Preprocess(24), out=place / 'out', actors=1, **settings)\n"
        "exported = torch.export.export(network().model, (images,), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},))\n"
        "torch.export.save(exported, place / 'net.pt2')\n"
        "program = load_model(str(place / 'net.pt2'), trust=True)\n"
        "try: explain_on_ray(many, program, out=place / 'none', actors=1, **settings)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert "InputError model must be one that can be sent to workers" in done.stdout, done
    assert rows(tmp_path / "out") == rows(tmp_path / "plain")
    assert not parts(tmp_path / "none")
