from __future__ import annotations

import os
import pickle
import pickletools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from logos import rs_pickle
from logos.rs_pickle import read_labels, read_master
from logos.splits import DataError
from tests.logos import rs_folder
from tests.logos.rs_folder import Label, Record

READERS = [read_labels, read_master]
RECORD = b"clib.dataset_interface\nRecord\n"


class CallOnLoad:
    """Pickles to a call that makes a folder: harmless, but visible."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.path),)


def master_with(record: object) -> dict[str, list[object]]:
    return {"train": [record], "test": []}


def frame(*labels: Label) -> Record:
    return Record("1-a/b/c.jpg", list(labels))


def changed(item: Record | Label, **attributes: object) -> Record | Label:
    item.__dict__.update(attributes)
    return item


def refused(path: Path, reader: Callable[[Path], object], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        reader(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_records_come_back_as_written(tmp_path: Path, protocol: int) -> None:
    two = frame(Label("zdf", [36, 25, 27, 23]), Label("zdf-live", [1, 2, 3, 4.5]))  # type: ignore[list-item]
    path = tmp_path / "master.pkl"
    rs_folder.dump(path, {"test": [frame()], "train": [two, two]}, protocol)
    train, test = read_master(path)
    expected = rs_pickle.Record(
        "1-a/b/c.jpg",
        (
            rs_pickle.Label("zdf", (36, 25, 27, 23)),
            rs_pickle.Label("zdf-live", (1, 2, 3, 4.5)),
        ),
    )
    assert train == [expected, expected]
    assert test == [rs_pickle.Record("1-a/b/c.jpg", ())]


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_classes_are_in_the_order_of_their_indices(tmp_path: Path, protocol: int) -> None:
    path = tmp_path / "labels.pkl"
    path.write_bytes(pickle.dumps({"zdf": 2, "ard": 0, "hr": 1}, protocol))
    assert read_labels(path) == ("ard", "hr", "zdf")


def test_the_generator_pickles_like_the_challenge(tmp_path: Path) -> None:
    rs_folder.write(tmp_path, classes=2, frames=2)
    operations = list(pickletools.genops((tmp_path / "master.pkl").read_bytes()))
    assert {argument for opcode, argument, _ in operations if opcode.name == "GLOBAL"} == {
        "lib.dataset_interface Record",
        "lib.dataset_interface Label",
    }
    assert (operations[0][0].name, operations[0][1]) == ("PROTO", 3)
    names = {opcode.name for opcode, _, _ in operations}
    assert names >= {"NEWOBJ", "BUILD", "EMPTY_TUPLE", "SETITEMS", "BINGET"}
    assert not names & {"REDUCE", "STACK_GLOBAL", "MEMOIZE"}


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("reader", READERS)
def test_a_call_is_refused_and_not_made(tmp_path: Path, reader: Callable[[Path], object], protocol: int) -> None:
    canary = tmp_path / "canary"
    path = tmp_path / "hostile.pkl"
    path.write_bytes(pickle.dumps(master_with(CallOnLoad(canary)), protocol))
    refused(path, reader, "opcode (TUPLE1|REDUCE) at byte")
    assert not canary.exists()
    pickle.loads(path.read_bytes())
    assert canary.exists(), "the file was harmless, so the test shows nothing"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"cos\nsystem\n.", "asks for 'os.system'"),
        (b"cbuiltins\neval\n.", "asks for 'builtins.eval'"),
        (b"cbuiltins\ndict\n.", "asks for 'builtins.dict'"),
        (b"cbuiltins\neval\n)\x81.", "asks for 'builtins.eval'"),
        (b"clib.dataset_interface\nos\n.", "asks for 'lib.dataset_interface.os'"),
        (b"clib.dataset_interface\nRecord.__init__.__globals__\n.", "__globals__' *, which"),
        (b"\x8c\x02os\x8c\x06system\x93.", "asks for 'os.system'"),
        (b"\x8c\x15lib.dataset_interface\x8c\x0fRecord.__init__\x93.", "Record.__init__'"),
        (b"\x8c\x0flogos.rs_pickle\x8c\x08_Pickled\x93.", "rs_pickle._Pickled'"),
        (b"]]\x93.", "STACK_GLOBAL"),
        (b"cos\nsystem\n(X\x02\x00\x00\x00lstR.", "opcode TUPLE at"),
        (b"cos\nsystem\n)R.", "opcode REDUCE at"),
        (b"(X\x02\x00\x00\x00lsios\nsystem\n.", "opcode INST at"),
        (b"(cos\nsystem\nX\x02\x00\x00\x00lso.", "opcode OBJ at"),
        (RECORD + b")}\x92.", "opcode NEWOBJ_EX at"),
        (b"\x82\x01.", "opcode EXT1 at byte 2"),
        (b"\x83\x01\x01.", "opcode EXT2 at"),
        (b"\x84\x01\x01\x01\x01.", "opcode EXT4 at"),
        (b"Pname\n.", "opcode PERSID at"),
        (b"]Q.", "opcode BINPERSID at byte 3"),
        (b"\x97.", "opcode NEXT_BUFFER at"),
        (b"\x8a\x01\x01.", "opcode LONG1 at"),
        (b"C\x01a.", "opcode SHORT_BINBYTES at"),
        (b"]2.", "opcode DUP at"),
        (b"\x8f.", "opcode EMPTY_SET at"),
        (b"I1\n.", "opcode INT at"),
        (b"]p0\n.", "opcode PUT at"),
        (RECORD + b")\x81" + b"}}\x86b.", "opcode TUPLE2 at"),
        (RECORD + b"}X\x01\x00\x00\x00xK\x01sb.", "__setstate__"),
        (RECORD + b"\x81.", "not a valid pickle"),
        (b"]r\xff\xff\xff\x7f.", "LONG_BINPUT at byte 3 asks for 2147483647"),
        (b"\x95\xff\xff\xff\xff\xff\xff\xff\x7f].", "FRAME at byte 2 asks for"),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff.", "not a valid pickle"),
        (b"X\xff\xff\xff\xff.", "not a valid pickle"),
        (b"h\x07.", "not a valid pickle"),
        (b"a.", "not a valid pickle"),
        (b".", "not a valid pickle"),
        (b"].]", "1 bytes follow"),
        (b"]", "damaged or cut short"),
        (b"\xff", "damaged or cut short"),
    ],
)
@pytest.mark.parametrize("reader", READERS)
def test_hostile_and_broken_programs_are_refused(
    tmp_path: Path, reader: Callable[[Path], object], program: bytes, message: str
) -> None:
    if reader is read_labels and program.startswith(RECORD):
        message += "|asks for 'lib.dataset_interface.Record'"
    path = tmp_path / "hostile.pkl"
    path.write_bytes(b"\x80\x04" + program)
    refused(path, reader, message)


@pytest.mark.parametrize("data", [b"", b"\x80", b"garbage", b"(dp0\n.", b"\x80\x01}.", b"\x80\x06}."])
def test_anything_but_protocol_2_to_5_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "old.pkl"
    path.write_bytes(data)
    refused(path, read_labels, "not a pickle of protocol 2 to 5")


def test_build_cannot_change_the_admitted_classes() -> None:
    before = {kind: dict(vars(kind)) for kind in rs_pickle._MASTER_CLASSES.values()}
    # Opcodes that the first check refuses, straight to the unpickler: it must hold by itself.
    attribute = b"}X\x01\x00\x00\x00xK\x01s"
    for state in (attribute, b"}" + attribute + b"\x86", b"N" + attribute + b"\x86"):
        with pytest.raises(TypeError, match="__setstate__"):
            rs_pickle._Unpickler(b"\x80\x02" + RECORD + state + b"b.", rs_pickle._MASTER_CLASSES).load()
    assert before == {kind: dict(vars(kind)) for kind in rs_pickle._MASTER_CLASSES.values()}


@pytest.mark.parametrize("reader", READERS)
def test_deep_nesting_does_not_crash(tmp_path: Path, reader: Callable[[Path], object]) -> None:
    path = tmp_path / "deep.pkl"
    depth = 200_000
    path.write_bytes(b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b".")
    refused(path, reader, "got list")


def test_a_large_file_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "labels.pkl"
    with path.open("wb") as file:
        file.truncate(rs_pickle.MAX_FILE_BYTES + 1)
    refused(path, read_labels, f"at most {rs_pickle.MAX_FILE_BYTES} are read")


def test_a_folder_or_nothing_in_the_place_of_the_file(tmp_path: Path) -> None:
    refused(tmp_path, read_master, "not a regular file")
    refused(tmp_path / "none.pkl", read_master, "cannot be read: No such file")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected a dictionary of names to indices, got list"),
        ({}, "0 classes"),
        ({"a": 0, "b": 2}, "index of 'b' is 2; expected an integer from 0 to 1"),
        ({"a": 0, "b": 0}, "'a' and 'b' have the same index 0"),
        ({"a": -1}, "index of 'a' is -1"),
        ({"a": "0"}, "index of 'a' is '0'"),
        ({"a": 0.0}, "index of 'a' is 0.0"),
        ({"a": False}, "opcode NEWFALSE"),
        ({"a": []}, "index of 'a' is list"),
        ({0: 0}, "0 is not a class name"),
        ({"": 0}, "'' is not a class name"),
        ({" ": 0}, "' ' is not a class name"),
        ({"a\x1b[31m": 0}, r"'a\\x1b\[31m' is not a class name"),
        ({"\ud800": 0}, r"'\\ud800' is not a class name"),
        ({"a" * 201: 0}, r"a\.\.\.' is not a class name"),
    ],
)
def test_wrong_labels_are_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "labels.pkl"
    path.write_bytes(pickle.dumps(content, protocol=3))
    refused(path, read_labels, message)


def recursive_labels() -> Record:
    labels: list[object] = []
    labels.append(labels)
    return Record("1-a/b/c.jpg", labels)  # type: ignore[arg-type]


def recursive_record() -> Record:
    record = frame()
    record.labels = [record]  # type: ignore[list-item]
    return record


LABEL = "record 0 of 'train': "


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], r"expected \{'train': .*, got list"),
        ({"train": []}, "expected the keys 'train' and 'test', got 'train'"),
        ({"train": [], "test": [], "dev": []}, "expected the keys 'train' and 'test', got"),
        ({}, "got none"),
        ({"train": {}, "test": []}, "'train' is not a list of records but dict"),
        ({"train": [], "test": "ab"}, "'test' is not a list of records but str"),
        (master_with("1-a/b/c.jpg"), LABEL + "expected a Record, got str"),
        (master_with(Label("zdf", [1, 2, 3, 4])), LABEL + "expected a Record, got Label"),
        (master_with(changed(frame(), img_path=5)), LABEL + "img_path is not text but int"),
        (master_with(changed(frame(), extra=5)), "needs exactly img_path and labels"),
        (master_with(changed(frame(), labels={})), LABEL + "labels is not a list but dict"),
        (master_with(changed(frame(), labels=None)), "opcode NONE"),
        (master_with(frame(*[Label("a", [1, 2, 3, 4])] * 101)), "101 labels; at most 100"),
        (master_with(changed(frame(), labels=["zdf"])), LABEL + "expected a Label, got str"),
        (master_with(frame(Label("", [1, 2, 3, 4]))), "the label '' is not a class name"),
        (master_with(frame(Label("zdf", [1, 2, 3]))), "pos of 'zdf' is not a list of x, y"),
        (master_with(frame(Label("zdf", "1234"))), "pos of 'zdf' is not a list"),  # type: ignore[arg-type]
        (master_with(frame(Label("zdf", [1, 2, 3, float("nan")]))), "holds nan"),  # type: ignore[list-item]
        (master_with(frame(Label("zdf", [1, 2, 3, float("inf")]))), "holds inf"),  # type: ignore[list-item]
        (master_with(frame(Label("zdf", [1, 2, 3, "4"]))), "holds '4', not a number"),  # type: ignore[list-item]
        (master_with(changed(frame(), labels=[changed(Label("a", []), z=1)])), "exactly name and"),
        (master_with(recursive_labels()), LABEL + "expected a Label, got list"),
        (master_with(recursive_record()), LABEL + "expected a Label, got Record"),
    ],
)
def test_wrong_records_are_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "master.pkl"
    rs_folder.dump(path, content)
    refused(path, read_master, message)


def test_a_record_without_state_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "master.pkl"
    path.write_bytes(b"\x80\x02}(X\x05\x00\x00\x00train]" + RECORD + b")\x81aX\x04\x00\x00\x00test]u.")
    refused(path, read_master, "a Record needs exactly")


def valid_bytes(protocol: int) -> dict[Callable[[Path], object], bytes]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "master.pkl"
        labels = [Label("zdf", [36, 25, 27, 23]), Label("live", [1, 2, 300, 4])]
        records = [frame(), frame(*labels), frame(*labels[:1])]
        rs_folder.dump(path, {"train": records, "test": records[:1]}, protocol)
        return {
            read_labels: pickle.dumps({"zdf": 1, "live": 0}, protocol),
            read_master: path.read_bytes(),
        }


VALID = [(reader, data) for protocol in (2, 3, 4) for reader, data in valid_bytes(protocol).items()]
FRAGMENTS = [
    *(bytes([code]) for code in b"(.}]us)abehjqrKM\x81\x93\x94"),
    *(b"h" + bytes([index]) for index in range(4)),
    *(b"q" + bytes([index]) for index in range(4)),
    RECORD,
    b"clib.dataset_interface\nLabel\n",
    *(
        b"X" + len(text).to_bytes(4, "little") + text
        for text in (b"train", b"test", b"img_path", b"labels", b"name", b"pos", b"zdf")
    ),
    b"K\x00",
    b"K\x01",
    b"G\x7f\xf8\x00\x00\x00\x00\x00\x00",
]


def survives(reader: Callable[[Path], object], data: bytes) -> None:
    with tempfile.NamedTemporaryFile() as file:
        Path(file.name).write_bytes(data)
        try:
            result = reader(Path(file.name))
        except DataError:
            return
    if reader is read_labels:
        assert isinstance(result, tuple)
        assert all(type(name) is str and name for name in result)
    else:
        assert isinstance(result, tuple)
        for record in (*result[0], *result[1]):
            assert type(record) is rs_pickle.Record
            assert type(record.img_path) is str
            assert all(type(label) is rs_pickle.Label for label in record.labels)


@given(
    st.sampled_from(VALID),
    st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(min_size=1, max_size=4)),
        min_size=1,
        max_size=4,
    ),
)
@settings(max_examples=500, deadline=None)
def test_changed_bytes_raise_nothing_but_data_error(
    valid: tuple[Callable[[Path], object], bytes], changes: list[tuple[float, int, bytes]]
) -> None:
    reader, data = valid
    for place, removed, inserted in changes:
        at = int(place * len(data))
        data = data[:at] + inserted + data[at + removed :]
    survives(reader, data)


@given(st.sampled_from(READERS), st.lists(st.sampled_from(FRAGMENTS), max_size=40))
@settings(max_examples=500, deadline=None)
def test_any_admitted_program_raises_nothing_but_data_error(
    reader: Callable[[Path], object], fragments: list[bytes]
) -> None:
    survives(reader, b"\x80\x04" + b"".join(fragments) + b".")


@pytest.mark.parametrize(("reader", "data"), VALID)
def test_every_cut_is_refused(tmp_path: Path, reader: Callable[[Path], object], data: bytes) -> None:
    path = tmp_path / "cut.pkl"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        refused(path, reader, "cut short|protocol 2 to 5|valid pickle|asks for")
