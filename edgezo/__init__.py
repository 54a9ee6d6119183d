"""edgezo: fine-tune language models on laptops and Jetsons with nothing but an inference engine.

import edgezo

edgezo.export_model("HuggingFaceTB/SmolLM2-135M-Instruct", "edge")  # on the workstation: pip install 'edgezo[export]'
result = edgezo.tune("edge", "run", data="train.jsonl", valid="valid.jsonl", template="{sentence} It was", labels="terrible,great", steps=300)
print(result.before.accuracy, "->", result.best.accuracy)

model = edgezo.EdgeModel("edge", run="run")  # base + journal = the tuned model
print(model.generate("A film to remember. It was", max_tokens=20))
print(edgezo.predict("edge", run="run", texts=["A film to remember."])[0].label)
print(model.log_probs(["A joy to watch. It was"] * 2, [" terrible", " great"]))
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from edgezo.api import evaluate as evaluate
    from edgezo.api import export_model as export_model
    from edgezo.api import predict as predict
    from edgezo.api import probe as probe
    from edgezo.api import tune as tune
    from edgezo.config import Sampling as Sampling
    from edgezo.config import TuneConfig as TuneConfig
    from edgezo.errors import EdgezoError as EdgezoError
    from edgezo.runtime.model import EdgeModel as EdgeModel
    from edgezo.runtime.tune import Reporter as Reporter

__version__ = "0.1.0"

# else onnxruntime 1.29 and later tell their makers of every session, with the model's file name and the hardware, on Linux and macOS too; it
# is read once, when onnxruntime is imported
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

# loaded at first use: the device never needs torch, and `edgezo --help` waits for nothing
_HOMES = {
    "EdgeModel": "edgezo.runtime.model",
    "EdgezoError": "edgezo.errors",
    "Reporter": "edgezo.runtime.tune",
    "Sampling": "edgezo.config",
    "TuneConfig": "edgezo.config",
    "evaluate": "edgezo.api",
    "export_model": "edgezo.api",
    "predict": "edgezo.api",
    "probe": "edgezo.api",
    "tune": "edgezo.api",
}
__all__ = [
    "EdgeModel",
    "EdgezoError",
    "Reporter",
    "Sampling",
    "TuneConfig",
    "__version__",
    "evaluate",
    "export_model",
    "predict",
    "probe",
    "tune",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgezo' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
