"""The one-pass objective, hidden states and heads in, against its dense float64 twin: shapes, extreme rows, heads."""

import copy
from dataclasses import dataclass
from typing import get_args

import naive_objective
import pytest
import torch
from test_models import MODELS, VOCAB
from tiny import tiny_llama
from torch import Tensor, nn

from redistill import projection
from redistill.batch import Counts, Row, collate, count, mark
from redistill.config import DacSettings, ObjectiveSettings
from redistill.losses.chunked import Block, chunked
from redistill.models import Head
from redistill.objective import Objective, batch_loss
from redistill.projection import projection_of, source_of
from redistill.sample import Sample
from redistill.teachers.local import LocalTeacher
from redistill.teachers.signal import Hidden

COUNTS = Counts(7.0, 5.0, 2.0)
WIDTH, WIDER = 24, 40
TOKEN_LOSSES = [
    name for name in get_args(ObjectiveSettings.model_fields["token_loss"].annotation) if name != "dac_kl"
]
CLIPPED = get_args(DacSettings.model_fields["divergence"].annotation)
PLAIN = [{"token_loss": name} for name in TOKEN_LOSSES]
DAC = [
    {"dac": {"rest": rest, "quantile": quantile, "divergence": name, "coverage": 0.3}}
    for rest in ("bucket", "drop", "renormalize")
    for quantile in ("mass", "rank")
    for name in CLIPPED
]


@dataclass
class Inputs:
    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor


def inputs(kind: str, n: int, size: int, seed: int = 0) -> Inputs:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(shape, generator=generator)

    def whole(limit: int, *shape: int) -> Tensor:
        return torch.randint(-limit, limit + 1, shape, generator=generator).float()

    if kind == "steep":  # whole numbers, so that products are exact: logits of 1e4 and beyond
        return Inputs(
            whole(3, n, WIDTH), whole(600, size, WIDTH), whole(9, size),
            whole(3, n, WIDER), whole(500, size, WIDER), whole(9, size),
        )  # fmt: skip
    made = Inputs(
        normal(n, WIDTH), normal(size, WIDTH, scale=1.5 / WIDTH**0.5), normal(size, scale=0.3),
        normal(n, WIDER), normal(size, WIDER, scale=2.0 / WIDER**0.5), normal(size, scale=0.3),
    )  # fmt: skip
    if kind in ("student barred", "both barred"):
        made.bias[::5] = -torch.inf
    if kind in ("teacher barred", "both barred"):
        made.teacher_bias[::5] = -torch.inf
    if kind == "peaked":
        made.teacher_bias[3] += 60
    if kind == "one-hot":
        made.teacher_bias[:] = -torch.inf
        made.teacher_bias[3] = 0
    return made


