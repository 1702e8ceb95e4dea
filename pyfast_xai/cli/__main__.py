"""`python -m pyfast_xai.cli` is `pyfast-xai`."""

from pyfast_xai.cli import app

app(prog_name="pyfast-xai")
