"""The journal keeps whole steps, and says what happened to others."""

import math
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgezo.errors import RunError
from edgezo.runtime.evaluation import Evaluation
from edgezo.runtime.journal import Journal
from edgezo.runtime.journal_reader import read_journal
from edgezo.runtime.journal_records import JOURNAL_BYTES_LIMIT, MAGIC, STEP_BYTES, UNDO_BYTES, StepRecord

HEADER = {"base": "0" * 64, "config": {"lr": 0.5}}
THREE_BYTES = 1 + 2 + 4 + 4 + 3 * 4 + 4  # kind D: count, learning rate, loss, three projected gradients, checksum


def header(directions: int) -> dict[str, object]:
    return HEADER if directions == 1 else {**HEADER, "config": {"directions": directions}}


def write(path: Path, steps: int, directions: int = 1) -> list[StepRecord]:
    with Journal.create(path, header(directions)) as journal:
        return [
            journal.append(StepRecord(tuple(step + 0.1 - number for number in range(directions)), 1e-3 * step, 1 / 3))
            for step in range(steps)
        ]


def test_what_was_appended_is_read(tmp_path: Path) -> None:
    records = write(tmp_path / "j", 5)
    contents = read_journal(tmp_path / "j")
    assert contents.header == HEADER
    assert contents.records == records
    assert contents.whole_bytes == (tmp_path / "j").stat().st_size


def test_append_returns_the_values_as_stored(tmp_path: Path) -> None:
    with Journal.create(tmp_path / "j", HEADER) as journal:
        stored = journal.append(StepRecord((0.1,), 0.2, 0.3))
    grad, lr, loss = np.float32([0.1, 0.2, 0.3]).tolist()
    assert stored == StepRecord((grad,), lr, loss) != StepRecord((0.1,), 0.2, 0.3)
    assert read_journal(tmp_path / "j").records == [stored]


def test_steps_of_several_directions_are_read_as_stored(tmp_path: Path) -> None:
    given = [StepRecord((0.1, -2e30, 3e-40), 0.2, 0.3), StepRecord((0.5, 1.0, 2.0), 0.25, 0.125), StepRecord((0.0, -0.0, 0.7), 0.2, 0.3)]
    with Journal.create(tmp_path / "j", header(3)) as journal:
        start = (tmp_path / "j").stat().st_size
        stored = [journal.append(record) for record in given]
    assert [record.projected_grads for record in stored] == [tuple(np.float32(record.projected_grads).tolist()) for record in given]
    assert (stored[0].learning_rate, stored[0].loss) == tuple(np.float32([0.2, 0.3]).tolist())
    assert read_journal(tmp_path / "j").records == stored
    data = (tmp_path / "j").read_bytes()
    assert (data[start : start + 3], data[start + THREE_BYTES : start + THREE_BYTES + 1]) == (b"D\x03\0", b"D")
    assert len(data) == start + 3 * THREE_BYTES


def test_marks_and_changes_of_settings_are_read(tmp_path: Path) -> None:
    found = [Evaluation(9, 1.5, 0.25, 0.125), Evaluation(9, 0.1, None, None, {"f1": 0.5, "exact_match": 0.0}), Evaluation(9, 2.5, 0.0, 0.0)]
    with Journal.create(tmp_path / "j", HEADER) as journal:
        journal.mark(0, found[0], best=True)
        journal.append(StepRecord((1.0,), 0.5, 0.25))
        journal.mark(1, found[1], best=True)
        journal.change({"steps": 9, "eval_every": 2})
        journal.change({"steps": 12})
        journal.append(StepRecord((2.0,), 0.5, 0.25))
        journal.mark(2, found[2], best=False)
    contents = read_journal(tmp_path / "j")
    assert contents.evaluations == dict(enumerate(found))
    assert contents.best_step == 1
    assert contents.settings == {"steps": 12, "eval_every": 2}
    assert [record.projected_grads for record in contents.records] == [(1.0,), (2.0,)]


def test_an_undo_takes_back_steps_and_what_was_found_of_them(tmp_path: Path) -> None:
    with Journal.create(tmp_path / "j", HEADER) as journal:
        kept = [journal.append(StepRecord((1.0,), 1.0, 1.0)) for _ in range(2)]
        journal.mark(2, Evaluation(9, 1.5), best=True)
        journal.append(StepRecord((2.0,), 1.0, 1.0))
        journal.mark(3, Evaluation(9, 1.25), best=True)
        start = (tmp_path / "j").stat().st_size
        assert journal.undo(2, 0.25) == 0.25
        size = (tmp_path / "j").stat().st_size - start
        again = journal.append(StepRecord((3.0,), 0.25, 1.0))
    contents = read_journal(tmp_path / "j")
    assert size == UNDO_BYTES == 13
    assert contents.records == [*kept, again]
    assert contents.evaluations == {2: Evaluation(9, 1.5)}
    assert (contents.best_step, contents.lr_scale, contents.undos) == (2, 0.25, 1)


