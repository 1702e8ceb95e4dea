"""Explanations of large data sets: runs that survive crashes, their folders of Parquet parts, and a reader.

from pyfast_xai import datasets

datasets.explain("photos/", model, preprocess=preprocess, method="eigen-cam", out="explained")
results = datasets.open("explained")
results.query("select class_name, count(*) from results group by 1 order by 2 desc")
results[0].explanation().plot()
"""

try:
    import pyarrow  # noqa: F401
except ImportError as error:
    raise ImportError("pyfast_xai.datasets needs pyarrow: pip install pyarrow") from error

from pyfast_xai.datasets.export import export
from pyfast_xai.datasets.job import Job
from pyfast_xai.datasets.maintain import retry, status, verify
from pyfast_xai.datasets.on_ray import explain_on_ray, run_on_ray
from pyfast_xai.datasets.options import RunOptions
from pyfast_xai.datasets.reader import Results, Row
from pyfast_xai.datasets.reader import open_results as open
from pyfast_xai.datasets.run import Summary, explain, prepare, run_job
from pyfast_xai.datasets.run_worker import RunProgress, RunWorker
from pyfast_xai.datasets.sources import (
    Files,
    HuggingFace,
    Item,
    ParquetImages,
    Source,
    StreamedSource,
    Tars,
    TorchDataset,
    open_source,
)

__all__ = [
    "Files",
    "HuggingFace",
    "Item",
    "Job",
    "ParquetImages",
    "Results",
    "Row",
    "RunOptions",
    "RunProgress",
    "RunWorker",
    "Source",
    "StreamedSource",
    "Summary",
    "Tars",
    "TorchDataset",
    "explain",
    "explain_on_ray",
    "export",
    "open",
    "open_source",
    "prepare",
    "retry",
    "run_job",
    "run_on_ray",
    "status",
    "verify",
]
