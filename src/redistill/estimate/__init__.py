"""How much memory and arithmetic a recipe takes before it runs: from the models' configs, without their weights."""

from redistill.estimate.fit import Estimate, Suggestion, Switched, estimate
from redistill.estimate.machine import Machine

__all__ = ["Estimate", "Machine", "Suggestion", "Switched", "estimate"]
