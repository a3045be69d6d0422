"""Optimizer steps whose loss or gradients are not finite: left out, counted, and after three in a row the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from redistill import checkpoint, ranks, zero
from redistill.wrapped import local

IN_A_ROW = 3


class NotFinite(RuntimeError):
    """The loss or its gradients were NaN or infinite in three steps in a row."""


class BadSteps:
    """Counts them. skipped: in all; in_a_row: up to the last step."""

    def __init__(self) -> None:
        self.in_a_row = self.skipped = 0

    def leave_out(
        self, losses: Sequence[Tensor], trained: Sequence[nn.Parameter], deepspeed: Any = None
    ) -> None:
        """Drop the gradients of a step that is not finite, so that nothing is updated: on all ranks, if on one.

        deepspeed: the student's engine, if it has one; it updates the student here, or not.
        """
        finite = all(bool(torch.isfinite(loss)) for loss in losses) and _finite_gradients(trained)
        if deepspeed is not None:
            finite &= zero.finite(deepspeed)
        if not ranks.any_true(not finite):
            self.in_a_row = 0
            if deepspeed is not None:
                zero.take_step(deepspeed)
            return
        if deepspeed is not None:
            zero.leave_out(deepspeed)
        for parameter in trained:
            parameter.grad = None
        self.skipped += 1
        self.in_a_row += 1

    def stop_a_lost_run(self, step: int, run: Path) -> None:
        """Raises NotFinite, with what to do, after the third in a row."""
        if self.in_a_row < IN_A_ROW:
            return
        # The update before them may be what broke the weights: those before that one gave a finite loss.
        good = checkpoint.latest(run, step - self.in_a_row - 1)
        newer = "" if good == checkpoint.latest(run) else ", delete the newer checkpoints"
        then = f"{newer} and go on from there with --resume" if good else " and start anew"
        raise NotFinite(
            f"loss or gradients were not finite in {self.in_a_row} steps in a row, up to step {step}; "
            f"nothing was updated in them. Last good checkpoint: {good or 'none yet'}. Lower "
            f"training.learning_rate, or objective.dac.learning_rate{then}."
        )


def _finite_gradients(parameters: Sequence[nn.Parameter]) -> bool:
    """One look at the device for all of them."""
    sums = [local(p.grad).float().sum() for p in parameters if p.grad is not None]
    return not sums or bool(torch.isfinite(torch.stack([s.to(sums[0].device) for s in sums])).all())
