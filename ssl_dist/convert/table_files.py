"""Files of tables, parquet and Arrow's streams, read a batch after the other. By pyarrow, which need not be there."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from ssl_dist.convert.shards import refuse_unfetched
from ssl_dist.errors import UserError, refuse_unreadable
from ssl_dist.reading import open_regular

END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"  # of Arrow's streaming format
STREAM_BYTES = 1 << 20  # of a column that are read ahead; without it, all of a row group
FETCH_AGAIN = "fetch or write it again"


def import_pyarrow(source: str) -> Any:
    """pyarrow. Raises `UserError`, with the name of the source, where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(
            f"convert {source}: pyarrow is not installed; pip install pyarrow (our extra `parquet`)"
        ) from None
    return pyarrow


class Format(ABC):
    """Files of a format. Every method raises `UserError` for a file that can not be read."""

    def __init__(self, pa: Any):
        self.pa = pa

    def schema(self, path: Path) -> Any:
        """The names and types of the columns."""
        with self._opened(path, partial(self._schema, path)) as schema:
            _ = schema.names  # which may be no text
            return schema

    @abstractmethod
    def _schema(self, path: Path) -> AbstractContextManager[Any]:
        """The same, unchecked, as long as the file is open."""

    @abstractmethod
    def batches(self, path: Path, columns: Sequence[str], count: int) -> Iterator[Any]:
        """Record batches of at most `count` rows, in order. A column STRUCT.FIELD is a struct with this field at
        least."""

    @contextmanager
    def _opened(self, path: Path, open_file: Callable[[], AbstractContextManager[Any]]) -> Iterator[Any]:
        with refuse_unreadable(path, FETCH_AGAIN), open_regular(path) as file:
            refuse_unfetched(path, file.read(64))
        try:
            with open_file() as file:
                yield file
        except (OSError, UnicodeDecodeError, self.pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise UserError(f"{path}: can not be read ({reason}); {FETCH_AGAIN}") from None


class Parquet(Format):
    @contextmanager
    def _schema(self, path: Path) -> Iterator[Any]:
        with self.pa.parquet.ParquetFile(path) as file:
            yield file.schema_arrow

    def batches(self, path: Path, columns: Sequence[str], count: int) -> Iterator[Any]:
        def open_file() -> Any:
            return self.pa.parquet.ParquetFile(path, buffer_size=STREAM_BYTES, pre_buffer=False)

        with self._opened(path, open_file) as file:
            # One thread: files are read in order anyway, and Arrow's threads do not outlive a fork.
            yield from file.iter_batches(count, columns=list(columns), use_threads=False)


class ArrowStream(Format):
    """The files are mapped, so what is not looked at is not read."""

    @contextmanager
    def _schema(self, path: Path) -> Iterator[Any]:
        with self.pa.memory_map(str(path)) as file:
            yield self.pa.ipc.open_stream(file).schema

    def batches(self, path: Path, columns: Sequence[str], count: int) -> Iterator[Any]:
        with self._opened(path, lambda: self.pa.memory_map(str(path))) as file:
            stream = self.pa.ipc.open_stream(file)
            names = [name if name in stream.schema.names else name.rpartition(".")[0] for name in columns]
            for batch in stream:
                batch.validate(full=True)
                for start in range(0, batch.num_rows, count):
                    yield batch.slice(start, count).select(names)
            end = file.size() - len(END_OF_STREAM)
            if end < 0 or file.read_at(len(END_OF_STREAM), end) != END_OF_STREAM:
                raise UserError(f"{path}: has no mark of its end, as a file that was cut; {FETCH_AGAIN}")
