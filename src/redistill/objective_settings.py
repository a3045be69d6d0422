"""The section `objective` of a configuration: the terms of the loss and their settings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from redistill.settings import Count, NotNegative, Positive, Settings, Share


class DacSettings(Settings):
    """DAC-KL: a divergence on the part of the teacher's distribution between two quantiles (2407.10068)."""

    divergence: Literal[
        "forward_kl",
        "reverse_kl",
        "jensen_shannon",
        "skewed_forward_kl",
        "skewed_reverse_kl",
        "total_variation",
    ] = "forward_kl"
    """What is clipped. The paper's is forward KL."""
    quantile: Literal["mass", "rank"] = "mass"
    """Axis of the quantiles: teacher probability, or the literal rank among all classes."""
    rest: Literal["bucket", "drop", "renormalize"] = "bucket"
    """What is clipped away becomes one outcome (ours), is left out (paper), or the two are renormalised."""
    edge: Literal["exact", "sigmoid"] = "exact"
    """The class at an edge counts by the fraction inside, or by the paper's sigmoid."""
    sharpness: Positive = 4.0
    """Steepness of the sigmoid edge, per nat. Ours."""
    keep_target: bool = True
    """Never clip the teacher's most probable class."""
    learnable: bool = True
    """Quantiles from the clip network; false: `lower` and `upper` below."""
    lower: Share = 0.0
    """Fixed lower quantile; 0: nothing is clipped below."""
    upper: Share = 1.0
    """Fixed upper quantile; 1: nothing is clipped above."""
    coverage: NotNegative = 2.0
    """Weight of -log(retained mass) in what the clip network minimises, in nats: by how much teacher and student must
    differ within a tail for the clip to take it. Ours; 0: the paper, which takes all."""
    learning_rate: Positive = 1e-3
    """Learning rate of the clip network. Ours."""
    hidden: Count = 64
    """Width of the clip network. Ours."""
    top_k: Count = 32
    """Most probable teacher classes the clip network sees. Ours."""


class SpanSettings(Settings):
    """Correlation of neighbouring tokens inside phrases (2407.10068)."""

    chunker: Literal["textblob", "spacy", "windows", "none"] = "textblob"
    """Who finds the phrases: TextBlob or spaCy (English), fixed windows (any language), nobody."""
    distance: Literal["norm", "squared", "cosine"] = "norm"
    """Distance of the two correlation vectors. The paper's is the norm."""


class PolicySettings(Settings):
    """MiniLLM's policy gradient: what a token does to all that follows it (Gu et al. 2024, arXiv 2306.08543)."""

    weight: NotNegative = 0.0
    """Weight of the term; MiniLLM's 1, beside reverse KL as the token loss. 0: none."""
    length_normalization: bool = True
    """The reward of what follows is divided by its number of tokens (MiniLLM, Eq. 5)."""
    own_token: bool = False
    """The reward of what follows begins with the token itself, as in MiniLLM's code, though the single-step term has
    that already: an end of text is then judged by its own reward, else by none. false: MiniLLM's Eq. 5."""
    whiten: bool = True
    """Advantages of one optimizer step are shifted and scaled to mean 0, deviation 1 (MiniLLM's code); without
    `own_token` not an answer's last, which nothing follows."""
    clip: Positive = 0.2
    """An importance weight above 1 + clip raises a good token no further, one below 1 - clip lowers a bad one no
    further; otherwise it counts whole (PPO; MiniLLM's code)."""


class ObjectiveSettings(Settings):
    """What is minimised: sft_weight * SFT + token_weight * token loss + span_weight * span loss, and `policy`."""

    sft_weight: NotNegative = 1.0
    """Weight of the cross-entropy on dataset responses. The paper's 1."""
    token_weight: NotNegative = 1.0
    """Weight of the token loss. The paper's 1."""
    span_weight: NotNegative = 1.0
    """Weight of the span loss. The paper's 1."""
    token_loss: Literal[
        "dac_kl",
        "forward_kl",
        "reverse_kl",
        "jensen_shannon",
        "skewed_forward_kl",
        "skewed_reverse_kl",
        "adaptive_kl",
        "total_variation",
        "todi",
        "alpha_beta",
    ] = "dac_kl"
    """Divergence between teacher and student at every response token, in nats."""
    temperature: Positive = 1.0
    """Both models' logits are divided by it in the token and span losses."""
    beta: Share = 0.5
    """jensen_shannon: 0 is forward KL, 1 reverse KL (TRL, default 0.5). alpha_beta: its beta (ABKD: 0.7)."""
    alpha: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """skewed losses: share of the other model mixed in; 0: no skew. DistiLLM's 0.1. alpha_beta: its alpha (ABKD's is
    0.2)."""
    dac: DacSettings = DacSettings()
    span: SpanSettings = SpanSettings()
    policy: PolicySettings = PolicySettings()
    chunk_size: Count = 1024
    """Response tokens whose logits are held at once: memory against speed, never the result. Ours."""
    compile: bool = False
    """Fuse the elementwise part of the loss with torch.compile: it gains little on a CPU, where most of DAC-KL is the
    search for its edges. Needs a C++ compiler there, Triton on a GPU; the first steps wait for the compilation."""
    float32_logits: bool = True
    """Logits of a bfloat16 or float16 head, and their gradients, in float32, in the loss (what SCRG reads is in the
    model's own format). false: rounded to 16 bits as in the model's own forward, for half the memory; then many
    classes look equal to DAC-KL, and float16 loses gradients."""
