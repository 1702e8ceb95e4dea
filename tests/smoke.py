"""Is an installed wheel complete? Run from a folder that is not the repository, with nothing but the package."""

import torch

import pyfast_xai
from pyfast_xai import CNNFixations, EigenCAM, demo, ops

served = {row.op: row.backend for row in ops.report() if row.device == "cpu"}
assert set(served.values()) == {"cpp"}, f"not every op is served by the compiled library: {served}"
assert ".whl" not in pyfast_xai.__file__

model = demo.load()
images = torch.rand(2, 3, 96, 96)
for explainer in (CNNFixations(model), EigenCAM(model)):
    explanation = explainer(images)
    assert explanation.heatmap.shape == (2, 96, 96), explanation.heatmap.shape
    assert explanation.heatmap.isfinite().all()
    assert explanation.overlay().shape == (2, 3, 96, 96)
print(f"pyfast_xai {pyfast_xai.__version__} from {pyfast_xai.__file__} on torch {torch.__version__}")
