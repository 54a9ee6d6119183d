"""Feed damaged files to every reader under libFuzzer's guidance; anything but a refusal in one line is a crash.

    pip install atheris
    python tests/fuzz/readers.py EDGE RUN journal -max_total_time=600
    python tests/fuzz/readers.py EDGE RUN all -max_total_time=600        # each reader in turn

EDGE and RUN are a small edge model and a run of it: the seeds. The readers: journal, run, signed, manifest, graph, tokenizer, chat, config,
jsonl, csv, tsv; with an edge model made for LoRA also peft-config, peft-tensors, onnx-adapter. Results of the longest run so far: docs/fuzzing.md.
"""

import shutil
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["edgezo"]):
    from edgezo.config import make_config
    from edgezo.errors import EdgezoError
    from edgezo.manifest_reader import read_manifest
    from edgezo.runtime.adapter_files import read_adapter
    from edgezo.runtime.data import read_rows
    from edgezo.runtime.examples import make_examples
    from edgezo.runtime.graph_file import disconnected, external_files
    from edgezo.runtime.journal_reader import read_journal
    from edgezo.runtime.journal_records import record_bytes
    from edgezo.runtime.lora import Lora
    from edgezo.runtime.onnx_adapter import write_onnx_adapter
    from edgezo.runtime.peft_folder import CONFIG, TENSORS, write_peft
    from edgezo.runtime.run import read_run
    from edgezo.runtime.tasks import find_task
    from edgezo.runtime.text import TextCodec

Reader = tuple[Path, Callable[[Path], object]]  # the file to damage (its content is the seed), and what reads it


def readers(edge: Path, run: Path, folder: Path) -> dict[str, Reader]:
    """Every reader over copies of the seeds in `folder`."""
    edge, run = Path(shutil.copytree(edge, folder / "edge")), Path(shutil.copytree(run, folder / "run"))
    manifest = read_manifest(edge)
    codec = TextCodec(edge, manifest.tokenizer)
    rows = folder / "rows.jsonl"
    rows.write_text('{"text": "a film", "label": "good"}\n{"text": "\\u20ac", "label": "bad"}\n', encoding="utf-8")
    for name, mark in (("rows.csv", ","), ("rows.tsv", "\t")):
        (folder / name).write_text(f'text{mark}label\na film{mark}good\n"a ""b"""{mark}bad\n', encoding="utf-8")
    (folder / "settings.yaml").write_text("data: x\nlr: 1e-3\nlabels: {a: b, c: d}\nsteps: 3\n", encoding="utf-8")

    def data(path: Path) -> None:
        found = read_rows(path)
        make_examples(found, find_task(found, "{text}:", None, "label"), codec, 64)

    def chat(path: Path) -> None:
        TextCodec(edge, manifest.tokenizer).chat([{"role": "user", "content": "a"}], reply=True)

    def tokenizer(path: Path) -> None:
        TextCodec(edge, manifest.tokenizer).encode("a film")

    def signed(path: Path) -> None:
        """The damaged header and records with right checksums, so that what they hold is read."""
        data = path.read_bytes()
        length = min(int.from_bytes(data[8:12], "little"), len(data))
        parts, position = [b"EDGEZOJ1" + len(data[12 : 12 + length]).to_bytes(4, "little") + data[12 : 12 + length]], 16 + length
        while position < len(data):
            size = max(5, record_bytes(data, position, 1))
            parts.append(data[position : position + size - 4])
            position += size
        checksum, whole = 0, b""
        for part in parts:
            checksum = zlib.crc32(part, checksum)
            whole += part + checksum.to_bytes(4, "little")
        path.write_bytes(whole)
        read_run(run)

    adapters: dict[str, Reader] = {}
    if manifest.adapter is not None and manifest.adapter.kind == "lora":
        (folder / "peft").mkdir()
        lora = Lora(manifest.adapter.targets, 2, 4.0)
        lora.initialise(0)
        write_peft(lora, manifest, folder / "peft")
        write_onnx_adapter(lora, manifest, folder / "x.onnx_adapter")
        for name, path in (("peft-config", folder / "peft" / CONFIG), ("peft-tensors", folder / "peft" / TENSORS)):
            adapters[name] = (path, lambda path: read_adapter(path.parent, manifest))
        adapters["onnx-adapter"] = (folder / "x.onnx_adapter", lambda path: read_adapter(path, manifest))

    return {
        **adapters,
        "journal": (run / "journal.bin", read_journal),
        "run": (run / "journal.bin", lambda path: read_run(run)),
        "signed": (run / "journal.bin", signed),
        "manifest": (edge / "manifest.json", lambda path: read_manifest(edge)),
        "graph": (edge / "scoring.onnx", lambda path: (disconnected(path, ["x"]), external_files(path))),
        "tokenizer": (edge / "tokenizer.json", tokenizer),
        "chat": (edge / "chat_template.jinja", chat),
        "config": (folder / "settings.yaml", lambda path: make_config(path, {})),
        "jsonl": (rows, data),
        "csv": (folder / "rows.csv", data),
        "tsv": (folder / "rows.tsv", data),
    }


def fuzz(reader: Reader, arguments: list[str], corpus: Path) -> None:
    """Run one reader until libFuzzer's limits."""
    path, read = reader
    corpus.mkdir()
    shutil.copyfile(path, corpus / "seed")

    def one(data: bytes) -> None:
        path.write_bytes(data)
        try:
            read(path)
        except EdgezoError as error:
            if len(str(error).splitlines()) != 1:
                raise RuntimeError(f"not one line: {error!r}") from error

    atheris.Setup([sys.argv[0], *arguments, str(corpus)], one)
    atheris.Fuzz()


def main() -> None:
    """One reader in this process, or all in turn in processes of their own."""
    edge, run, name, *arguments = sys.argv[1:]
    with tempfile.TemporaryDirectory(prefix="edgezo-fuzz-") as folder:
        known = readers(Path(edge), Path(run), Path(folder))
        if name != "all":
            fuzz(known[name], arguments, Path(folder) / "corpus")
            return
    failed = [name for name in known if subprocess.run([sys.executable, __file__, edge, run, name, *arguments]).returncode]
    print(f"{len(known)} readers, crashes in: {', '.join(failed) or 'none'}")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
