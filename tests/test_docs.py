"""What the documents say is what the program does."""

import hashlib
import importlib.util
import re
from pathlib import Path

import pytest

from edgezo.runtime import noise

ROOT = Path(__file__).parents[1]


def test_the_command_page_is_what_help_prints() -> None:
    spec = importlib.util.spec_from_file_location("make_cli", ROOT / "docs" / "make_cli.py")
    assert spec is not None
    assert spec.loader is not None
    make_cli = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_cli)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == make_cli.text()


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
def test_the_noise_page_has_the_hash_of_each_table(distribution: noise.Distribution) -> None:
    digest = hashlib.sha256(noise.table(distribution)[: noise.TABLE_SIZE].astype("<f4").tobytes()).hexdigest()
    assert digest in (ROOT / "docs" / "noise.md").read_text(encoding="utf-8")


def test_links_between_documents_lead_somewhere() -> None:
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
    assert len(pages) > 6
    for page in pages:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_readme_and_the_package_show_the_same_example() -> None:
    import edgezo

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    calls = re.findall(r"edgezo\.(\w+)\(", readme)
    assert calls == ["export_model", "tune", "EdgeModel", "predict"] == re.findall(r"edgezo\.(\w+)\(", edgezo.__doc__ or "")


def test_the_demo_notes_are_distinct_and_split_as_their_readme_says() -> None:
    import json

    rows = {
        split: [json.loads(line) for line in (ROOT / "examples" / "notes" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()]
        for split in ("train", "validation", "test")
    }
    assert {split: len(part) for split, part in rows.items()} == {"train": 400, "validation": 100, "test": 180}
    texts = [row["text"].casefold() for part in rows.values() for row in part]
    assert len(set(texts)) == len(texts) == 680
    assert all(6 <= len(text.split()) <= 20 for text in texts)
    assert {row["label"] for part in rows.values() for row in part} == {"family", "health", "money", "travel", "work"}
