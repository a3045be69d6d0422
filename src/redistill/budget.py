"""What a run may spend: student tokens or seconds in place of steps, and a learning rate that follows it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from redistill.config import BudgetSettings

# The engine's schedules count steps: a run without a known number of them is cut into so many.
SCHEDULE_STEPS = 10_000
# More steps than any budget pays for: the engine wants a number.
NO_END = 100_000_000


@dataclass
class Spending:
    """What was spent so far. The step log has every step's cost, so that a resumed run counts on from there."""

    budget: BudgetSettings
    seconds: float = 0.0
    student_tokens: float = 0.0

    @property
    def bounded(self) -> bool:
        """Whether the budget, and not `training.max_steps`, ends the run."""
        return self.budget.seconds is not None or self.budget.student_tokens is not None

    def add(self, records: Iterable[Mapping[str, Any]]) -> Spending:
        """Count the cost of steps, as logged (`seconds`, `student_tokens`); returns itself."""
        for record in records:
            self.seconds += record["seconds"]
            self.student_tokens += record["student_tokens"]
        return self

    def fraction(self) -> float:
        """What share of the budget is spent, 0 to 1, by the bound that is nearer; 0 without a bound."""
        shares = [0.0]
        if self.budget.seconds is not None:
            shares.append(self.seconds / self.budget.seconds)
        if self.budget.student_tokens is not None:
            shares.append(self.student_tokens / self.budget.student_tokens)
        return min(max(shares), 1.0)


def cost_of(records: Iterable[Mapping[str, Any]], step: int) -> dict[str, float]:
    """What a step log says of the steps up to `step`, together."""
    counted = [record for record in records if record["step"] <= step]
    return {name: sum(record[name] for record in counted) for name in ("seconds", "student_tokens")}


def follow_spending(scheduler: LRScheduler, fraction: Callable[[], float]) -> None:
    """Let a schedule made for `SCHEDULE_STEPS` steps follow `fraction` (0 to 1) and not its own count.

    Raises ValueError for a schedule that is more than a factor per step.
    """
    if not isinstance(scheduler, LambdaLR):
        raise ValueError(
            f"a {type(scheduler).__name__} cannot follow a budget: set training.lr_scheduler_type to cosine, linear "
            "or constant."
        )

    def following(factor: Callable[[int], float]) -> Callable[[int], float]:
        return lambda _: factor(round(fraction() * SCHEDULE_STEPS))

    scheduler.lr_lambdas = [following(factor) for factor in scheduler.lr_lambdas]
