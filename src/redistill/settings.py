"""The sections of a configuration: every setting with its default, range, unit and source.

Names are TRL's or transformers' where they have one. A setting's docstring is what `docs` and error messages
show; "ours" means no source was followed.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

DType = Literal["float32", "bfloat16", "float16"]
Share = Annotated[float, Field(ge=0, le=1)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Index = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
LayerRule = Annotated[
    str, Field(pattern=r"^(every_second|(first|last|spread):\d+|\d+(-\d+)?(,\d+(-\d+)?)*)$")
]


class Settings(BaseModel):
    """What all sections share: frozen, no unknown keys, no silent conversion of types, no NaN."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        protected_namespaces=(),
    )


class PruneSettings(Settings):
    """A student made of some of the teacher's layers."""

    keep: Count | Annotated[tuple[Index, ...], Field(strict=False, min_length=1)] | LayerRule
    """How many layers, chosen by block influence; or the layers themselves, from 0, as a list or as "0-3,7";
    or a rule: "every_second", "first:N", "last:N", "spread:N"."""
    prompts: Count = 32
    """Training prompts by which block influence is measured. Ours."""


class LoraSettings(Settings):
    """Train low-rank adapters only (peft); the fields are peft's."""

    r: Count = 16
    """Rank. DistiLLM's 16."""
    lora_alpha: Count = 64
    """Scale: an adapter counts lora_alpha / r. DistiLLM's 64."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout probability before the adapter. Ours (DistiLLM: 0.1)."""
    target_modules: Text | Annotated[tuple[Text, ...], Field(strict=False, min_length=1)] = "all-linear"
    """Names of the layers adapted, or "all-linear": every linear layer but the head. Ours."""
    merge: bool = False
    """Merge the adapters into the finished student, which then is a plain model; checkpoints hold adapters. Ours."""


class ModelSettings(Settings):
    """A causal language model, from the hub or a folder; safetensors only, no remote code."""

    model_revision: Text | None = None
    """Branch, tag or commit on the hub; null: its main branch."""
    dtype: DType = "float32"
    """Number format of the weights. float32 on CPUs, bfloat16 on recent GPUs."""
    attn_implementation: Text | None = None
    """"eager", "sdpa", "flash_attention_2", ..: transformers' names; null: its choice."""


class StudentSettings(ModelSettings):
    """The model that is trained: a model of its own, or some layers of the teacher."""

    model_name_or_path: Text | None = None
    """Hub id or folder; null with `prune`."""
    prune: PruneSettings | None = None
    """Make the student from the teacher's layers, in place of model_name_or_path."""
    lora: LoraSettings | None = None
    """Train adapters in place of all weights."""


class ServedSettings(Settings):
    """A teacher on a server with vLLM's /v1/completions (`prompt_logprobs`) and /tokenize."""

    url: Annotated[str, Field(pattern=r"^https?://")] = "http://localhost:8000"
    """Where the server is."""
    top_k: Count = 20
    """Ids kept at each token; all else is one outcome. The most that vLLM gives unless it is started with a higher
    --max-logprobs."""
    concurrency: Count = 8
    """Requests under way at once, of one response each. Ours."""
    timeout: Positive = 600.0
    """Seconds that the server may take for one response. Ours."""
    retries: Index = 3
    """How often a request that failed is sent anew, after 1, 2, 4, .. seconds. Ours."""


class TeacherSettings(ModelSettings):
    """The model that is learnt from. Its tokenizer is the run's, unless `align` is set."""

    model_name_or_path: Text
    """Hub id or folder."""
    cache: Text | None = None
    """Folder of what the teacher says of the data, written by `redistill cache-teacher`: training reads it in the
    model's place; null: none."""
    server: ServedSettings | None = None
    """Ask a server in the model's place; null: none. model_name_or_path then names its tokenizer and config."""
    align: Literal["bytes"] | None = None
    """bytes: for a teacher of another tokenizer than the student's; it reads the same text in its own ids, and what
    it says is mapped to the student's where both have a border (docs/teacher.md); null: one tokenizer for both."""
    align_top_k: Count = 128
    """With `align`, the student's ids that are kept at each token; all else is one outcome. Ours."""
    load_in_8bit: bool = False
    """Weights in 8 bits, LLM.int8() (bitsandbytes, through transformers): half the memory of bfloat16."""
    load_in_4bit: bool = False
    """Weights in 4 bits, NF4 with quantized scales (bitsandbytes): a little over a quarter of bfloat16's memory."""
    device_map: Text | None = None
    """Where the layers lie: "auto", "balanced", "cpu", "cuda:1", .. (transformers); null: where the student is."""
    offload: bool = False
    """The weights wait in the CPU's memory and are on the student's device only while the teacher reads; the head
    stays."""


