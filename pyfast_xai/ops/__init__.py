"""The performance-critical inner steps, with one schema each and several backends.

Every op can be called from here with tensors on any device; `report()` says which backend serves it and why.
"""

from pyfast_xai.ops.conv_trace import Location, conv_trace
from pyfast_xai.ops.instruction_set import instruction_set
from pyfast_xai.ops.leading_singular import Solver, leading_singular
from pyfast_xai.ops.linear_trace import linear_trace
from pyfast_xai.ops.max_pool_backward import max_pool_backward
from pyfast_xai.ops.max_pool_forward import max_pool_forward
from pyfast_xai.ops.point_density import point_density
from pyfast_xai.ops.points_union import points_union
from pyfast_xai.ops.registry import backend, report
from pyfast_xai.ops.relu_backward import Rectify, relu_backward
from pyfast_xai.ops.relu_forward import relu_forward
from pyfast_xai.ops.response_argmax import response_argmax
from pyfast_xai.ops.sign_bits import sign_bits
from pyfast_xai.ops.winograd_conv2d import winograd_conv2d, winograd_pays, winograd_weight

__all__ = [
    "Location",
    "Rectify",
    "Solver",
    "backend",
    "conv_trace",
    "instruction_set",
    "leading_singular",
    "linear_trace",
    "max_pool_backward",
    "max_pool_forward",
    "point_density",
    "points_union",
    "relu_backward",
    "relu_forward",
    "report",
    "response_argmax",
    "sign_bits",
    "winograd_conv2d",
    "winograd_pays",
    "winograd_weight",
]
