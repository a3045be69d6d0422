"""Time and memory of the loss against its peers, side by side in one run: `python benchmarks/loss_bench.py`.

All read the same hidden states and heads and give the gradients of the student's hidden states and head. Peers: TRL's
chunked function (forward KL), dense forward KL, and DAC-KL as one would write it (dense logits, a sort of the
vocabulary), alone and together with all else. Ours: forward KL alone, DAC-KL alone, and everything together (fit to
the targets, DAC-KL with its network, spans). "The projections alone" are the four products with the two heads that
all of them need: their floor. Calls alternate; a row has the median time, its spread (lowest and highest), and the
ratio to TRL. Peak memory is that above the inputs, of one call in a process of its own. The last line is JSON with
the ratios.

`--device cuda` runs the same on a GPU (never done so far); `--append FILE` adds the tables to a Markdown file.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from setting import setting
from torch import Tensor, nn

from redistill.batch import SLICE, Counts, Slice
from redistill.config import ObjectiveSettings
from redistill.losses import ClipNetwork
from redistill.losses.chunked import Block, chunked
from redistill.models import Head
from redistill.objective import Objective, block_size, joined
from redistill.projection import projection_of, source_of
from redistill.teachers.signal import Hidden

# Positions, vocabulary, width of student and teacher.
SHAPES = {"cpu": [(512, 49152, 576, 576), (256, 151936, 896, 1536)],
          "cuda": [(4096, 49152, 576, 960), (8192, 128256, 2048, 4096), (4096, 151936, 896, 3584)]}  # fmt: skip
MEMORY = (4096, 49152, 576, 576)
SCALED = (256, 16384, 256, 256)
FORWARD_KL = ObjectiveSettings(sft_weight=0.0, span_weight=0.0, token_loss="forward_kl")
DAC_KL = ObjectiveSettings(sft_weight=0.0, span_weight=0.0)
EVERYTHING = ObjectiveSettings()


class Case:
    """Inputs of one shape: normal hidden states, and heads that give logits of deviation 1.2."""

    def __init__(self, shape: tuple[int, int, int, int], device: str, dtype: torch.dtype):
        n, size, width, wider = shape
        generator = torch.Generator().manual_seed(0)

        def normal(*of: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(of, generator=generator)).to(device, dtype)

        self.hidden = normal(n, width).requires_grad_()
        self.teacher_hidden = normal(n, wider)
        self.head = nn.Linear(width, size, bias=False, device=device, dtype=dtype)
        self.teacher_head = nn.Linear(wider, size, bias=False, device=device, dtype=dtype).requires_grad_(
            False
        )
        for head, of in ((self.head, width), (self.teacher_head, wider)):
            head.weight.data = normal(size, of, scale=1.2 * of**-0.5)
        self.targets = torch.randint(size, (n,), generator=generator).to(device)
        # Phrases of two to four tokens with one between them, about 70 % of the text.
        lengths = torch.randint(2, 5, (n,), generator=generator).tolist()
        spans = [number for i, length in enumerate(lengths) for number in (*[i] * length, -1)][:n]
        self.spans = torch.tensor(spans, device=device)
        self.phrases = len({a for a, b in zip(spans, spans[1:], strict=False) if a == b >= 0})

    def done(self, loss: Tensor) -> float:
        """Gradients taken and dropped."""
        loss.backward()
        value, self.hidden.grad, self.head.weight.grad = loss.item(), None, None
        return value


def trl(case: Case) -> float:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    value, _ = ChunkedDivergenceFunction.apply(
        case.hidden, case.head.weight, None, case.teacher_hidden, case.teacher_head.weight, None, 0.0
    )
    return case.done(value.mean())


def dense(case: Case) -> float:
    log_q = case.head(case.hidden).float().log_softmax(-1)
    log_p = case.teacher_head(case.teacher_hidden).float().log_softmax(-1)
    return case.done((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def projections(case: Case) -> float:
    """No loss: both heads, and the student's gradients back through its own."""
    with torch.no_grad():
        by = case.head(case.hidden)
        seen = case.teacher_head(case.teacher_hidden)
        return float((by @ case.head.weight)[0, 0] + (by.t() @ case.hidden)[0, 0] + seen[0, 0])


