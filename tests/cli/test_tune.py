import pytest

from pyfast_xai.tuning import Contest, Verdicts, contest


@pytest.fixture
def verdicts(monkeypatch, tmp_path):
    """Contests are on, and their verdicts begin empty."""
    monkeypatch.setenv("PYFAST_XAI_TUNING", "on")
    actual = Contest(Verdicts(tmp_path, {}))
    monkeypatch.setattr(contest, "_process_contest", lambda: actual)
    return actual.verdicts


def test_tune_prints_what_serves_and_keeps_the_verdicts(run, verdicts):
    output = run("tune", "digits", "--method", "grad-cam", "--batch", "1,2").stdout
    result = {site for site in verdicts.all() if site.op == "grad-cam"}
    assert len(result) == 2
    assert output.count("grad-cam") == 2
    for site in result:
        assert verdicts.get(site).fastest() in output
        assert {"recorded", "replayed"} == verdicts.get(site).seconds.keys()
    kernels = {site.op for site in verdicts.all()} - {"grad-cam"}
    assert "conv2d" in kernels
    assert "conv2d" in output
    shown = run("backends").stdout
    assert "grad-cam" in shown


@pytest.mark.usefixtures("verdicts")
def test_parts_of_an_explainer_decide_for_it(run):
    assert "its parts decide" in run("tune", "digits", "--method", "sess", "--batch", "1").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "batch must be numbers of images separated by commas, got '0'"),
        (["--batch", "one"], "batch must be numbers of images separated by commas, got 'one'"),
        (["--method", "magic"], "method must be one of"),
    ],
    ids=["zero", "word", "method"],
)
@pytest.mark.usefixtures("verdicts")
def test_what_cannot_be_tuned_is_refused(run, arguments, message):
    assert message in run("tune", "digits", *arguments, code=2).stderr


def test_tuning_that_is_off_is_refused(run):
    assert "PYFAST_XAI_TUNING must be on to tune, got off" in run("tune", "digits", code=2).stderr
