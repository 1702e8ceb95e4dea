"""What this library raises: one sentence each, naming the argument, what was expected and what came."""


class InputError(ValueError):
    """An argument has the wrong shape, dtype, value or name."""


class BackendError(RuntimeError):
    """A backend the user named cannot serve an op here."""


class UnsupportedOpError(NotImplementedError):
    """A reading met an ATen op it has no rule for."""
