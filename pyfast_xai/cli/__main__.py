"""`python -m pyfast_xai.cli` is `pyfast-xai`."""

from pyfast_xai.cli import program

program()
