"""A trained student in the formats that others run: GGUF, ONNX, int8; each checked against the student itself."""

from redistill.export.command import FORMATS, Exported, export

__all__ = ["FORMATS", "Exported", "export"]
