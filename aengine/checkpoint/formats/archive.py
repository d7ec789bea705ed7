"""Archives: whether a file is one that `torch.save()` could have written, looked at before `torch.load()` unpacks it.

Such a file is an uncompressed zip archive: a pickle, and a record for each storage. `weights_only=True` keeps the
pickle from executing anything. But it unpacks what is compressed, and allocates what the pickle says, so that a file of
some kilobytes can fill the memory. Here the pickle is read once more before that, with nothing in the place of all that
it refers to: what is looked at are the numbers that something would be allocated by.
"""

import errno
import io
import pickle
import struct
import zipfile
from typing import Any, BinaryIO, ClassVar, Final, Self, cast

_PICKLE: Final = "data.pkl"
_LOCAL_HEADER = struct.Struct("<26x2H")  # of an entry of a zip archive: at its end the lengths of name and extra field
# By the names in the pickle: to ask torch for the types is to be warned of them. Any other has one of a byte.
_ITEM_SIZES: Final = {
    f"{kind}Storage": size
    for size, kinds in {
        2: ("Half", "BFloat16", "Short"),
        4: ("Float", "Int", "QInt32"),
        8: ("Double", "Long", "ComplexFloat"),
        16: ("ComplexDouble",),
    }.items()
    for kind in kinds
}


class Window(io.RawIOBase):
    """A stretch of a file as a file of its own: an archive may be one of several in it."""

    def __init__(self, file: BinaryIO, start: int, length: int) -> None:
        super().__init__()
        self._file = file
        self._start = start
        self._length = length
        self._place = 0

    def readable(self) -> bool:
        """Return whether it can be read: it can."""
        return True

    def seekable(self) -> bool:
        """Return whether it has places: it has."""
        return True

    def readinto(self, buffer: Any, /) -> int:
        """Read as much as there is and fits, and return how much."""
        self._file.seek(self._start + self._place)
        found = self._file.read(max(0, min(len(buffer), self._length - self._place)))
        buffer[: len(found)] = found
        self._place += len(found)
        return len(found)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Go to a place, and return it."""
        place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._length}[whence]
        if place < 0:
            raise OSError(errno.EINVAL, "this is before the beginning")
        self._place = place
        return place

    def tell(self) -> int:
        """Return the place."""
        return self._place


class NoArchive(ValueError):
    """A file is not as `torch.save()` writes it, and so was not loaded."""


class _Stub:
    """Stands for whatever the pickle refers to: can be called, made, filled and given a state, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> Self:
        return cast(Self, object.__new__(_Stub))

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __call__(self, *_: Any, **__: Any) -> Self:
        return self

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        pass

    def extend(self, values: Any) -> None:
        pass

    def add(self, value: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _Bytes(_Stub):
    """Stands for bytearray, which torch.save() has made of its content, and which would be made of a length, too."""

    def __new__(cls, *arguments: Any, **_: Any) -> Self:
        if any(isinstance(one, int) for one in arguments):
            raise NoArchive(f"it asks for a bytearray of the length {arguments[0]}, and not for one with a content")
        return super().__new__(cls)


_Python = pickle._Unpickler  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]


class PlainUnpickler(_Python):
    """Python's own unpickler in Python: that in C allocates, for a number in a file of some bytes, up to 64 GB."""

    # Without the one that makes a bytearray of a length before it reads it: nothing that is read here has one so.
    dispatch: ClassVar[dict[Any, Any]] = {
        code: load for code, load in _Python.dispatch.items() if code != pickle.BYTEARRAY8[0]
    }


class _Look(PlainUnpickler):
    def __init__(self, content: bytes, records: dict[str, int]) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._records = records

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in {("builtins", "bytearray"), ("__builtin__", "bytearray")}:
            return _Bytes
        return type(name, (_Stub,), {}) if module.startswith("torch") and name.endswith("Storage") else _Stub

    def persistent_load(self, pid: Any) -> Any:
        match pid:
            case ("storage", type() as kind, str(key), _, int(count)):
                size = self._records.get(key)
                if size is None or not 0 <= count * _ITEM_SIZES.get(kind.__name__, 1) <= size:
                    raise NoArchive(f"it asks for {count} elements of record {key!r}, which has {size} bytes")
            case _:
                raise NoArchive("it asks for something that is no storage")
        return _Stub()


def check_archive(file: BinaryIO) -> None:
    """Look at a file that is open and can be sought in, and leave it at its beginning.

    Raises:
        NoArchive: it would take more memory than it has bytes, or is not as `torch.save()` writes it.
    """
    size = file.seek(0, io.SEEK_END)
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
        content = _pickle_in(file, entries, size)
        records = {name: entry.file_size for entry in entries if (name := _name_of_record(entry.filename))}
        _Look(content, records).load()
    except (MemoryError, NoArchive):
        raise
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise NoArchive("it refers to a place that is none") from error
    except zipfile.BadZipFile as error:
        if isinstance(failure := error.__context__, OSError) and failure.errno != errno.EINVAL:
            raise failure from None  # of the disk, which zipfile takes for a file of another kind
        raise NoArchive(f"BadZipFile: {error}") from error
    except Exception as error:
        raise NoArchive(f"{type(error).__name__}: {error}") from error
    file.seek(0)


def _pickle_in(file: BinaryIO, entries: list[zipfile.ZipInfo], size: int) -> bytes:
    for entry in entries:
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise NoArchive(f"{entry.filename!r} is compressed, to {entry.compress_size} of {entry.file_size} bytes")
    if sum(entry.file_size for entry in entries) > size:
        raise NoArchive(f"its entries have more bytes than its {size}")
    if len({entry.filename.lower() for entry in entries}) < len(entries):  # torch's reader knows no other case
        raise NoArchive("two of its entries have one name")
    folders = {entry.filename.partition("/")[0] for entry in entries}
    pickles = [entry for entry in entries if entry.filename.partition("/")[2] == _PICKLE]
    if len(folders) != 1 or len(pickles) != 1:
        raise NoArchive(f"it has no {_PICKLE} in its one folder")
    file.seek(pickles[0].header_offset)
    file.seek(sum(_LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))), io.SEEK_CUR)
    return file.read(pickles[0].file_size)


def _name_of_record(name: str) -> str:
    folder, _, record = name.partition("/")[2].partition("/")
    return record if folder == "data" else ""
