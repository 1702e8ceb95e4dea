"""Recorded forward passes: record once, interpret with many rules, replay without Python's overhead."""

from pyfast_xai.tape.graph import Node, Saved, Tape, Value, key
from pyfast_xai.tape.record import RecordingPolicy, record
from pyfast_xai.tape.replay import replay

__all__ = ["Node", "RecordingPolicy", "Saved", "Tape", "Value", "key", "record", "replay"]