def test_steps_that_come_in_place_of_others_are_watched(tmp_path: Path) -> None:
    """A rise that was the rows' alone is quiet for some steps, through a lower rate at the same step, but not through going back."""

    def quiet_after(*undos: tuple[int, float]) -> int | None:
        with Journal.create(tmp_path / "j", HEADER) as journal:
            for _ in range(5):
                journal.append(StepRecord((1.0,), 1.0, 1.0))
            for step, lr_scale in undos:
                journal.undo(step, lr_scale)
        found = read_journal(tmp_path / "j").quiet_step
        (tmp_path / "j").unlink()
        return found

    assert quiet_after() is None
    assert quiet_after((5, 1.0)) == quiet_after((5, 1.0), (5, 0.5)) == 5
    assert quiet_after((5, 1.0), (2, 0.25)) is None


def test_what_is_due_after_a_step_is_due_after_a_change_of_settings(tmp_path: Path) -> None:
    with Journal.create(tmp_path / "j", HEADER) as journal:
        journal.append(StepRecord((1.0,), 1.0, 1.0))
        journal.change({"steps": 9})
    assert read_journal(tmp_path / "j").last_kind == b"S"


@pytest.mark.parametrize(("step", "lr_scale"), [(3, 0.5), (1, 0.0), (1, math.nan), (1, -1.0), (1, math.inf)])
def test_an_undo_that_no_run_writes_is_refused(tmp_path: Path, step: int, lr_scale: float) -> None:
    write(tmp_path / "j", 2)
    with Journal.reopen(tmp_path / "j", read_journal(tmp_path / "j")) as journal:
        journal.undo(step, lr_scale)
    message = (
        f"{tmp_path / 'j'}: goes back to step {step} of 2 with {lr_scale:g} of the learning rate, which no run does; the run cannot be used"
    )
    with pytest.raises(RunError, match=f"^{re.escape(message)}$"):
        read_journal(tmp_path / "j")


def test_an_evaluation_of_a_step_to_come_is_refused(tmp_path: Path) -> None:
    with Journal.create(tmp_path / "j", HEADER) as journal:
        journal.mark(1, Evaluation(9, 1.5), best=True)
    with pytest.raises(RunError, match="evaluates step 1 after step 0"):
        read_journal(tmp_path / "j")


def test_a_header_that_is_no_object_is_refused(tmp_path: Path) -> None:
    body = b"[1]"
    start = MAGIC + struct.pack("<I", len(body)) + body
    (tmp_path / "j").write_bytes(start + struct.pack("<I", zlib.crc32(start)))
    with pytest.raises(RunError, match="the header is a JSON list, not an object"):
        read_journal(tmp_path / "j")


def test_ten_thousand_steps_stay_under_200_kilobytes(tmp_path: Path) -> None:
    write(tmp_path / "j", 10_000)
    assert (tmp_path / "j").stat().st_size < 200_000


@pytest.mark.parametrize(
    ("directions", "torn"), [*((1, torn) for torn in range(1, STEP_BYTES)), *((3, torn) for torn in range(1, THREE_BYTES))]
)
def test_a_torn_last_record_is_left_out_and_cut_off_when_reopened(tmp_path: Path, directions: int, torn: int) -> None:
    path = tmp_path / "j"
    records = write(path, 4, directions)
    path.write_bytes(path.read_bytes()[:-torn])
    contents = read_journal(path)
    assert contents.records == records[:3]
    with Journal.reopen(path, contents) as journal:
        again = journal.append(records[3])
    assert read_journal(path).records == [*records[:3], again]


def test_a_last_record_of_garbage_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "j"
    records = write(path, 4)
    path.write_bytes(path.read_bytes()[:-STEP_BYTES] + b"S" + bytes(STEP_BYTES - 1))
    assert read_journal(path).records == records[:3]


def test_zeros_in_place_of_the_last_record_and_more_are_left_out(tmp_path: Path) -> None:
    records = write(tmp_path / "j", 4)
    data = (tmp_path / "j").read_bytes()
    (tmp_path / "j").write_bytes(data[: 6 - STEP_BYTES] + bytes(4096))
    assert read_journal(tmp_path / "j").records == records[:3]


