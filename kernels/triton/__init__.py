"""GPU twins in Triton, compiled on their first call: nothing to build at installation.

Triton is imported with the first op that it serves, not with this package. Offsets are 64 bits wide throughout. Block
sizes are chosen by shape; nothing is tuned on the first call. A kernel names what it holds by kind: `_ptr` the start
of a tensor, `o_` offsets, `p_` pointers, `m_` masks.
"""
