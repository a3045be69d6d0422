"""The optimizer of the clip network, beside the engine's.

Under FSDP2 the engine's optimizer knows the student's sharded weights and nothing else, so the network has one of its
own, whatever the engine does. It follows the engine's schedule.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from redistill import ranks


class ClipOptimizer:
    """AdamW on the parameters of an objective, without weight decay; nothing where it has none.

    rate: the learning rate at the top of the schedule. The betas and epsilon are the engine's.
    """

    def __init__(self, objective: nn.Module, rate: float, args: TrainingArguments):
        self.parameters, self._rate = list(objective.parameters()), rate
        betas = args.adam_beta1, args.adam_beta2
        options = {"lr": rate, "betas": betas, "eps": args.adam_epsilon, "weight_decay": 0.0}
        self._optimizer = torch.optim.AdamW(self.parameters, **options) if self.parameters else None

    def gather(self, scaler: Any = None) -> None:
        """Bring the gradients of all ranks together, and take the loss scale of float16 training from them."""
        ranks.average_gradients(self.parameters)
        if self._optimizer is not None and scaler is not None:
            scaler.unscale_(self._optimizer)

    def step(self, engine: torch.optim.Optimizer) -> None:
        """Update, at the share of the top rate at which `engine` is, and forget the gradients."""
        if self._optimizer is None:
            return
        group = engine.param_groups[0]
        top = group.get("initial_lr", group["lr"])
        self._optimizer.param_groups[0]["lr"] = self._rate * (group["lr"] / top if top else 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def state(self) -> dict[str, Tensor]:
        """Its moments and step counts, for a checkpoint."""
        if self._optimizer is None:
            return {}
        kept = self._optimizer.state_dict()["state"]
        return {f"{place}.{name}": value for place, each in kept.items() for name, value in each.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put back what `state` returned."""
        if self._optimizer is None:
            return
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            place, _, name = key.partition(".")
            state.setdefault(int(place), {})[name] = value
        self._optimizer.load_state_dict({**self._optimizer.state_dict(), "state": state})
