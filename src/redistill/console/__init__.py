"""What a run says on the terminal: tables, a revision as a person would mark it, and progress.

Model text is text here and nothing else: neither read as markup nor let through with control characters.
All is readable without colour too. Importing this loads rich, but neither torch nor transformers.
"""

from redistill.console.counting import CountDisplay
from redistill.console.estimates import estimate_table, estimate_text, savers_table
from redistill.console.marks import Marked, excerpt, marked_from_sample, marked_revision, show_revision
from redistill.console.plain import plain_text
from redistill.console.progress import StepDisplay, training_progress
from redistill.console.tables import (
    answers_table,
    evaluation_table,
    judge_table,
    position_table,
    profile_table,
    task_table,
)

__all__ = [
    "CountDisplay",
    "Marked",
    "StepDisplay",
    "answers_table",
    "estimate_table",
    "estimate_text",
    "evaluation_table",
    "excerpt",
    "judge_table",
    "marked_from_sample",
    "marked_revision",
    "plain_text",
    "position_table",
    "profile_table",
    "savers_table",
    "show_revision",
    "task_table",
    "training_progress",
]
