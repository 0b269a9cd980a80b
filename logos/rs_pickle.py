"""Reading labels.pkl and master.pkl of the 2017 challenge without running anything they ask for.

A pickle is a program for a small stack machine, so a file from elsewhere is read in three steps.
Its opcodes are compared with the list of those that such files need; what remains is loaded by an
unpickler that knows two classes, which only hold the state they are given; and that state is
checked and copied into `Record` and `Label`. Everything else ends in a `DataError`.
"""

from __future__ import annotations

import io
import math
import pickle
import pickletools
import stat
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from logos.splits import DataError

MAX_FILE_BYTES = 16 * 2**20
"""Four times the largest real file. A byte of pickle can cost 72 bytes of memory."""
MAX_CLASSES = 10_000
MAX_RECORDS = 1_000_000
MAX_LABELS_PER_FRAME = 100
MAX_NAME_CHARACTERS = 200

# Tuples other than the empty one are not among them: hashing a deeply nested tuple as a dictionary
# key overflows the C stack, and a pair as the state of BUILD sets attributes on any object.
_OPCODES = frozenset(
    {"PROTO", "FRAME", "STOP", "MARK", "EMPTY_DICT", "SETITEM", "SETITEMS"}
    | {"EMPTY_LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "BININT", "BININT1", "BININT2", "BINFLOAT"}
    | {"BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "GLOBAL", "STACK_GLOBAL", "NEWOBJ", "BUILD"}
    | {"MEMOIZE", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"}
)
_SIZED_BY_ARGUMENT = frozenset({"LONG_BINPUT", "FRAME"})


@dataclass(frozen=True)
class Label:
    """A logo on a frame: its name and its place [x, y, width, height] in pixels."""

    name: str
    pos: tuple[float, float, float, float]


@dataclass(frozen=True)
class Record:
    """A frame, by its path relative to the data folder, and every logo on it."""

    img_path: str
    labels: tuple[Label, ...]


class _Pickled:
    """Holds the state of a pickled object for validation.

    `__setstate__` also keeps BUILD from setting attributes: on an instance it is called instead,
    and on the class itself the call lacks an argument.
    """

    __slots__ = ("state",)

    def __setstate__(self, state: object) -> None:
        self.state = state


class _PickledRecord(_Pickled):
    __slots__ = ()


class _PickledLabel(_Pickled):
    __slots__ = ()


_MASTER_CLASSES: Mapping[tuple[str, str], type[_Pickled]] = {
    ("lib.dataset_interface", "Record"): _PickledRecord,
    ("lib.dataset_interface", "Label"): _PickledLabel,
}


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, admitted: Mapping[tuple[str, str], type[_Pickled]]) -> None:
        super().__init__(io.BytesIO(data))
        self._admitted = admitted

    def find_class(self, module_name: str, global_name: str, /) -> type[_Pickled]:
        try:
            return self._admitted[module_name, global_name]
        except KeyError:
            wanted = show(f"{module_name}.{global_name}")
            raise pickle.UnpicklingError(f"it asks for {wanted}, which is not admitted") from None


def read_labels(path: Path) -> tuple[str, ...]:
    """Read labels.pkl: a dictionary of class names to the indices 0, 1, 2, … in any order.

    Args:
        path: The file.

    Returns:
        The names in the order of their indices.

    Raises:
        DataError: The file cannot be read, asks for anything but plain containers, or holds
            anything else than distinct names with the indices 0 to n - 1.
    """
    content = _unpickle(path, {})
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected a dictionary of names to indices, got {_kind(content)}")
    if not 0 < len(content) <= MAX_CLASSES:
        raise DataError(f"{path}: {len(content)} classes; 1 to {MAX_CLASSES} can be used")
    names: dict[int, str] = {}
    for name, index in content.items():
        if not is_name(name):
            raise DataError(f"{path}: {_value(name)} is not a class name")
        # bool is a subclass of int: True would pass for 1.
        if type(index) is not int or not 0 <= index < len(content):
            raise DataError(
                f"{path}: the index of {show(name)} is {_value(index)}; "
                f"expected an integer from 0 to {len(content) - 1}, one for each class"
            )
        if index in names:
            raise DataError(f"{path}: {show(names[index])} and {show(name)} have the same index {index}")
        names[index] = name
    return tuple(names[index] for index in range(len(names)))


def read_master(path: Path) -> tuple[list[Record], list[Record]]:
    """Read master.pkl: {'train': [Record, …], 'test': [Record, …]}.

    Paths inside are not checked here; see `logos.rs_index`.

    Args:
        path: The file.

    Returns:
        The training records and the test records, in the order of the file.

    Raises:
        DataError: The file cannot be read, asks for anything but the two record classes and plain
            containers, or holds anything else than such lists of records.
    """
    content = _unpickle(path, _MASTER_CLASSES)
    if not isinstance(content, dict):
        raise DataError(f"{path}: expected {{'train': […], 'test': […]}}, got {_kind(content)}")
    if set(content) != {"train", "test"}:
        keys = ", ".join(_value(key) for key in list(content)[:5])
        raise DataError(f"{path}: expected the keys 'train' and 'test', got {keys or 'none'}")
    # The frames of one folder share one list of labels in the file; it is checked once.
    seen: dict[int, tuple[Label, ...]] = {}
    return _records(path, "train", content["train"], seen), _records(path, "test", content["test"], seen)


def is_name(value: object) -> bool:
    """Whether a value can name a class: printable text that is not blank, of a sensible length."""
    return (
        isinstance(value, str) and 0 < len(value) <= MAX_NAME_CHARACTERS and value.isprintable() and bool(value.strip())
    )


def show(text: str) -> str:
    """Quote text from a file for a message: escaped, and cut where it is long."""
    return repr(text if len(text) <= 80 else text[:77] + "...")


def _unpickle(path: Path, admitted: Mapping[tuple[str, str], type[_Pickled]]) -> object:
    data = _read(path)
    _check_opcodes(path, data)
    try:
        content: object = _Unpickler(data, admitted).load()
    # A malformed pickle can raise nearly anything (the pickle documentation says so).
    except Exception as error:
        raise DataError(f"{path}: not a valid pickle of this format: {error}") from error
    return content


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise DataError(f"{path}: not a regular file")
        if status.st_size > MAX_FILE_BYTES:
            raise DataError(f"{path}: {status.st_size} bytes; at most {MAX_FILE_BYTES} are read of such a file")
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _check_opcodes(path: Path, data: bytes) -> None:
    """Refuse any opcode that files of this format do not need, before anything is loaded."""
    if len(data) < 2 or data[0:1] != pickle.PROTO or not 2 <= data[1] <= 5:
        raise DataError(f"{path}: not a pickle of protocol 2 to 5")
    position = 0
    try:
        for opcode, argument, at in pickletools.genops(data):
            position = at or 0
            if opcode.name not in _OPCODES:
                raise DataError(
                    f"{path}: the pickle opcode {opcode.name} at byte {position} has no place in "
                    "this format; the file was refused and nothing in it was run"
                )
            # An index makes the unpickler allocate a table of that size, a frame a buffer.
            if opcode.name in _SIZED_BY_ARGUMENT and (argument or 0) > len(data):
                raise DataError(
                    f"{path}: {opcode.name} at byte {position} asks for {argument}, more than the "
                    f"file's {len(data)} bytes; the file is damaged or hostile"
                )
    except DataError:
        raise
    # Mostly ValueError; a length beyond 2**63 makes it an OverflowError, for one.
    except Exception as error:
        raise DataError(f"{path}: not a valid pickle after byte {position}, damaged or cut short: {error}") from error
    if position + 1 != len(data):
        raise DataError(f"{path}: {len(data) - position - 1} bytes follow the end of the pickle")


def _records(path: Path, part: str, content: object, seen: dict[int, tuple[Label, ...]]) -> list[Record]:
    if not isinstance(content, list):
        raise DataError(f"{path}: {part!r} is not a list of records but {_kind(content)}")
    if len(content) > MAX_RECORDS:
        raise DataError(f"{path}: {len(content)} records in {part!r}; at most {MAX_RECORDS}")
    records = []
    for number, item in enumerate(content):
        where = f"{path}: record {number} of {part!r}"
        state = _state(where, item, _PickledRecord, {"img_path", "labels"})
        img_path, labels = state["img_path"], state["labels"]
        if not isinstance(img_path, str):
            raise DataError(f"{where}: img_path is not text but {_kind(img_path)}")
        if not isinstance(labels, list):
            raise DataError(f"{where}: labels is not a list but {_kind(labels)}")
        if id(labels) not in seen:
            seen[id(labels)] = _labels(where, labels)
        records.append(Record(img_path, seen[id(labels)]))
    return records


def _labels(where: str, content: list[object]) -> tuple[Label, ...]:
    if len(content) > MAX_LABELS_PER_FRAME:
        raise DataError(f"{where}: {len(content)} labels; at most {MAX_LABELS_PER_FRAME}")
    labels = []
    for item in content:
        state = _state(where, item, _PickledLabel, {"name", "pos"})
        name, pos = state["name"], state["pos"]
        if not isinstance(name, str) or not is_name(name):
            raise DataError(f"{where}: the label {_value(name)} is not a class name")
        if not isinstance(pos, list) or len(pos) != 4:
            raise DataError(f"{where}: pos of {show(name)} is not a list of x, y, width, height")
        for number in pos:
            if type(number) not in (int, float) or not math.isfinite(number):
                raise DataError(f"{where}: pos of {show(name)} holds {_value(number)}, not a number")
        labels.append(Label(name, (pos[0], pos[1], pos[2], pos[3])))
    return tuple(labels)


def _state(where: str, item: object, expected: type[_Pickled], keys: set[str]) -> dict[str, object]:
    name = expected.__name__.removeprefix("_Pickled")
    if type(item) is not expected:
        raise DataError(f"{where}: expected a {name}, got {_kind(item)}")
    state = getattr(item, "state", None)
    if not isinstance(state, dict) or set(state) != keys:
        raise DataError(f"{where}: a {name} needs exactly {' and '.join(sorted(keys))}")
    return state


def _kind(value: object) -> str:
    return type(value).__name__.removeprefix("_Pickled")


def _value(value: object) -> str:
    """Show a value of unknown type; the repr of a container may be endless."""
    if isinstance(value, str):
        return show(value)
    return repr(value) if isinstance(value, int | float) else _kind(value)
