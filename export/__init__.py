"""The workstation half: a Hugging Face or GGUF model to an edge model. Needs `pip install 'edgezo[export]'`."""

from edgezo.export.pipeline import ExportResult, export_model

__all__ = ["ExportResult", "export_model"]
