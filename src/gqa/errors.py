"""The one error that a user of gqa sees."""

from __future__ import annotations


class GqaError(ValueError):
    """A mistake in input or usage, told in four parts.

    what:    what is wrong, one clause, naming the thing (`12 KV heads do not divide 32 query heads`)
    got:     what was given, where `what` does not already say it
    allowed: what would have been accepted
    hint:    what to do next, best a command or an argument

    The command line prints it on stderr and exits with 2.
    """

    def __init__(
        self,
        what: str,
        *,
        got: object = None,
        allowed: object = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.got = None if got is None else str(got)
        self.allowed = None if allowed is None else str(allowed)
        self.hint = hint
        super().__init__(str(self))

    def __str__(self) -> str:
        parts = [self.what]
        if self.got is not None:
            parts.append(f"got: {self.got}")
        if self.allowed is not None:
            parts.append(f"allowed: {self.allowed}")
        if self.hint is not None:
            parts.append(f"hint: {self.hint}")
        return "\n".join(parts)

    def __reduce__(self):
        # Keyword arguments do not survive BaseException's default pickling (worker processes).
        return (_rebuild, (self.what, self.got, self.allowed, self.hint))


class TrainingError(GqaError):
    """A training cannot go on; its last checkpoint is kept, and another try begins there."""

    def __reduce__(self):
        return (_rebuild_training, (self.what, self.got, self.allowed, self.hint))


def _rebuild_training(what: str, got: str | None, allowed: str | None, hint: str | None) -> TrainingError:
    return TrainingError(what, got=got, allowed=allowed, hint=hint)


def _rebuild(what: str, got: str | None, allowed: str | None, hint: str | None) -> GqaError:
    return GqaError(what, got=got, allowed=allowed, hint=hint)
