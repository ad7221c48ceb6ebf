"""A mistake to plant in the code, and the tests that must notice it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Mistake", "tests_in"]


@dataclass(frozen=True)
class Mistake:
    """A replacement in one file.

    Attributes:
        number: invariant that it breaks; "input", what is refused before compiling; "run", what
            a run tells and leaves behind; "setting", one that is mixed up with another;
            "ignored", one that is; or "talk", a rule of a conversation.
        what: the mistake in words.
        file: to change; in `jax_avatar` if it is not in `configs` or `launch`.
        old: text that is there exactly once.
        new: what it becomes.
        tests: ids, as pytest takes them; of each, at least one case must fail.
        slow: whether these tests take minutes.
    """

    number: int | str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    slow: bool = False

    def plant(self, root: Path) -> None:
        """Makes the mistake in a copy of the code.

        Raises:
            ValueError: the text to replace is not there exactly once.
        """
        is_inside = not self.file.startswith(("configs/", "launch/"))
        path = root / ("jax_avatar" if is_inside else "") / self.file
        source = path.read_text()
        if (count := source.count(self.old)) != 1:
            raise ValueError(
                f"{self.number}, {self.what}: {self.old!r} is {count} times in {self.file}, "
                "expected once; give the text as it is now."
            )
        path.write_text(source.replace(self.old, self.new))


def tests_in(file: str) -> Callable[..., tuple[str, ...]]:
    """Names, without "test_", -> ids of the tests of a file in `tests`."""
    return lambda *names: tuple(f"tests/{file}.py::test_{name}" for name in names)
