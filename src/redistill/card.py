"""The student's model card: what was distilled into what and how, what it scores, and how to load it.

A page of Markdown under the front matter that the hub reads. Names that belong to this machine (folders, servers,
tokens) stay out of it: `public.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from redistill.chat import ALPACA
from redistill.config import Config
from redistill.markdown import fenced, plain_markdown
from redistill.methods import find_method
from redistill.public import base_of, hub_id, public_name, public_settings
from redistill.versions import versions

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

CITATION = """\
@inproceedings{liu2026multigranularity,
  title     = {Multi-Granularity Semantic Revision for Large Language Model Distillation},
  author    = {Liu, Xiaoyu and Zhang, Yun and Li, Wei and Li, Simiao and Huang, Xudong and Chen, Hanting and
               Tang, Yehui and Hu, Jie and Xiong, Zhiwei and Wang, Yunhe},
  booktitle = {Proceedings of the 64th Annual Meeting of the Association for Computational Linguistics},
  year      = {2026},
  note      = {arXiv:2407.10068}
}"""
QUESTION = "Why is the sky blue?"


@dataclass(frozen=True)
class Made:
    """What a card tells of. name: a hub id, or the name of the student's folder. steps: optimizer steps done.
    student, teacher: parameters, tied weights counted once; None of a teacher that was not here. license: the base's,
    as `license_of` finds it."""

    name: str
    config: Config
    steps: int
    student: int
    teacher: int | None
    license: str | None = None


def model_card(made: Made, rows: Sequence[Mapping[str, Any]] = (), prompts: int = 0) -> str:
    """The text of README.md. rows: those of results.json, measured on so many `prompts`; none: not measured."""
    parts = [
        f"---\n{_front_matter(made, rows)}\n---",
        f"# {plain_markdown(made.name.split('/')[-1])}",
        _summary(made),
    ]
    parts += ["## Method", "\n".join(f"- {line}" for line in _method(made.config))]
    parts += ["## Measured", _measured(made.config, rows, prompts)]
    parts += ["## How to load", _loading(made)]
    settings = yaml.safe_dump(public_settings(made.config), sort_keys=False, allow_unicode=True)
    parts += [
        "## Recipe",
        "<details><summary>The settings that differ from redistill's defaults; names of this machine are left out"
        f"</summary>\n\n{fenced(settings, 'yaml')}\n\n</details>",
        "Made with "
        + ", ".join(f"{name} {plain_markdown(version)}" for name, version in versions().items())
        + ".",
        "## Citation",
        fenced(CITATION, "bibtex"),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(made: Made, rows: Sequence[Mapping[str, Any]]) -> str:
    from huggingface_hub import ModelCardData

    config, base = made.config, hub_id(base_of(made.config))
    lora, data = config.student.lora, hub_id(config.data.path)
    adapter = lora is not None and not lora.merge
    results = _results(config, rows)
    known = {
        "license": made.license,
        "base_model": base,
        "base_model_relation": ("adapter" if adapter and not config.student.prune else "finetune")
        if base
        else None,
        "datasets": [data] if data else None,
        **({"model_name": made.name, "eval_results": results} if results else {}),
    }
    return ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        tags=["knowledge-distillation", "redistill", "arxiv:2407.10068"],
        **{name: value for name, value in known.items() if value is not None},
    ).to_yaml()


def license_of(name: str) -> str | None:
    """The licence that the card of the model `name` (hub id or folder) states; None where none can be read."""
    from huggingface_hub import HfApi, ModelCard

    try:
        if Path(name).is_dir():
            found = ModelCard.load(Path(name) / "README.md").data.get("license")
        else:
            data = HfApi().model_info(name, timeout=5).card_data if hub_id(name) else None
            found = data.get("license") if data else None
    except Exception:  # No card, no network, no such model: whatever it is, the licence is not known.
        return None
    return found if isinstance(found, str) else None


def _results(config: Config, rows: Sequence[Mapping[str, Any]]) -> list[EvalResult]:
    """The student's figures as the hub has them: only on data that it knows."""
    from huggingface_hub import EvalResult

    place, split = _evaluated_on(config)
    data = hub_id(place)
    if data is None or not rows:
        return []
    about: dict[str, Any] = {
        "task_type": "text-generation",
        "dataset_type": data,
        "dataset_name": data,
        "dataset_split": split,
    }
    figures = {
        "rouge": ("rougeL_mean", "ROUGE-L, sampled"),
        "perplexity": ("perplexity", "perplexity of the references"),
    }
    return [
        EvalResult(metric_type=metric, metric_name=title, metric_value=round(rows[-1][key], 4), **about)
        for metric, (key, title) in figures.items()
        if rows[-1].get(key) is not None
    ]


def _evaluated_on(config: Config) -> tuple[str, str]:
    data, settings = config.data, config.evaluation
    if settings.path is not None:
        return settings.path, settings.split or "test"
    return data.eval_path or data.path, data.eval_split or ("test" if data.eval_path else data.split)


