"""An edge model, opened: verified files, weights in memory, sessions on demand."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import onnxruntime

from edgezo.adapters import PREFIX
from edgezo.config import MAX_TOKENS, Sampling
from edgezo.errors import ConfigError, DataError, EdgeModelError
from edgezo.manifest import FAMILY_WORDS, Graph, Manifest
from edgezo.manifest_reader import read_manifest, verify_file, verify_size
from edgezo.runtime.device import find_device
from edgezo.runtime.device_passes import DevicePasses
from edgezo.runtime.device_session import DeviceSession
from edgezo.runtime.graph_file import external_files
from edgezo.runtime.lora import Lora
from edgezo.runtime.machine import default_threads
from edgezo.runtime.prefix import Prefix
from edgezo.runtime.session import Session, engine_version
from edgezo.runtime.text import TextCodec
from edgezo.runtime.weight_files import load_file, read_head, refuse_too_large, view_tensor

if TYPE_CHECKING:
    from edgezo.runtime.run import StepChoice

Array = npt.NDArray[Any]
COPIES_VERSION = 7  # generation graphs before it take one copy of LoRA
INT8_ENGINE = (1, 23)  # onnxruntime 1.22 refuses 8 bits in MatMulNBits on the CPU; 4 bits run with 1.18
FED = {"input_ids", "attention_mask", "position_ids", "hidden_rows", "pair_rows", "pair_targets"}  # what the runtime knows to feed


class EdgeModel:
    """An edge model directory, verified and loaded.

    Args:
        directory: made by `edgezo export`.
        threads: threads of the engine and of the passes over the weights; the cores of this process when None.
        run: run directory whose tuned weights to rebuild from its journal; None for the base.
        step: of the run: a number, "best" (by validation) or "last".
        adapter: PEFT folder or .onnx_adapter file to use instead of a run.
        device: "cpu" or "cuda".

    Attributes:
        weights: the arrays tuning may change, by Hugging Face name, as stored (`Tensor.transposed` says how); the engine reads them.
        on_device: holds the tunable tensors of the graphs instead, when they live on an accelerator.
        adapter: what the graphs are fed beside the text; None for the base.
        head: rows of the head that a run changed.
        changed: whether it is no longer the base.

    Raises:
        EdgeModelError: a file is missing, truncated or changed, the manifest cannot be trusted, or the weights do not fit into memory.
        ConfigError: there is no such device here.
        RunError: the run cannot be read or belongs to another edge model.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        *,
        threads: int | None = None,
        run: str | os.PathLike[str] | None = None,
        step: "StepChoice" = "best",
        adapter: str | os.PathLike[str] | None = None,
        device: str = "cpu",
    ) -> None:
        self.directory, self.device = Path(directory), find_device(device)
        self.manifest: Manifest = read_manifest(self.directory)
        self.threads = threads or default_threads()
        files = self.manifest.files
        for name in files:
            verify_size(self.directory, name, files[name])
        if self.device is None:  # a device says itself what it cannot hold
            refuse_too_large(self.directory, self.manifest)
        in_memory = [tensor for tensor in self.manifest.tunable if self.device is None or tensor.name == PREFIX]
        mutable_files = {tensor.file for tensor in in_memory}
        for name in files.keys() - mutable_files:
            verify_file(self.directory, name, files[name])
        self.text = TextCodec(self.directory, self.manifest.tokenizer)
        self.buffers = {name: load_file(self.directory, name, files[name]) for name in sorted(mutable_files)}
        self.weights: dict[str, npt.NDArray[np.float32]] = {
            tensor.name: view_tensor(self.buffers[tensor.file], tensor) for tensor in in_memory
        }
        self.on_device: DevicePasses | None = None
        if self.device is not None and len(in_memory) < len(self.manifest.tunable):
            shapes = {tensor.name: tuple(tensor.shape) for tensor in self.manifest.tunable if tensor not in in_memory}
            self.on_device = DevicePasses(self.device, shapes)
            self._upload()
        self.adapter: Lora | Prefix | None = Prefix(self.weights[PREFIX]) if PREFIX in self.weights else None
        self._stored_head = read_head(self.directory, self.manifest)
        self.head = self._stored_head
        self.step: int | None = None
        self.changed = self._one_session = False
        if run is not None or adapter is not None:
            self.use(run=run, step=step, adapter=adapter)

    def use(
        self,
        *,
        run: str | os.PathLike[str] | None = None,
        step: "StepChoice" = "best",
        adapter: str | os.PathLike[str] | None = None,
    ) -> int | None:
        """Switch to the model of a run, to an adapter, or with neither back to the base. Frozen weights and sessions stay loaded.

        Returns:
            The number of the step of the run; None without one.

        Raises:
            EdgezoError: the run or adapter cannot be read or does not fit; the model is then as it was, or the base if the run's own
                scalars were at fault.
        """
        if run is not None and adapter is not None:
            raise ConfigError(f"--run {run} and --adapter {adapter}: two models were asked for; give one of the two")
        from edgezo.runtime.adapter_files import read_adapter
        from edgezo.runtime.replay import read_tuned, rebuild

        read = read_tuned(self, run, step) if run is not None else None
        other = read_adapter(Path(adapter), self.manifest) if adapter is not None else None
        self._restore()
        self.changed = read is not None or other is not None
        if read is not None:
            try:
                rebuild(self, *read)
            except BaseException:
                self._restore()
                raise
            self.step = read[1]
        if isinstance(other, Prefix) and isinstance(self.adapter, Prefix):
            self.adapter.array[...] = other.array
        elif other is not None:
            self.adapter = other
            self.head = other.head if isinstance(other, Lora) and len(other.head.tokens) else self.head
        return self.step

    def reset(self) -> None:
        """The base again, whatever was changed."""
        self.changed = True
        self._restore()

    def _restore(self) -> None:
        """The base again: tunable weights as in their files, no adapter but the prefix that is stored."""
        if self.changed:
            for name in {tensor.file for tensor in self.manifest.tunable} - self.buffers.keys():
                verify_file(self.directory, name, self.manifest.files[name])
            self._upload()
            for name, buffer in self.buffers.items():
                load_file(self.directory, name, self.manifest.files[name], buffer)
        if isinstance(self.adapter, Lora):
            self.adapter = None
        self.head = self._stored_head
        self.step, self.changed = None, False

    @property
    def generates_copies(self) -> bool:
        """Whether answers can be written under several copies of the adapter at once. On a device not: copies would be compared with those before at every token."""
        takes = isinstance(self.adapter, Prefix) or (isinstance(self.adapter, Lora) and self.manifest.version >= COPIES_VERSION)
        return takes and self.device is None

    def feeds(self) -> dict[str, Array]:
        """What every run of a graph is fed beside the text: the adapter, one copy, and the rows of the head."""
        return {**(self.adapter.feeds() if self.adapter is not None else {}), **self.head_feeds()}

    def head_feeds(self) -> dict[str, Array]:
        """The rows of the head alone."""
        return self.head.feeds(self.manifest) if self.manifest.takes_head_rows else {}

    @property
    def remedy(self) -> str:
        """What to do where its scores are not finite."""
        if self.device is not None and self.manifest.weights == "fp16":
            return "export the model without --weights fp16, in which activations end at 65504"
        return "export the model again"

    def _upload(self) -> None:
        """The tunable tensors as in their files to the device."""
        if self.on_device is not None:
            for tensor in self.manifest.tunable:
                if tensor.name in self.on_device.shapes:
                    stored = np.memmap(self.directory / tensor.file, "<f4", "r", tensor.offset, tuple(tensor.shape))
                    self.on_device.upload(tensor.name, stored)

    @property
    def context(self) -> int:
        """Tokens a text may have; a prefix takes its share of the model's context."""
        return self.manifest.origin.context_length - (self.adapter.prefix_tokens if self.adapter is not None else 0)

    @cached_property
    def scoring(self) -> Session:
        """The scoring graph; made at first use."""
        self._let_go("generation")
        return self._session(self.manifest.scoring)

    @cached_property
    def generation(self) -> Session:
        """The generation graph over the same weights; made at first use."""
        self._let_go("scoring")
        return self._session(self.generation_facts)

    def _let_go(self, other: Literal["scoring", "generation"]) -> None:
        if self._one_session:
            self.__dict__.pop(other, None)

    @contextmanager
    def one_session(self) -> Iterator[None]:
        """Inside, making a session lets the other one go, where each holds frozen weights of its own: with LoRA or a prefix, on the CPU.

        docs/decisions.md has what it takes and saves. Weights that are changed in place are shared by both, and a session that was proven to see their changes must stay.
        """
        before, self._one_session = self._one_session, self.device is None and self.manifest.adapter is not None
        try:
            yield
        finally:
            self._one_session = before

    @property
    def generation_facts(self) -> Graph:
        """What the manifest says of the generation graph.

        Raises:
            ConfigError: there is none, the model is no causal one.
        """
        if self.manifest.generation is None:
            use = "predict" if self.manifest.origin.family == "classifier" else "predict with a template that has {mask}"
            raise ConfigError(
                f"{self.directory}: is {FAMILY_WORDS[self.manifest.origin.family]}, which writes no text; use edgezo {use}, or export a causal model"
            )
        return self.manifest.generation

    def fresh_scoring(self) -> Session:
        """A new session of the scoring graph, loaded from the weights as they are now."""
        return self._session(self.manifest.scoring)

    def fresh_generation(self) -> Session:
        """A new session of the generation graph, loaded from the weights as they are now."""
        return self._session(self.generation_facts)

    def generate(self, prompt: str, max_tokens: int = MAX_TOKENS, sampling: Sampling | None = None) -> str:
        """Continue `prompt` by at most `max_tokens` tokens; greedy unless `sampling` is given. Returns the new text alone.

        Raises:
            DataError: the prompt is empty or fills the context.
            ConfigError: a sampling setting is out of range.
            NonFiniteLossError: the model gives no finite logits.
        """
        from edgezo.runtime.generate import generate

        return "".join(generate(self, prompt, max_tokens, sampling))

    def log_probs(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """log p(completion | prompt) of each pair, summed over the completion's tokens, in nats; an empty completion has 0.

        Raises:
            ConfigError: the model is no causal one.
            DataError: a prompt is empty and the model has no beginning-of-text token.
        """
        from edgezo.runtime.scoring import Sequences

        if self.manifest.origin.family != "causal":
            raise ConfigError(
                f"{self.directory}: is {FAMILY_WORDS[self.manifest.origin.family]}, which continues no prompt; use edgezo predict"
            )
        pairs = [self._pair(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]
        found = iter(Sequences(self).log_probs([pair for pair in pairs if pair[1]]))
        return [float(next(found).sum()) if pair[1] else 0.0 for pair in pairs]

    def _pair(self, prompt: str, completion: str) -> tuple[list[int], list[int]]:
        if not completion:
            return [], []
        head, tail = self.text.split(prompt, completion)
        if not head:
            if self.text.facts.bos_token_id is None:
                raise DataError("a prompt is empty and this model has no beginning-of-text token; give some text")
            head = [self.text.facts.bos_token_id]
        if len(head) + len(tail) > self.context:
            raise DataError(
                f"prompt and completion have {len(head) + len(tail)} tokens, the model's context is {self.context}; shorten them"
            )
        return head, tail

    def _session(self, graph: Graph) -> Session:
        strange = external_files(self.directory / graph.file) - {tensor.file for tensor in self.manifest.tensors}
        if strange:
            raise EdgeModelError(
                f"{self.directory / graph.file}: refers to {sorted(strange)[0]!r}, which is no weight file of this edge model; copy or export it again"
            )
        if self.manifest.weights == "int8" and engine_version() < INT8_ENGINE:
            raise EdgeModelError(
                f"{self.directory}: its int8 weights need onnxruntime {'.'.join(map(str, INT8_ENGINE))} or later, this is {onnxruntime.__version__}; update it, or export with --weights int4"
            )
        path = self.directory / graph.file
        if self.device is not None:
            session: Session = DeviceSession(
                path, self.on_device, {tensor.file for tensor in self.manifest.tunable}, self.device, self.threads
            )
        else:
            session = Session(path, {name: array for name, array in self.weights.items() if name != PREFIX}, self.threads)
        listed = {*graph.inputs, *(state.input for state in graph.past)}
        written = {*graph.outputs, *(state.output for state in graph.past)}
        if session.inputs != listed or not listed - {state.input for state in graph.past} <= FED or not written <= session.outputs:
            raise EdgeModelError(
                f"{self.directory / graph.file}: its inputs or outputs are not those of the manifest ({', '.join(sorted(session.inputs ^ listed)[:3]) or 'unknown ones'}); copy or export the edge model again"
            )
        return session
