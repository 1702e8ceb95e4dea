"""Rules for walking a tape backwards: one rule an ATen op, nothing specific to a method."""