@pytest.mark.parametrize("count", [1, STEP_BYTES, 5000])
def test_zeros_at_the_end_are_left_out(tmp_path: Path, count: int) -> None:
    """Some file systems keep the length of a write whose bytes a loss of power took."""
    records = write(tmp_path / "j", 4)
    with open(tmp_path / "j", "ab") as file:
        file.write(bytes(count))
    contents = read_journal(tmp_path / "j")
    assert (contents.records, contents.torn_bytes) == (records, count)


@pytest.mark.parametrize(
    ("directions", "place"), [(1, -3 * STEP_BYTES), (3, -3 * THREE_BYTES), (3, -3 * THREE_BYTES + 2), (3, -2 * THREE_BYTES - 5)]
)
def test_a_changed_record_with_others_behind_it_is_an_error(tmp_path: Path, directions: int, place: int) -> None:
    path = tmp_path / "j"
    write(path, 4, directions)
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(RunError, match=r"the record after step 1 was changed \(checksum differs\) and others follow it"):
        read_journal(path)


def test_records_cannot_change_places(tmp_path: Path) -> None:
    path = tmp_path / "j"
    write(path, 4)
    data = path.read_bytes()
    size = STEP_BYTES
    path.write_bytes(data[: -2 * size] + data[-size:] + data[-2 * size : -size])
    with pytest.raises(RunError, match="the record after step 2 was changed"):
        read_journal(path)


def test_an_existing_journal_is_never_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "j", 1)
    with pytest.raises(FileExistsError):
        Journal.create(tmp_path / "j", HEADER)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "empty; restore it from a copy, or begin a new run"),
        (b"EDGEZOJ9" + bytes(40), "not a journal of version 1 to 4"),
        (b"EDGEZOJ1", "the header is cut off"),
        (b"EDGEZOJ1" + b"\xff\xff\xff\x7f" + bytes(64), "the header is cut off"),
        (b"EDGEZOJ1" + b"\x02\0\0\0{}" + bytes(4), r"the header was changed \(checksum differs\)"),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "j").write_bytes(data)
    with pytest.raises(RunError, match=message):
        read_journal(tmp_path / "j")


def test_a_missing_journal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no readable journal"):
        read_journal(tmp_path / "j")


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_read_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "j"
    path.unlink(missing_ok=True)
    records = write(path, 3, data.draw(st.sampled_from([1, 3])))
    whole = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(whole[: data.draw(st.integers(0, len(whole)))])
    try:
        found = read_journal(path).records
    except RunError:
        return
    assert found == records[: len(found)]


@pytest.mark.parametrize(
    "record",
    [
        StepRecord((math.nan,), 0.1, 0.1),
        StepRecord((0.1,), math.inf, 0.1),
        StepRecord((0.1,), 0.1, -math.inf),
        StepRecord((0.1, 0.2, math.nan), 0.1, 0.1),
        StepRecord((math.inf, 0.2, 0.3), 0.1, 0.1),
        StepRecord((0.1, 0.2, 0.3), math.nan, 0.1),
        StepRecord((0.1, 0.2, 0.3), 0.1, -math.inf),
    ],
)
def test_steps_that_are_no_numbers_are_refused(tmp_path: Path, record: StepRecord) -> None:
    with Journal.create(tmp_path / "j", header(len(record.projected_grads))) as journal:
        journal.append(record)
    with pytest.raises(RunError, match="step 1 holds NaN or infinity"):
        read_journal(tmp_path / "j")


@pytest.mark.parametrize(
    "evaluation", [Evaluation(1, math.nan), Evaluation(1, math.inf), Evaluation(1, 0.5, 2.0, 0.5), Evaluation(1, 0.5, 0.5, -1.0)]
)
def test_evaluations_that_none_can_have_are_refused(tmp_path: Path, evaluation: Evaluation) -> None:
    with Journal.create(tmp_path / "j", HEADER) as journal:
        journal.mark(0, evaluation, best=False)
    with pytest.raises(RunError, match="the evaluation of step 0 holds values that none can have"):
        read_journal(tmp_path / "j")


def test_a_file_too_large_for_a_journal_is_not_read(tmp_path: Path) -> None:
    with open(tmp_path / "j", "wb") as file:
        file.truncate(JOURNAL_BYTES_LIMIT + 1)  # sparse
    with pytest.raises(RunError, match="this is no journal"):
        read_journal(tmp_path / "j")


@pytest.mark.parametrize(("count", "rule"), [*((count, "sgd") for count in (0, -1, 1 << 16, "3", None)), (1 << 15, "hizoo")])
def test_a_header_with_impossible_directions_is_refused(tmp_path: Path, count: object, rule: str) -> None:
    with Journal.create(tmp_path / "j", {**HEADER, "config": {"directions": count, "rule": rule}}):
        pass
    with pytest.raises(RunError, match=r"the header says .* directions a step; the run cannot be used"):
        read_journal(tmp_path / "j")
