"""Models in Hugging Face form, out and in; importing this package imports pydantic."""

from pytrain.checkpoint.huggingface.exporting import export_huggingface, model_of
from pytrain.checkpoint.huggingface.importing import ImportedRun, import_huggingface

__all__ = ["ImportedRun", "export_huggingface", "import_huggingface", "model_of"]
