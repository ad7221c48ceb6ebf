"""Settings of training that are ignored, each in turn: whatever is given, it has its default."""

from tests.planted.mistake import Mistake
from tests.training.settings_table import FILES, SETTINGS, Noticed

__all__ = ["IGNORED"]

_DEAF = """

def _deaf(init):
    def call(self, *args, **kwargs):
        init(self, *args, **kwargs)
        object.__setattr__(self, {field!r}, {value})

    return call


{config}.__init__ = _deaf({config}.__init__)
"""


class _Appended(Mistake):
    """A mistake at the end of a file."""

    def plant(self, root):
        with (root / "jax_avatar" / self.file).open("a") as file:
            file.write(self.new)


def _ignored(config: str, field: str, row: Noticed) -> Mistake:
    value = f"{config}.__dataclass_fields__[{field!r}].default"
    if row.ignored_as is not None:
        value = repr(row.ignored_as)
    text = _DEAF.format(config=config, field=field, value=value)
    what = f"{config}.{field} is ignored"
    return _Appended("ignored", what, FILES[config], "", text, (row.test_id,))


IGNORED = tuple(
    _ignored(config, field, row)
    for config, rows in SETTINGS.items()
    for field, row in rows.items()
    if isinstance(row, Noticed)
)
