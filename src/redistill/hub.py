"""What of a run goes to the hub: the student, its tokenizer and its model card, and nothing else of the run folder.

The engine pushes its whole output folder: there it holds logs, data, settings with the places of this machine, and
pickles. So the engine's moments for pushing are kept, and what is pushed is ours.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from redistill import ranks
from redistill.card import Made, license_of, model_card
from redistill.checkpoint import save_model
from redistill.config import Config
from redistill.loading import first_line, load_model
from redistill.models import parameter_count, plain_model
from redistill.public import base_of, hub_id
from redistill.runlog import write_whole
from redistill.teachers.signal import Teacher
from redistill.whole_checkpoints import WholeCheckpoints
from redistill.wrapped import is_sharded, whole_weights

log = logging.getLogger(__name__)

STUDENT = "student"
"""Name of the finished student's folder in the run folder."""
PUSHED = ("*.safetensors", "*.json", "*.jinja", "*.txt", "*.model")
_STATE = ("trainer_state.json", "redistill.json", "redistill.safetensors")


def check_pushing(config: Config) -> None:
    """Raises ValueError where what the engine is told to push would be more than a model, or of no use."""
    training, base = config.training, base_of(config)
    if not training.get("push_to_hub"):
        return
    strategy = training.get("hub_strategy", "every_save")
    if strategy not in ("every_save", "end"):
        raise ValueError(
            f"training.hub_strategy is {strategy}: checkpoints hold pickles and answers to your data, and stay on "
            "this machine. Set it to every_save or end, which push the student."
        )
    lora = config.student.lora
    if lora is None:
        return
    if lora.merge and strategy != "end":
        raise ValueError(
            "training.hub_strategy: before the end of training there are only adapters, and student.lora.merge "
            "pushes a plain model in the end: set hub_strategy to end."
        )
    if not lora.merge and (config.student.prune is not None or hub_id(base) is None):
        raise ValueError(
            f"training.push_to_hub: nobody else could load an adapter of {base}, which is not on the hub as it "
            "stands. Name student.model_name_or_path by its hub id, or set student.lora.merge."
        )


class HubTrainer(WholeCheckpoints):
    """`transformers.Trainer` that pushes a student with its card; made for `DistillTrainer`."""

    config: Config
    teacher: Teacher
    tokenizer: PreTrainedTokenizerBase

    def init_hf_repo(self, token: str | None = None, private: bool | None = None) -> None:
        """The engine's. Raises ValueError where the repository cannot be had."""
        shutil.rmtree(self._staging(), ignore_errors=True)
        try:
            super().init_hf_repo(token=token, private=private)
        except (OSError, ValueError) as problem:
            name = self.args.hub_model_id or Path(str(self.args.output_dir)).name
            raise ValueError(
                f"training.push_to_hub: the repository {name!r} cannot be had: {first_line(problem)} "
                "Log in with `hf auth login`, name another training.hub_model_id, or leave push_to_hub out."
            ) from problem

    def _staging(self) -> Path:
        return Path(str(self.args.output_dir)) / ".push"

    # The model and its card

    @cached_property
    def _license(self) -> str | None:
        return license_of(base_of(self.config))

    def model_card(self, rows: Sequence[Mapping[str, Any]] = (), prompts: int = 0) -> str:
        """The model card as things stand; rows, prompts: see `card.model_card`."""
        student = self.accelerator.unwrap_model(self.model)
        name = self.hub_model_id or STUDENT
        teacher = self.teacher.model
        sizes = parameter_count(student), None if teacher is None else parameter_count(teacher)
        made = Made(name, self.config, self.state.global_step, *sizes, self._license)
        return model_card(made, rows, prompts)

    def save_student(self, folder: Path) -> None:
        """The student as a plain Hugging Face folder with tokenizer and card, whole or not there: an adapter with
        LoRA, unless it is to be merged. The first rank writes it; all come here."""
        student, card = self.accelerator.unwrap_model(self.model), self.model_card()
        lora = self.config.student.lora
        weights = whole_weights(student) if is_sharded(student) else None

        def save() -> None:
            save_model(student, self.tokenizer, folder, card=card, weights=weights)
            if lora is not None and lora.merge:
                # From the disk, so that the model in training stays as it is, sharded or not.
                merged = load_model(folder, dtype=str(plain_model(student).dtype).removeprefix("torch."))
                save_model(merged, self.tokenizer, folder, card=card)

        ranks.on_first(save)

    # Pushing

    def push_to_hub(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> Any:
        """As the engine's: save the student, here into student/ of the output folder, and push that folder."""
        folder = Path(str(self.args.output_dir)) / STUDENT
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_student(folder)
        return self.upload_student(folder, commit_message, blocking=blocking, token=token, revision=revision)

    def upload_student(
        self,
        folder: Path,
        commit_message: str | None = "End of training",
        *,
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
    ) -> Any:
        """Push what lies in `folder`, by the main process alone: the commit, or a future of it without `blocking`.

        Raises ValueError when the hub does not take it; the folder stays as it is.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        try:
            return self._upload(
                folder, commit_message, run_as_future=not blocking, token=token, revision=revision
            )
        except (OSError, ValueError) as problem:
            raise ValueError(
                f"the student in {folder} could not be pushed: {first_line(problem)} "
                f"Push it with `hf upload {self.hub_model_id} {folder}`."
            ) from problem

    def _upload(
        self, folder: Path, message: str | None, *, token: str | None, revision: str | None, **how: Any
    ) -> Any:
        from huggingface_hub import upload_folder

        return upload_folder(
            repo_id=str(self.hub_model_id),
            folder_path=folder,
            commit_message=message,
            token=token or self.args.hub_token,
            revision=revision or self.args.hub_revision,
            **how,
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """The engine's push of every save, in the background, of links that no later save touches."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        under_way = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if under_way and not self.args.hub_always_push:
            return
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        step = self.state.global_step
        staged = self._staging() / str(step)
        link_model(Path(checkpoint_folder), staged)
        write_whole(staged / "README.md", self.model_card())
        message = f"Training in progress, step {step}"
        job = self._upload(staged, message, run_as_future=True, token=None, revision=None)

        def done(job: Future[Any]) -> None:
            problem = job.exception()
            if isinstance(problem, Exception):
                log.warning("step %d was not pushed: %s", step, first_line(problem))
            shutil.rmtree(staged, ignore_errors=True)

        job.add_done_callback(done)
        # Of a type that its own class does not tell.
        jobs: Any = [job]
        if under_way and self.push_in_progress is not None:
            jobs += self.push_in_progress.jobs
        self.push_in_progress = PushInProgress(jobs)


def link_model(checkpoint: Path, target: Path) -> None:
    """Hard links in `target` (copies where the disk has none) to those files of a checkpoint that are the model."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    for path in sorted(file for pattern in PUSHED for file in checkpoint.glob(pattern)):
        if path.name in _STATE:
            continue
        try:
            os.link(path, target / path.name)
        except OSError:
            shutil.copy2(path, target / path.name)
