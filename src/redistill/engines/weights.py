"""The student's weights as a folder that another engine can load: whole, with LoRA merged."""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from redistill.loading import quiet_loading
from redistill.models import plain_model


class WeightFolders:
    """Folders of weights under `parent` (None: the system's place for temporary files); gone when the run ends."""

    def __init__(self, parent: str | None = None):
        if parent is not None:
            Path(parent).mkdir(parents=True, exist_ok=True)
        self._home = tempfile.TemporaryDirectory(prefix="redistill-weights-", dir=parent)
        self._count = 0

    @contextmanager
    def written(self, model: nn.Module) -> Iterator[Path]:
        """A new folder with the model's weights as they are now; folders of earlier calls are removed at the end.

        The name is new each time, so that nothing read earlier can be taken for it.
        """
        self._count += 1
        folder = Path(self._home.name).resolve() / str(self._count)
        with quiet_loading():
            plain_model(model).save_pretrained(str(folder), state_dict=whole_weights(model))
        yield folder
        for earlier in folder.parent.iterdir():
            if earlier != folder:
                shutil.rmtree(earlier)


@torch.no_grad()
def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state of the plain model inside `model`, what active LoRA adapters add included; `model` is not changed.

    Errors: ValueError for an adapter of a weight that another module shares (a tied head): merged, it is two weights.
    """
    from peft.tuners.lora import LoraLayer

    plain = plain_model(model)
    weights = {
        name.replace(".base_layer.", "."): value
        for name, value in plain.state_dict().items()
        if ".lora_" not in name
    }
    shared = Counter(value.data_ptr() for value in weights.values())
    adapted: list[tuple[str, Any]] = [
        (f"{name}.weight", module) for name, module in plain.named_modules() if isinstance(module, LoraLayer)
    ]
    for name, module in adapted:
        if shared[weights[name].data_ptr()] > 1:
            raise ValueError(f"{name} has an adapter and is tied to another weight: vLLM cannot hold both.")
        for adapter in module.active_adapters:
            weights[name] = weights[name] + module.get_delta_weight(adapter)
    return weights
