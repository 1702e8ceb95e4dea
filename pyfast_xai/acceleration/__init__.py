"""Faster recordings of a model: replays with folded and packed weights, and CUDA graphs."""
