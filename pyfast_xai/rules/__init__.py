"""How to read a tape backwards: one rule an ATen op, nothing specific to a method."""
