"""Other libraries' progress bars, warnings and advice, kept out of edgezo's own lines."""

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

LOGGERS = ("torch.onnx", "transformers", "optimum", "accelerate", "huggingface_hub")


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence while loading and tracing: the check at the end of an export decides, not a tracer's guess. Exceptions pass."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    for name in LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
