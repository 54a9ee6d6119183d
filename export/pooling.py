"""What a new head of classes reads of an encoder: its architecture's own choice, or the pooling of sentence-transformers."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_outputs import SequenceClassifierOutput

from edgezo.errors import ExportError, first_line
from edgezo.manifest import Pooling

POOLING_FILE = "1_Pooling/config.json"  # of a sentence-transformers folder
NAMES = {"mean_tokens": "mean", "cls_token": "cls"}  # of its pooling_mode_*; other modes keep their own
HEAD = ("classifier.weight", "classifier.bias")


class PooledClassifier(torch.nn.Module):  # type: ignore[misc]  # torch is not read by the type checker
    """An encoder with one linear layer: logits = W s + b.

        mean: s = sum_t mask[t] h[t] / sum_t mask[t]          cls: s = h[0]          h: the last token states

    Args:
        model: with the architecture's own head, which is left out; the encoder's weights keep their names. W is drawn anew, with
            standard deviation `initializer_range` of its configuration, b is 0.
        pooling: "mean" or "cls".

    References:
        Reimers and Gurevych 2019, Sentence-BERT (arXiv 1908.10084).
    """

    def __init__(self, model: Any, pooling: Pooling) -> None:
        super().__init__()
        encoder, self.config, self.pooling = model.base_model, model.config, pooling
        if getattr(encoder, "pooler", None) is not None:
            encoder.pooler = None
        self._supports_attention_backend = getattr(model, "_supports_attention_backend", False)
        self._encoder = model.base_model_prefix
        setattr(self, self._encoder, encoder)
        self.classifier = torch.nn.Linear(self.config.hidden_size, self.config.num_labels)
        torch.nn.init.normal_(self.classifier.weight, std=self.config.initializer_range)
        torch.nn.init.zeros_(self.classifier.bias)

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, token_type_ids: torch.Tensor | None = None
    ) -> SequenceClassifierOutput:
        """Logits [batch, classes] of token ids [batch, sequence]; without a mask every token counts."""
        given = {"token_type_ids": token_type_ids} if token_type_ids is not None else {}
        states = getattr(self, self._encoder)(input_ids, attention_mask=attention_mask, **given).last_hidden_state
        if self.pooling == "cls":
            state = states[:, 0]
        else:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            weight = mask.unsqueeze(-1).to(states.dtype)
            state = (states * weight).sum(1) / weight.sum(1)
        return SequenceClassifierOutput(logits=self.classifier(state))


def find_pooling(location: str, shown: str, revision: str | None) -> Pooling | None:
    """The pooling that 1_Pooling/config.json of a sentence-transformers folder says; None where there is no such file.

    Args:
        location: hub id or folder.
        shown: as the user gave it.

    Raises:
        ExportError: it says another pooling than mean or cls, or cannot be read; or the hub, which would tell, cannot be reached.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError
    from transformers.utils import cached_file

    try:
        file = cached_file(location, POOLING_FILE, revision=revision)
    except OSError as error:
        if isinstance(error.__cause__, LocalEntryNotFoundError):
            raise ExportError(
                f"{shown}: the hub cannot be reached to look for its {POOLING_FILE}; say with --pooling what the new head reads: mean, cls or pooler"
            ) from error
        return None  # the model has none
    try:
        found = json.loads(Path(str(file)).read_text(encoding="utf-8"))
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}, not settings")
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{shown}: its {POOLING_FILE} cannot be read ({first_line(error)}); give --pooling mean, cls or pooler") from None
    modes = _modes(found)
    if modes == ["mean"]:
        return "mean"
    if modes == ["cls"]:
        return "cls"
    raise ExportError(
        f"{shown}: its {POOLING_FILE} says {' and '.join(modes) or 'nothing'}, a new head reads one of mean, cls and pooler; choose with --pooling"
    )


def _modes(found: dict[str, Any]) -> list[str]:
    """`pooling_mode_mean_tokens: true`, or as newer versions write it `pooling_mode: mean`."""
    if "pooling_mode" in found:
        named = found["pooling_mode"]
        return [str(mode) for mode in named] if isinstance(named, list) else [str(named)]
    chosen = [key.removeprefix("pooling_mode_") for key, value in found.items() if key.startswith("pooling_mode_") and value]
    return [NAMES.get(mode, mode) for mode in chosen]