class DataSettings(Settings):
    """Where prompts and responses come from, and how they become token ids."""

    path: Text
    """Hub id, folder, or .jsonl, .json, .parquet file; seen from the working directory."""
    name: Text | None = None
    """Configuration of a hub data set that has several."""
    split: Text = "train"
    """Split of a hub data set, or first part of the file name in a folder (train -> train.jsonl)."""
    eval_path: Text | None = None
    """Held-out data, as `path`; null: `path` itself with `eval_split`."""
    eval_split: Text | None = None
    """Split of the held-out data; null: `split`. With neither eval_path nor this nothing is held out."""
    template: Literal["chat", "alpaca", "plain"] = "chat"
    """How a prompt is written: the tokenizer's chat template, Alpaca's headings (as MiniLLM), as is."""
    system: str | None = None
    """System message set before every prompt that has none; chat template only."""
    max_prompt_length: Count = 256
    """Longest prompt, in tokens. MiniLLM's and DistiLLM's 256."""
    on_long_prompt: Literal["drop", "truncate"] = "drop"
    """What happens to a longer one: left out and counted (MiniLLM), or cut (DistiLLM)."""
    teacher_prompt: Text = "teacher_prompt"
    """Column with another prompt, text or turns, for the teacher to read before the same response (context
    distillation); a record without it: the student's own."""
    max_teacher_prompt_length: Count | None = None
    """Longest prompt of the teacher's own, in tokens, under the same rule; null: `max_prompt_length`. Ours."""
    max_bad_share: Share = 0.01
    """Share of unreadable or unusable records above which the run stops before training. Ours."""
    limit: Count | None = None
    """Most training examples read; null: all."""
    streaming: bool = False
    """Read the training data while training goes on, in place of loading them: for sets larger than memory. Needs
    training.max_steps or a budget. Held-out data are loaded."""
    shuffle_buffer_size: Count = 1000
    """Records that lie in memory and are shuffled among themselves, where the data are streamed; 1: in their order.
    datasets' 1000."""
    responses: Literal["dataset", "teacher"] = "dataset"
    """What is learnt from: the data's own responses, or the teacher's answers to its prompts (SeqKD), written once
    with the sampling of `rollout` and kept."""
    responses_seed: Index = 10
    """Seed of the teacher's answers. MiniLLM's 10."""
    responses_path: Text | None = None
    """File in which they are kept; null: under ~/.cache/redistill, named after all that they depend on."""
    eval_limit: Count | None = None
    """Most held-out examples read; null: all."""


