"""A small trained network and the pictures it reads, so that every explainer can be tried with no download.

The pictures are cluttered scenes with one handwritten digit each and the box it occupies, which makes an
explanation checkable: a good one points at the digit, wherever it lies.

    from pyfast_xai.demo import load, make_scenes

    scenes = make_scenes(8, seed=0)
    scores = load()(scenes.images)
"""

from pyfast_xai.demo.network import DigitsNet, load
from pyfast_xai.demo.scenes import Scenes, make_scenes

__all__ = ["DigitsNet", "Scenes", "load", "make_scenes"]
