"""A run as one HTML file to look through: pictures, heat maps, classes, errors; several runs side by side.

from pyfast_xai import report

report.write(["explained/eigen-cam", "explained/clear"], "report.html")
"""

from pyfast_xai.report.write import Written, write

__all__ = ["Written", "write"]
