import pytest
from PIL import Image
from typer.testing import CliRunner

from pyfast_xai import cli, demo


@pytest.fixture
def run():
    """Calls `pyfast-xai` with arguments; `code` is the exit code that is expected."""

    def call(*arguments, code=0):
        result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == code, result.output
        return result

    return call


@pytest.fixture(scope="session")
def scenes():
    return demo.make_scenes(5, seed=3)


@pytest.fixture
def folder(tmp_path, scenes):
    """Five pictures, called 0.png to 4.png."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for n, image in enumerate(scenes.images):
        Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()).save(folder / f"{n}.png")
    return folder