@dataclass
class Case:
    """One problem, solved in one pass (`ours`) and densely in float64 (`twin`)."""

    settings: ObjectiveSettings
    made: Inputs
    dtype: torch.dtype = torch.float32
    slab: int = 4

    def __post_init__(self):
        n, size = len(self.made.hidden), len(self.made.weight)
        generator = torch.Generator().manual_seed(7)
        # Classes that nobody bars.
        self.targets = 1 + torch.randint(2, (n,), generator=generator)
        self.spans = torch.full((n,), -1)
        self.seen, cut = (n, n) if n == 1 else (n - 3, 6 if n > 9 else 3)
        if n > 1:
            self.spans[0:2], self.spans[cut : cut + 1] = 0, 3
            self.spans[cut - 1 : cut + 1] = torch.tensor([-1, 3])
            self.spans[cut : min(cut + 3, self.seen)] = 3
        cuts = [(0, cut, n == 1, True), (cut, self.seen, True, True), (self.seen, n, True, False)]
        self.blocks = [each for each in cuts if each[1] > each[0]]
        self.fitted = torch.zeros(n, dtype=torch.bool)
        for start, stop, sft, _ in self.blocks:
            self.fitted[start:stop] = sft
        self.objective = Objective(self.settings, torch.Generator().manual_seed(0))
        for parameter in self.objective.parameters():
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
        self.head, self.teacher = nn.Linear(WIDTH, size), nn.Linear(WIDER, size).requires_grad_(False)
        self.head.weight.data, self.head.bias.data = self.made.weight.clone(), self.made.bias.clone()
        self.teacher.weight.data = self.made.teacher_weight.clone()
        self.teacher.bias.data = self.made.teacher_bias.clone()
        self.head.to(self.dtype), self.teacher.to(self.dtype)
        self.hidden = self.made.hidden.to(self.dtype)
        self.teacher_hidden = self.made.teacher_hidden.to(self.dtype)[: self.seen]

    def ours(self, scale: float = 1.0) -> tuple[Tensor, list[Tensor]]:
        hidden, size = self.hidden.clone().requires_grad_(), len(self.made.weight)

        def block_loss(logits, teacher_logits, index):
            start, stop, sft, _ = self.blocks[index]
            targets, spans = self.targets[start:stop], self.spans[start:stop]
            return self.objective(logits, teacher_logits, targets, spans, sft, COUNTS)

        own = list(self.objective.parameters())
        total, self.stats = chunked(
            block_loss,
            projection_of(Head(self.head, 1.0, None, size), hidden, trains=True),
            hidden,
            source_of(Hidden(self.teacher_hidden, Head(self.teacher, 1.0, None, size)), hidden.device),
            [Block(start, stop, distill) for start, stop, _, distill in self.blocks],
            self.slab,
            own,
        )
        wanted = [hidden, self.head.weight, self.head.bias, *own]
        return total.detach(), list(torch.autograd.grad(scale * total, wanted))

    def twin(self, scale: float = 1.0) -> tuple[Tensor, list[Tensor]]:
        hidden, weight, bias = (
            each.detach().double().requires_grad_()
            for each in (self.hidden, self.head.weight, self.head.bias)
        )
        clip = self.objective.clip
        network = None if clip is None else naive_objective.Network(clip)
        total = naive_objective.objective(
            self.settings, network, hidden @ weight.t() + bias,
            self.teacher_hidden.double() @ self.teacher.weight.double().t() + self.teacher.bias.double(),
            self.targets, self.spans, self.fitted, self.seen, COUNTS,
        )  # fmt: skip
        own = network.parameters() if network else []
        taken = torch.autograd.grad(scale * total, [hidden, weight, bias, *own], materialize_grads=True)
        return total.detach(), list(taken)


def settings(case: dict) -> ObjectiveSettings:
    fields = {"sft_weight": 0.5, "token_weight": 2.0, "span_weight": 3.0, "beta": 0.2, "alpha": 0.3}
    return ObjectiveSettings.model_validate(fields | case)


def error(got: list[Tensor], wanted: list[Tensor], floor: float = 1e-30) -> float:
    """Norm of the difference over the norm of what is wanted, of all tensors together."""
    got_flat, flat = (torch.cat([each.double().flatten() for each in many]) for many in (got, wanted))
    return float((got_flat - flat).norm() / flat.norm().clamp(min=floor))


def assert_equal(case: Case, tolerance: float) -> None:
    (value, grads), (wanted, wanted_grads) = case.ours(), case.twin()
    assert all(each.isfinite().all() for each in (value, *grads))
    assert error([value], [wanted]) < tolerance
    for got, true in zip(grads[:3], wanted_grads[:3], strict=True):
        assert got.dtype == case.dtype and error([got], [true]) < tolerance
    if case.objective.clip is not None:
        # What moves a level is the difference of one class and all that is clipped, and one of the features the
        # logarithm of 1 less the mass of 32 classes: both can be nearly nothing, where digits are lost.
        assert error(grads[3:], wanted_grads[3:], floor=0.1) < 10 * tolerance


