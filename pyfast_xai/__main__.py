"""`python -m pyfast_xai` is `pyfast-xai`."""

from pyfast_xai.cli import program

program()
