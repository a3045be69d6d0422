"""The policy gradient of MiniLLM: what a token does to the rest of the answer."""

import torch
from jaxtyping import Float
from torch import Tensor

PerToken = Float[Tensor, " N"]


def policy_gradient(
    log_likelihood: PerToken, behaviour: PerToken, advantages: PerToken, clip: float = 0.2
) -> PerToken:
    """max(-A w, -A min(max(w, 1 - clip), 1 + clip)) with the importance weight w = exp(log q(y) - behaviour).

    log_likelihood: log q(y_t) of the written tokens under the student as it is now, in nats, with gradient.
    behaviour: their log-probability when they were written; advantages: A, both detached. 0 where A is 0.
    Where nothing is clipped the gradient is -A w grad log q: the long part of the gradient of reverse KL over
    sequences when A is the log-ratio of all that follows (Gu et al. 2024, arXiv 2306.08543, Eq. 3); the clip is
    PPO's (Schulman et al. 2017), as in MiniLLM's code. ValueError where shapes differ or `clip` is not positive.
    """
    if not log_likelihood.shape == behaviour.shape == advantages.shape:
        raise ValueError(
            f"log_likelihood {list(log_likelihood.shape)}, behaviour {list(behaviour.shape)} and advantages "
            f"{list(advantages.shape)} must have one number per token each."
        )
    if not clip > 0:
        raise ValueError(f"clip must be positive (PPO's 0.2), not {clip}.")
    gain = advantages.detach()
    # A weight that overflows would turn advantages of 0 into NaN.
    weight = (log_likelihood.float() - behaviour.detach()).clamp(max=20.0).exp()
    return torch.maximum(-gain * weight, -gain * weight.clamp(1 - clip, 1 + clip))
