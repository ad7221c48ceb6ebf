"""ArrayRecord shards: written whole or not at all, read at random."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["RecordSource", "write_records"]

_OPTIONS = "group_size:1,zstd:3"  # one record per group, so that any one is read alone


def write_records(path: Path, records: Iterable[bytes]) -> int:
    """Writes records to a shard, which appears under its name only once it is whole.

    Returns:
        The number of records.
    """
    from array_record.python import array_record_module

    part = path.with_suffix(".part")
    writer = array_record_module.ArrayRecordWriter(str(part), _OPTIONS)
    count = 0
    for record in records:
        writer.write(record)
        count += 1
    writer.close()
    part.rename(path)
    return count


class RecordSource:
    """Random access to the decoded records of some shards: `len(source)`, `source[i]`.

    Fits `grain.MapDataset.source`. Opened anew in every process it is sent to.
    """

    def __init__(self, paths: Sequence[Path], decode: Callable[[bytes], Any]):
        self.paths, self.decode = tuple(paths), decode
        self._records = None

    def _open(self):
        if self._records is None:
            from array_record.python import array_record_data_source

            try:
                self._records = array_record_data_source.ArrayRecordDataSource(
                    [str(path) for path in self.paths]
                )
            except Exception as error:  # the reader raises RuntimeError and others
                raise ValueError(
                    f"a shard in {self.paths[0].parent} cannot be read ({error}); it is cut off or "
                    "damaged: remove it and make it again."
                ) from error
        return self._records

    def __len__(self) -> int:
        return len(self._open())

    def __getitem__(self, index: int) -> Any:
        return self.decode(self._open()[int(index)])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_records": None}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({len(self.paths)} shards)"
