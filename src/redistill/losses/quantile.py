"""Where a quantile level falls in a row of probabilities, without sorting the vocabulary.

The classes of a row lie on the axis [0, 1] from the least to the most probable. Classes of equal probability
form one block and share its length equally, so everything here depends on values only, never on class order.
"""

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

Quantile = Literal["mass", "rank"]

# Lengths are added up as integers (a probability of 1 is 2**60): exact and independent of the order of
# addition. Tens of thousands of fp32 additions would drift by 1e-3 in a flat row, and differ from run to
# run on a GPU.
_ONE = 2**60


class Block(NamedTuple):
    """The block of equal probabilities that a level falls in, one per row.

    `value` [N]: the block's probability; -inf / +inf where the level is exactly 0 / 1 (beyond every class).
    `share` [N]: how much of the block lies below the level, 0 to 1; differentiable, slope 1 / block length.
    `row`, `column` [E]: the block's members over all rows (none for a level of exactly 0 or 1).
    """

    value: Float[Tensor, " N"]
    share: Float[Tensor, " N"]
    row: Int[Tensor, " E"]
    column: Int[Tensor, " E"]


_GROUP = 64


def top_classes(values: Float[Tensor, "N V"], k: int) -> tuple[Float[Tensor, "N k"], Int[Tensor, "N k"]]:
    """The `k` largest of each row in falling order, and where they are: `topk` in one pass over V.

    The k largest lie in the k groups of neighbours with the largest maxima.
    """
    n, size = values.shape
    groups = size // _GROUP
    if groups <= 2 * k:
        return values.topk(k, dim=-1)
    whole, rest = values[:, : groups * _GROUP].unflatten(1, (groups, _GROUP)), values[:, groups * _GROUP :]
    chosen = whole.amax(-1).topk(k, dim=-1).indices
    candidates = whole.gather(1, chosen[:, :, None].expand(n, k, _GROUP)).flatten(1)
    top, place = torch.cat((candidates, rest), dim=1).topk(k, dim=-1)
    group, inside = place // _GROUP, place % _GROUP
    inner = chosen.gather(1, group.clamp(max=k - 1)) * _GROUP + inside
    return top, torch.where(group < k, inner, (groups - k) * _GROUP + place)


def first_largest(values: Float[Tensor, "N V"]) -> Int[Tensor, "N"]:
    """Where the largest of each row is, the first of equals: `argmax`, on a CPU in a fifth of its time."""
    groups = values.shape[1] // _GROUP
    if groups < 2:
        return values.argmax(-1)
    whole, rest = values[:, : groups * _GROUP].unflatten(1, (groups, _GROUP)), values[:, groups * _GROUP :]
    most, group = whole.amax(-1).max(-1)
    inside = whole.gather(1, group[:, None, None].expand(-1, 1, _GROUP))[:, 0].argmax(-1)
    found = group * _GROUP + inside
    if rest.shape[1]:
        last, place = rest.max(-1)
        found = torch.where(last > most, groups * _GROUP + place, found)
    return found


def class_sizes(p: Float[Tensor, "N V"], tail: int | None) -> Int[Tensor, "1 V"]:
    """How many classes of the vocabulary each column stands for: one, but `tail` (if not None) in the last column."""
    sizes = torch.ones(1, p.shape[1], dtype=torch.long, device=p.device)
    if tail is not None:
        sizes[:, -1] = tail
    return sizes


def find_blocks(
    p: Float[Tensor, "N V"],
    levels: tuple[Float[Tensor, " N"], ...],
    quantile: Quantile,
    tail: int | None = None,
) -> list[Block]:
    """The block of each level, for fp32 probabilities `p` (not differentiated).

    `quantile="mass"`: a class is as long as its probability; `"rank"`: every class is 1 / V long.
    tail: the last column stands for so many classes of the vocabulary together. It has its place on the axis by their
    mean probability, which is also what `value` is compared with.
    A radix search: the bit patterns of fp32 numbers from 0 to 1 have 30 bits and order like the numbers, so the
    block's value is found 12, 9 and 9 bits at a time, each time adding up lengths per digit. Only the first step
    reads all of V.
    """
    sizes = class_sizes(p, tail)
    bits = (p if tail is None else p / sizes.clamp(min=1)).contiguous().view(torch.int32)
    digit = (bits >> 18).bitwise_and_(0x1FFF).long()
    if quantile == "mass":
        length = (p * float(_ONE)).long()
    else:
        whole = p.shape[1] if tail is None else p.shape[1] - 1 + tail
        length = (sizes * (_ONE // max(whole, 1))).expand(p.shape)
    # Half of the bins are for what is no number: it shall not be an index that does not exist.
    bins = torch.zeros(len(p), 8192, dtype=torch.long, device=p.device).scatter_add_(1, digit, length)
    return [_find_block(bits, length, digit, bins, level) for level in levels]


def _find_block(bits: Tensor, length: Tensor, digit: Tensor, bins: Tensor, level: Tensor) -> Block:
    n = len(bits)
    total = bins.sum(-1)
    inner = (level > 0) & (level < 1)
    target = (level.detach().double() * total).long()
    chosen, below, width = _bin_holding(bins, target)
    pattern = chosen << 18
    wanted = torch.where(inner, chosen, -1)
    row, column = torch.nonzero(digit == wanted[:, None], as_tuple=True)
    for shift in (9, 0):
        digit = ((bits[row, column] >> shift) & 0x1FF).long()
        bins = torch.zeros(n * 512, dtype=torch.long, device=bits.device)
        bins.index_add_(0, row * 512 + digit, length[row, column])
        chosen, more, width = _bin_holding(bins.view(n, 512), target - below)
        below = below + more
        pattern = pattern | (chosen << shift)
        stays = digit == chosen[row]
        row, column = row[stays], column[stays]
    position = (level.double() * total - below) / width.clamp(min=1)
    share = torch.where(inner, position, torch.zeros_like(position)).clamp(0, 1).float()
    value = pattern.to(torch.int32).view(torch.float32)
    value = torch.where(inner, value, torch.where(level <= 0, -torch.inf, torch.inf))
    return Block(value, share, row, column)


def _bin_holding(bins: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: the first bin whose end lies beyond `target`, the length before it, its own length."""
    end = bins.cumsum(-1)
    chosen = (end <= target[:, None]).sum(-1, keepdim=True).clamp(max=bins.shape[1] - 1)
    width = bins.gather(1, chosen)
    return chosen[:, 0], (end.gather(1, chosen) - width)[:, 0], width[:, 0]
