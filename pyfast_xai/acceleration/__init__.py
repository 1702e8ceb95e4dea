"""Tapes that run faster: replays with folded and packed weights, and CUDA graphs."""