def _literal_dac(log_p: Tensor, log_q: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """The vocabulary sorted, its cumulated mass cut at the levels [N, 1], the rest a bucket."""
    p, q = log_p.exp(), log_q.exp()
    ascending, order = p.sort(-1)
    end = ascending.cumsum(-1)
    inside = (end.minimum(upper) - (end - ascending).maximum(lower)).clamp(min=0) / ascending
    m = torch.zeros_like(p).scatter(-1, order, inside).scatter(-1, order[:, -1:], 1.0)
    left_p, left_q = ((1 - m) * p).sum(-1), ((1 - m) * q).sum(-1)
    return ((m * p * (log_p - log_q)).sum(-1) + left_p * (left_p / left_q).log()).mean()


def dense_dac(case: Case) -> float:
    """DAC-KL alone, at levels that do not learn."""
    log_q = case.head(case.hidden).float().log_softmax(-1)
    log_p = case.teacher_head(case.teacher_hidden).float().log_softmax(-1)
    levels = (log_p.new_full((len(log_p), 1), level) for level in (0.004, 0.996))
    return case.done(_literal_dac(log_p, log_q, *levels))


def dense_everything(case: Case) -> float:
    """The fit to the targets, DAC-KL at the levels of its network, and the spans, each as its formula says."""
    log_q = case.head(case.hidden).float().log_softmax(-1)
    log_p = case.teacher_head(case.teacher_hidden).float().log_softmax(-1)
    network = ClipNetwork(generator=torch.Generator().manual_seed(0)).to(log_p.device)
    levels = (level.float()[:, None] for level in network(log_q.detach(), log_p))
    fit = nn.functional.nll_loss(log_q, case.targets)
    p, q = log_p.exp(), log_q.exp()
    gaps = torch.linalg.vector_norm(p[:-1] * p[1:] - q[:-1] * q[1:], dim=-1)
    pair = (case.spans[1:] == case.spans[:-1]) & (case.spans[1:] >= 0)
    return case.done(fit + _literal_dac(log_p, log_q, *levels) + gaps[pair].mean())


def ours(settings: ObjectiveSettings) -> Callable[[Case], float]:
    def run(case: Case) -> float:
        (n, size), device = (len(case.hidden), len(case.head.weight)), case.hidden.device.type
        objective = Objective(settings, torch.Generator().manual_seed(0)).to(device)
        slices = [Slice(at, min(at + SLICE, n), True, True) for at in range(0, n, SLICE)]
        slices, counts = joined(slices, block_size(device, size)), Counts(n, n, case.phrases)

        def block_loss(logits: Tensor, teacher: Tensor | None, index: int):
            at = slice(slices[index].start, slices[index].stop)
            return objective(logits, teacher, case.targets[at], case.spans[at], True, counts)

        student, teacher = (Head(head, 1.0, None, size) for head in (case.head, case.teacher_head))
        loss, _ = chunked(
            block_loss,
            projection_of(student, case.hidden, trains=True),
            case.hidden,
            source_of(Hidden(case.teacher_hidden, teacher), case.hidden.device),
            [Block(each.start, each.stop, True) for each in slices],
            settings.chunk_size,
            list(objective.parameters()),
        )
        return case.done(loss)

    return run


CALLS: dict[str, Callable[[Case], float]] = {
    "TRL, forward KL": trl,
    "dense, forward KL": dense,
    "dense, DAC-KL with a sort": dense_dac,
    "dense, SFT + DAC-KL with a sort + span": dense_everything,
    "the projections alone": projections,
    "redistill, forward KL": ours(FORWARD_KL),
    "redistill, DAC-KL": ours(DAC_KL),
    "redistill, SFT + DAC-KL + span": ours(EVERYTHING),
}


def timed(case: Case, names: list[str], repeat: int) -> dict[str, list[float]]:
    """Seconds of each call, the calls in turn; one round before is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(repeat + 1):
        for name in names:
            _wait(case)
            started = time.perf_counter()
            CALLS[name](case)
            _wait(case)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def _wait(case: Case) -> None:
    if case.hidden.is_cuda:
        torch.cuda.synchronize()


def peak_bytes(case: Case, name: str) -> int:
    """Most memory above the inputs during one call. On a CPU: resident, in a process that did nothing else."""
    if case.hidden.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        CALLS[name](case)
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    CALLS[name](case)
    return _resident("VmHWM") - before


def _resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(key)).split()[1])


def time_table(
    shape: tuple[int, int, int, int], args: argparse.Namespace
) -> tuple[list[str], dict[str, float]]:
    seconds = timed(Case(shape, args.device, args.type), list(CALLS), args.repeat)
    base = statistics.median(seconds["TRL, forward KL"])
    lines = ["", f"N {shape[0]}, V {shape[1]}, widths {shape[2]} and {shape[3]}, {args.dtype}:", "",
             "| | seconds | lowest to highest | of TRL |", "| --- | ---: | ---: | ---: |"]  # fmt: skip
    ratios = {}
    for name, each in seconds.items():
        middle = statistics.median(each)
        ratios[name] = round(middle / base, 3)
        lines.append(f"| {name} | {middle:.3f} | {min(each):.3f} to {max(each):.3f} | {middle / base:.2f} |")
    return lines, ratios


def memory_table(args: argparse.Namespace) -> tuple[list[str], dict[str, float]]:
    shape = f"N {MEMORY[0]}, V {MEMORY[1]}, widths {MEMORY[2]} and {MEMORY[3]}, {args.dtype}"
    lines = ["", f"Peak memory above the inputs, {shape}:", "", "| | MB |", "| --- | ---: |"]
    found = {}
    for name in CALLS:
        again = [sys.executable, __file__, "--device", args.device, "--dtype", args.dtype, "--peak-of", name]
        done = subprocess.run(again, capture_output=True, text=True, check=True)
        found[name] = round(int(done.stdout) / 1e6)
        lines.append(f"| {name} | {found[name]:,} |")
    return lines, found


def scaling_table(args: argparse.Namespace) -> list[str]:
    """What doubling one size does to the time of everything together; the arithmetic doubles with each of them."""
    name, sizes = "redistill, SFT + DAC-KL + span", ("positions", "vocabulary", "both widths")
    shapes = [SCALED, (2 * SCALED[0], *SCALED[1:]), (SCALED[0], 2 * SCALED[1], *SCALED[2:]),
              (*SCALED[:2], 2 * SCALED[2], 2 * SCALED[3])]  # fmt: skip
    middles = [
        statistics.median(timed(Case(shape, args.device, args.type), [name], args.repeat)[name])
        for shape in shapes
    ]
    lines = ["", f"{name}, from N {SCALED[0]}, V {SCALED[1]}, widths {SCALED[2]}:", "",
             "| doubled | time grows by | projections grow by |", "| --- | ---: | ---: |"]  # fmt: skip
    return lines + [
        f"| {size} | {middle / middles[0]:.2f} | 2 |" for size, middle in zip(sizes, middles[1:], strict=True)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--append", type=Path, help="Markdown file that gets the tables")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.type = getattr(torch, args.dtype)
    if args.peak_of:
        print(peak_bytes(Case(MEMORY, args.device, args.type), args.peak_of))
        return
    lines = setting(args.device, repeat=args.repeat, packages=("trl",))
    result: dict[str, object] = {}
    for shape in SHAPES[args.device]:
        more, result["x".join(map(str, shape))] = time_table(shape, args)
        lines += more
    more, result["peak MB"] = memory_table(args)
    lines += [*more, *scaling_table(args)]
    print("\n".join(lines))
    if args.append:
        with args.append.open("a", encoding="utf-8") as file:
            file.write("\n".join(lines) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