def infinite(case: dict, kind: str) -> bool:
    """Whether the formula itself gives infinity, and we what the floor of 1e5 nats makes of it."""
    name = case.get("token_loss") or case["dac"]["divergence"]
    return (name in ("forward_kl", "adaptive_kl", "todi") and kind == "student barred") or (
        name in ("reverse_kl", "adaptive_kl", "todi") and kind in ("teacher barred", "one-hot")
    )


def beyond_fp32(case: dict, kind: str) -> bool:
    """Buckets, and kept parts, of less mass than fp32 holds count as the least it holds: see `dac_kl`."""
    name, rest = case["dac"]["divergence"], case["dac"]["rest"]
    steep = kind == "steep" and (name == "reverse_kl" or (name == "forward_kl" and rest == "renormalize"))
    return steep or (kind == "one-hot" and name == "reverse_kl" and rest == "bucket")


KINDS = ["student barred", "teacher barred", "both barred", "peaked", "one-hot", "steep"]


@pytest.mark.parametrize("case", [*PLAIN, *DAC[::5]], ids=str)
@pytest.mark.parametrize(("n", "size"), [(13, 1009), (1, 1009)])
def test_odd_shapes(case, n, size):
    assert_equal(Case(settings(case), inputs("odd", n, size)), 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_extreme_rows(case, kind):
    # Reverse KL of 1e4 nats and more: q log(q / p) leaves 1e-7 of its size behind where the student is almost sure.
    loose = infinite(case, kind) or (kind == "steep" and case["token_loss"] == "reverse_kl")
    assert_equal(Case(settings(case), inputs(kind, 7, 61)), 1e-3 if loose else 1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", DAC, ids=str)
def test_extreme_rows_clipped(case, kind):
    problem = Case(settings(case), inputs(kind, 7, 61))
    if beyond_fp32(case, kind):
        value, grads = problem.ours()
        assert all(each.isfinite().all() for each in (value, *grads))
    else:
        assert_equal(problem, 1e-2 if infinite(case, kind) else 1e-5)


@pytest.fixture(params=["cpu", "gpu"])
def products(request, monkeypatch):
    """What a GPU does, with its product of 16-bit numbers that comes in fp32 stood in for."""
    if request.param == "gpu":
        monkeypatch.setattr(projection, "_multiplies_16_bits", lambda _: True)
        mm = torch.mm

        def wide_mm(a, b, out_dtype=None, *, out=None):
            if out_dtype is None:
                return mm(a, b) if out is None else mm(a, b, out=out)
            assert a.dtype == b.dtype and a.dtype.itemsize == 2 and out_dtype == torch.float32
            return mm(a.float(), b.float()) if out is None else mm(a.float(), b.float(), out=out)

        monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(projection, "_PIECE", 7 * WIDTH)  # heads in many pieces
    return request.param


LOW = [(torch.bfloat16, 2.0**-8), (torch.float16, 2.0**-11)]


@pytest.mark.parametrize(("dtype", "unit"), LOW)
@pytest.mark.parametrize("case", [*PLAIN[:3], *DAC[::8]], ids=str)
def test_heads_of_16_bits_are_exact_but_for_the_rounding_of_what_they_return(case, dtype, unit, products):
    made = inputs("odd", 60, 257)
    made.weight *= 3  # logits near 20
    problem = Case(settings(case), made, dtype, slab=100)
    (value, grads), (wanted, wanted_grads) = problem.ours(), problem.twin()
    assert error([value], [wanted]) < 1e-5
    # The head's gradient is rounded for each of two slabs; on a GPU that of the logits is, too.
    for got, true, roundings in zip(grads[:3], wanted_grads[:3], (1, 2, 1), strict=True):
        assert got.dtype == dtype
        assert error([got], [true]) < unit * (roundings + (products == "gpu")) ** 0.5
    if products == "cpu":
        assert error(grads[0:3:2], [each.to(dtype) for each in wanted_grads[0:3:2]]) < 1e-3
    assert not grads[3:] or error(grads[3:], wanted_grads[3:], floor=0.1) < 1e-4


@pytest.mark.parametrize("case", [PLAIN[0], DAC[0]], ids=str)
def test_under_autocast_nothing_is_rounded_but_a_gpus_operands(case):
    problem = Case(settings(case), inputs("odd", 13, 257))
    ours = problem.ours

    def under_autocast():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return ours()

    problem.ours = under_autocast
    assert_equal(problem, 1e-5)


@pytest.mark.usefixtures("products")
def test_float16_gradients_survive_many_tokens(monkeypatch):
    """Divided by a million tokens, most of them are below what float16 holds; the loss scale brings them back."""
    monkeypatch.setattr(f"{__name__}.COUNTS", Counts(7e6, 5e6, 2e6))
    problem = Case(settings({"token_loss": "forward_kl"}), inputs("odd", 60, 257), torch.float16, slab=100)
    for slab in (4, 100):
        problem.slab = slab
        (_, ours), (_, wanted) = problem.ours(scale=2.0**20), problem.twin(scale=2.0**20)
        assert error(ours[:1], wanted[:1]) < 1e-3


def frozen_head():
    model = tiny_llama()
    model.get_output_embeddings().requires_grad_(False)
    return model


def biased_head():
    model = tiny_llama()
    model.lm_head = nn.Linear(32, VOCAB)
    model.lm_head.bias.data.normal_(generator=torch.Generator().manual_seed(4))
    return model


HEADS = {
    **{name: MODELS[name] for name in ("llama_tied", "gpt2", "gemma2", "granite", "cohere", "lora")},
    "frozen": frozen_head,
    "biased": biased_head,
}


@pytest.mark.parametrize("name", HEADS)
def test_every_parameter_of_a_model_gets_its_gradient_whatever_its_head(name):
    """Tied to the embedding, scaled, capped, trimmed, with a bias, with LoRA, frozen."""
    student, teacher, size = HEADS[name](), tiny_llama(seed=5, layers=3), VOCAB - 5
    rows = [
        Row(Sample((5, 9, 11), (40, 7, 2, 8)), True, True, lambda: (0, 0, 1, 1)),
        Row(Sample((8,), (300, 2)), False, True),
        Row(Sample((4, 4, 90), (77, 21, 2)), True, False),
    ]
    chosen, batch, counts = settings({"chunk_size": 3}), collate(rows, 3), count(rows)
    objective = Objective(chosen, torch.Generator().manual_seed(0))
    total, _ = batch_loss(objective, student, LocalTeacher(teacher, size), batch, lambda: counts, size)
    total.backward()
    exact, seen = copy.deepcopy(student).double(), batch["distill_positions"]
    exact.zero_grad()
    logits = [
        model(input_ids=batch["input_ids"]).logits.flatten(0, 1)
        for model in (exact, copy.deepcopy(teacher).double())
    ]
    logits = [each[batch["select"], :size] for each in logits]
    fitted = torch.zeros(len(batch["targets"]), dtype=torch.bool)
    marks = mark(batch)
    for start, stop, sft, _ in marks.slices:
        fitted[start:stop] = sft
    network = naive_objective.Network(objective.clip)
    wanted = naive_objective.objective(
        chosen,
        network,
        logits[0],
        logits[1][:seen].detach(),
        batch["targets"],
        marks.spans,
        fitted,
        seen,
        counts,
    )
    wanted.backward()
    assert error([total.detach()], [wanted.detach()]) < 1e-5
    trained = [
        (a, b) for a, b in zip(student.parameters(), exact.parameters(), strict=True) if a.requires_grad
    ]
    assert error([a.grad for a, _ in trained], [b.grad for _, b in trained]) < 2e-5
    head = [one for one in student.get_output_embeddings().parameters() if one.requires_grad]
    assert head or name == "frozen"
    for ours, theirs in trained:
        if any(ours is one for one in head):
            assert error([ours.grad], [theirs.grad]) < 2e-5