def _summary(made: Made) -> str:
    config, student = made.config, made.config.student
    teacher = plain_markdown(public_name(config.teacher.model_name_or_path))
    size = "" if made.teacher is None else f" ({_millions(made.teacher)})"
    begun = "layers of the teacher" if student.prune else plain_markdown(public_name(base_of(config)))
    lora = f", trained as a LoRA adapter of rank {student.lora.r}" if student.lora else ""
    data = plain_markdown(public_name(config.data.path))
    return (
        f"A language model of {_millions(made.student)} parameters, distilled from {teacher}{size} "
        f"in {made.steps} {'step' if made.steps == 1 else 'steps'} by redistill.\n\n"
        "| | |\n| --- | --- |\n"
        f"| student before training | {begun}{lora} |\n| teacher | {teacher} |\n| data | {data} |"
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f}M"


def _method(config: Config) -> Iterator[str]:
    """One line for each level of the method that is on, as the settings have it."""
    rollout, revision, objective = config.rollout, config.revision, config.objective
    if config.method is not None:
        yield f"{plain_markdown(config.method)}: {plain_markdown(find_method(config.method).source)}"
    if config.data.responses == "teacher":
        yield "The data's responses are replaced by answers of the teacher."
    if rollout.lmbda > 0:
        of = "optimizer steps" if rollout.per == "step" else "samples"
        most = "at most " if rollout.schedule == "adaptive" else ""
        replayed = f"; {rollout.replay_ratio:.0%} of these are replayed" if rollout.replay_ratio else ""
        yield (
            f"On-policy: in {most}{rollout.lmbda:.0%} of the {of} the student's own answers stand in place of the "
            f"data's{replayed}."
        )
    if revision.rounds > 0:
        kept = "; kept where the teacher would rather write it" * (revision.accept == "better")
        yield (
            "Sequence level (SCRG): in an answer of the student's the token where the teacher differs most is "
            f"replaced by the teacher's, and the student writes on from there; {revision.rounds} time(s){kept}."
        )
    if objective.token_weight > 0:
        yield f"Token level: {_token_loss(config)}, weight {objective.token_weight:g}."
    if objective.span_weight > 0 and objective.span.chunker != "none":
        yield f"Phrase level: correlation of neighbouring tokens inside phrases, weight {objective.span_weight:g}."
    if objective.sft_weight > 0:
        yield f"Cross-entropy on the data's responses, weight {objective.sft_weight:g}."
    if objective.policy.weight > 0:
        yield f"Policy gradient on the teacher's reward (MiniLLM), weight {objective.policy.weight:g}."


def _token_loss(config: Config) -> str:
    objective = config.objective
    if objective.token_loss != "dac_kl":
        return f"{objective.token_loss.replace('_', ' ')} between teacher and student"
    levels = "that a small network learns" if objective.dac.learnable else "that are fixed"
    what = objective.dac.divergence.replace("_", " ")
    return f"DAC-KL, {what} on the part of the teacher's distribution between two quantiles {levels}"


def _measured(config: Config, rows: Sequence[Mapping[str, Any]], prompts: int) -> str:
    if not rows:
        return "Not measured. `redistill evaluate` measures it."
    place, split = _evaluated_on(config)
    lines = [
        "| | parameters | ROUGE-L greedy | ROUGE-L sampled | KL to teacher | perplexity |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        spread = f" ± {row['rougeL_std']:.2f}" if row.get("rougeL_std") is not None else ""
        cells = [
            plain_markdown(row["name"]), _millions(row["parameters"]), _figure(row, "rougeL_greedy", 2),
            _figure(row, "rougeL_mean", 2) + spread, _figure(row, "kl_to_teacher", 3), _figure(row, "perplexity", 1),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    seeds = ", ".join(str(seed) for seed in config.evaluation.seeds)
    lines += [
        "",
        f"On {prompts} prompts of {plain_markdown(public_name(place))} ({plain_markdown(split)}), answers of at most "
        f"{config.evaluation.max_new_tokens} tokens; ± is the standard deviation over the sampling seeds {seeds}. KL "
        "(nats per token) and perplexity are read on the references. One training run.",
    ]
    return "\n".join(lines)


def _figure(row: Mapping[str, Any], key: str, digits: int) -> str:
    return "-" if row.get(key) is None else f"{row[key]:,.{digits}f}"


def _loading(made: Made) -> str:
    name, template = made.name, made.config.data.template
    asked: object = [{"role": "user", "content": QUESTION}]
    if template != "chat":
        asked = ALPACA.format(instruction=QUESTION) if template == "alpaca" else QUESTION
    said = '[0]["generated_text"]' + ('[-1]["content"]' if template == "chat" else "")
    code = (
        "from transformers import pipeline\n"
        f'write = pipeline("text-generation", "{name}")\n'
        f"print(write({asked!r}, max_new_tokens=64){said})"
    )
    where = "" if hub_id(name) else f"\n\nThis runs beside the folder `{name}`."
    return fenced(code, "python") + where
