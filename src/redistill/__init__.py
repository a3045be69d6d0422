"""redistill: distil a large language model into a small one, and revise what the student writes on the way.

from redistill import DistillTrainer, load_config, revise, prune_layers
from redistill.losses import dac_kl, ClipNetwork, span_correlation, forward_kl
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redistill.config import Config, load_config
    from redistill.revision import revise_samples as revise
    from redistill.sample import Edit, Example, Message, Sample
    from redistill.student import prune_layers
    from redistill.trainer import DistillTrainer

__all__ = [
    "Config",
    "DistillTrainer",
    "Edit",
    "Example",
    "Message",
    "Sample",
    "load_config",
    "prune_layers",
    "revise",
]

_WHERE = {
    "Config": ("config", "Config"),
    "load_config": ("config", "load_config"),
    "revise": ("revision", "revise_samples"),
    "Edit": ("sample", "Edit"),
    "Example": ("sample", "Example"),
    "Message": ("sample", "Message"),
    "Sample": ("sample", "Sample"),
    "prune_layers": ("student", "prune_layers"),
    "DistillTrainer": ("trainer", "DistillTrainer"),
}


def __getattr__(name: str) -> Any:
    # Loaded when asked for: `redistill --help` must not wait for torch.
    if name == "__version__":
        return version("redistill")
    if name in _WHERE:
        module, attribute = _WHERE[name]
        return getattr(import_module(f"redistill.{module}"), attribute)
    raise AttributeError(f"module 'redistill' has no attribute {name!r}")
