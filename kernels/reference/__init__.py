"""Plain PyTorch twins of every op: slow, short, and the specification the other backends are tested against."""