class VllmSettings(Settings):
    """vLLM, where `rollout.engine` is vllm. Every step it loads the student's weights, LoRA merged, from a folder."""

    mode: Literal["colocate", "server"] = "colocate"
    """colocate: in the training process, on its GPU; server: a `vllm serve` of the student's own model."""
    url: Annotated[str, Field(pattern=r"^https?://")] = "http://localhost:8000"
    """Where the server is."""
    weights_dir: Text | None = None
    """Folder for the weights, which vLLM must see under the same path; null: the system's for temporary files."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.3
    """Share of the GPU's memory that a colocated vLLM holds throughout. TRL's 0.3."""
    timeout: Positive = 600.0
    """Seconds that the server may take for one answer or one loading of weights. Ours."""
    retries: Index = 3
    """How often a request that failed is sent anew, after 1, 2, 4, .. seconds. Ours."""


class RolloutSettings(Settings):
    """Which share of the samples the student writes itself, and how it writes."""

    lmbda: Share = 0.5
    """Share of student answers against dataset responses: 0 none, 1 all (TRL, default 0.5). With the adaptive
    schedule, the most the share may rise to."""
    per: Literal["step", "sample"] = "step"
    """Who draws the lot: one for all samples of an optimizer step (TRL, DistiLLM; whole batches are written at once,
    which is far cheaper), or one for each sample."""
    warmup_steps: Index = 0
    """Optimizer steps on references alone before the student's own answers begin. Ours."""
    schedule: Literal["constant", "adaptive"] = "constant"
    """constant: `lmbda` throughout; adaptive: grows when the validation loss rises (DistiLLM)."""
    schedule_epsilon: NotNegative = 0.1
    """Rise of the validation loss, in nats per token, that makes the share grow. DistiLLM's 0.1."""
    schedule_step: Share = 0.1
    """By how much the share grows each time. DistiLLM's 0.1."""
    schedule_start: Share = 0.0
    """Share before the first growth. DistiLLM's 0 (0.2 for its OpenLLaMA2 student)."""
    replay_ratio: Share = 0.0
    """Share of the student answers that are taken from the buffer of earlier ones; 0: all are new, none is kept."""
    replay_schedule: Literal["constant", "rising"] = "constant"
    """constant: `replay_ratio` throughout; rising: from 0 to it in step with the run (DistiLLM)."""
    replay_capacity: Count = 1000
    """Answers kept in the buffer, the oldest falling out; `redistill estimate` says what memory they take. DistiLLM's
    1000."""
    max_completion_length: Count = 256
    """Longest response, in tokens, end of text included. MiniLLM's 512 less a prompt of 256."""
    temperature: NotNegative = 1.0
    """Sampling temperature; 0: the most probable token always. MiniLLM's and DistiLLM's 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample from the smallest set of tokens with at least this probability; 1: all."""
    top_k: Index = 0
    """Sample from so many most probable tokens; 0: all."""
    min_p: Share = 0.0
    """Drop tokens less probable than this times the most probable one; 0: none."""
    teacher_mix: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the teacher's distribution mixed into the student's while it writes. MiniLLM's 0.2; 0: none."""
    batch_size: Count = 8
    """Prompts answered at once on one device. Ours."""
    engine: Literal["loop", "static", "paged", "vllm"] = "loop"
    """Who writes: loop, our own; static, our own with a cache of fixed size and, on CUDA, a compiled step, which
    gives the same tokens up to rounding; paged, transformers' `generate_batch`, and vllm, which sample by themselves:
    their answers agree with the loop's in distribution only, and a paged one depends on its batch."""
    vllm: VllmSettings = VllmSettings()
    gather: bool = True
    """Of models that are sharded over several GPUs (FSDP2, ZeRO-3): true, each GPU holds the whole of both while it
    writes and scores; false, a layer at a time, for models that do not fit so; slow (docs/several-gpus.md). Ours; TRL
    has ds3_gather_for_generation."""


class RevisionSettings(Settings):
    """SCRG: the worst token of a student answer is corrected and the rest written anew (2407.10068)."""

    rounds: Index = 1
    """Corrections per answer; 0: none. The paper reports 1, 3 and 5 as nearly equal (Table 4c)."""
    teacher_token: Literal["sample", "argmax"] = "sample"
    """Where the correction comes from: drawn from the teacher's distribution, or its most probable token."""
    accept: Literal["always", "better"] = "always"
    """always: the corrected answer, as in the paper. better: the first answer or a correction, whichever has the
    highest log p(y) - log q(y), MiniLLM's reward; both models read it once more for that. Ours."""
    revise_replayed: bool = False
    """Revise answers from the buffer once more with today's models. Ours."""


class BudgetSettings(Settings):
    """What a run may spend, in place of `training.max_steps`; the learning rate's schedule follows what is spent."""

    student_tokens: Count | None = None
    """Response tokens that the student is trained on; null: no bound."""
    seconds: Positive | None = None
    """Seconds of training, rollouts included; loading, validation, saving and measuring are not counted."""


class EvaluationSettings(Settings):
    """How answers are sampled and scored. A recipe with this section is measured before and after training."""

    path: Text | None = None
    """Data to answer, as data.path; null: the held-out data of the section `data`."""
    split: Text | None = None
    """As data.split; null: "test"."""
    seeds: Annotated[tuple[Index, ...], Field(strict=False, min_length=1)] = (10, 20, 30)
    """One full set of sampled answers each. MiniLLM's first three."""
    temperature: Positive = 1.0
    """Of the sampled answers. MiniLLM's 1."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Of the sampled answers. MiniLLM's 1."""
    greedy: bool = True
    """Answer once more with the most probable token always."""
    max_new_tokens: Count = 256
    """Longest answer. MiniLLM's 512 less a prompt of 256."""
    batch_size: Count = 16
    """Prompts answered at once on one device. Ours."""
    limit: Count | None = None
    """Most examples; null: all."""
