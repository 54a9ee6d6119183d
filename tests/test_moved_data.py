"""Runs whose data are elsewhere, changed or gone: `tune --resume` and `verify` say what to do."""

from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import TASK
from conftest import Command


def test_resuming_from_another_folder(
    refusal: Callable[..., str], command: Command, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    again = ["tune", str(tmp_path / "edge"), "-o", str(tmp_path / run), "--resume"]
    here = f"rows.jsonl (not in {elsewhere}"
    begun, end = f"{tmp_path / run}: the run's data was not found: ", "; go to the folder it was last tuned in, or say where it is: "
    assert refusal(*again) == f"{begun}--data {here}) and --valid {here}){end}--data PATH --valid PATH"
    data = str(tmp_path / "rows.jsonl")
    assert refusal(*again, "--data", data) == f"{begun}--valid {here}){end}--valid PATH"
    expected = f"not checked: {here}; say where that is: --data PATH), {here}; say where that is: --valid PATH), the base (--base DIR)\n"
    assert command("verify", str(tmp_path / run)).out.endswith(expected)
    assert command("verify", str(tmp_path / run), "--data", data, "--valid", data).out.endswith(
        "no fault found; not checked: the base (--base DIR)\n"
    )
    Path("rows.jsonl").write_text("{}\n")
    wrong = f"{elsewhere / 'rows.jsonl'} is not the file the run was made with, say where that is: "
    problem = f"{wrong}--data PATH; {wrong}--valid PATH"
    assert command("verify", str(tmp_path / run)).err == f"error: {tmp_path / run}: {problem}\n"
    assert command(*again, "--data", data, "--valid", data).code == 0


def test_resuming_when_the_data_is_gone(refusal: Callable[..., str], command: Command, tmp_path: Path) -> None:
    data = tmp_path / "gone.jsonl"
    data.write_bytes((tmp_path / "rows.jsonl").read_bytes())
    assert command("tune", "edge", "-o", "run", *TASK, "--data", str(data), "--steps", "1", "--lr", "1e-4", "--start", "none").code == 0
    assert (
        refusal("verify", "run", "--data", "lost.jsonl")
        == f"--data 'lost.jsonl': no such file or folder in {tmp_path}; give the place where it is now"
    )
    assert refusal("verify", "run", "--data", "").startswith("--data '': no such file or folder")
    assert refusal("verify", "run", "--valid", "rows.jsonl") == "run: the run was made without --valid; leave it out"
    data.unlink()
    expected = f"run: the run's data was not found: --data {data} (not there); go to the folder it was last tuned in, or say where it is: --data PATH"
    assert refusal("tune", "edge", "-o", "run", "--resume") == expected
    assert refusal("verify", "run", "--base", "edge", "--every", "1") == expected
