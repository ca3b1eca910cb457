"""Local attention in blocks against the formula, and against the fused kernel's inputs."""

from __future__ import annotations

import pytest
import torch
from build import random_tokens, small_model
from torch import Tensor

from memorizing_transformers.model import attention as attention_file
from memorizing_transformers.model import local_attention as local
from memorizing_transformers.model.flex import FEWEST_QUERIES, flex_local_attention, flex_works
from memorizing_transformers.model.local_attention import local_attention

HEADS, WIDTH = 4, 6


def plainly(
    q: Tensor, k: Tensor, v: Tensor, near: Tensor, hidden: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and log mass, one row, head and query at a time."""
    rows, heads, segment, _ = q.shape
    keys = k.shape[2]
    outputs, masses = [], []
    for row in range(rows):
        for head in range(heads):
            group = head * k.shape[1] // heads
            for query in range(segment):
                here = keys - segment + query
                seen = [
                    key
                    for key in range(here + 1)
                    if hidden is None or key >= hidden.shape[1] or not hidden[row, key]
                ]
                bias = [near[head, here - key] if here - key < near.shape[1] else 0 for key in seen]
                scores = k[row, group, seen] @ q[row, head, query] + torch.stack(
                    [torch.as_tensor(x) for x in bias]
                )
                masses.append(scores.logsumexp(0))
                outputs.append(scores.softmax(0) @ v[row, group, seen])
    return torch.stack(outputs).view_as(q), torch.stack(masses).view(q.shape[:3])


def case(groups: int, segment: int, cached: int, distances: int) -> list[Tensor]:
    shapes = [(3, HEADS, segment, WIDTH), *[(3, groups, cached + segment, WIDTH)] * 2]
    made = [torch.randn(*shape) for shape in [*shapes, (HEADS, distances)]]
    return [x.requires_grad_() for x in made]


@pytest.mark.parametrize("at_once", [1, 2**20], ids=["a row at a time", "all rows"])
@pytest.mark.parametrize("block", [1, 4, 128])
@pytest.mark.parametrize(
    ("groups", "segment", "cached", "distances"),
    [(4, 9, 0, 3), (1, 9, 5, 8), (2, 8, 7, 15), (4, 1, 3, 1), (2, 1, 0, 1), (1, 6, 2, 8)],
)
def test_outputs_and_gradients_equal_the_formula(
    groups: int,
    segment: int,
    cached: int,
    distances: int,
    block: int,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(local, "BLOCK", block)
    monkeypatch.setitem(local.SCORES, "cpu", at_once)
    inputs = case(groups, segment, cached, distances)
    hidden = torch.arange(cached) < torch.tensor([0, 2, cached])[:, None] if cached else None
    upstream = torch.randn(3, HEADS, segment, WIDTH), torch.randn(3, HEADS, segment)
    found = local_attention(*inputs, hidden, with_mass=True)
    expected = plainly(*inputs, hidden)
    gradients = []
    for output, mass in (found, expected):
        loss = (output * upstream[0]).sum() + (mass * upstream[1]).sum()
        gradients.append(torch.autograd.grad(loss, inputs, allow_unused=True))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(*gradients, strict=True):
        theirs = torch.zeros_like(ours) if theirs is None else theirs
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=2e-5)
    alone, none = local_attention(*inputs, hidden)
    assert none is None
    assert torch.equal(alone, found[0])


def test_what_hidden_places_hold_does_not_matter() -> None:
    q, k, v, near = case(2, 4, 5, 3)
    hidden = torch.tensor([[True] * 3 + [False] * 2] * 3)
    other_k, other_v = k.detach().clone(), v.detach().clone()
    other_k[:, :, :3] = 50.0
    other_v[:, :, :3] = -50.0
    first = local_attention(q, k, v, near, hidden)[0]
    assert torch.equal(first, local_attention(q, other_k, other_v, near, hidden)[0])


def test_values_in_bfloat16_leave_scores_in_fp32() -> None:
    """Scores a few thousandths apart but around 500 would all be one in bfloat16."""
    q, k, v, near = case(1, 8, 8, 4)
    with torch.no_grad():
        q[..., 0], k[..., 0] = 500.0, 1.0
    exact = local_attention(q, k, v, near)[0]
    rounded = local_attention(q, k, v.bfloat16(), near)[0]
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.float(), exact, atol=0.03, rtol=0.02)
    wanted, found = (
        torch.autograd.grad(x.square().sum(), [q, k, v, near]) for x in (exact, rounded)
    )
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours - theirs).norm() < 0.03 * theirs.norm()


@pytest.mark.parametrize("with_mass", [False, True], ids=["", "mass"])
def test_queries_and_keys_in_bfloat16_are_scored_in_fp32(with_mass: bool) -> None:
    """What they hold is all that is lost: the rest agrees with fp32 to fp32 precision."""
    q, k, v, near = case(2, 40, 24, 9)
    q, k = (8 * q).detach().bfloat16(), k.detach().bfloat16()
    found = local_attention(q, k, v, near, with_mass=with_mass)
    expected = local_attention(q.float(), k.float(), v, near, with_mass=with_mass)
    assert torch.equal(found[0], expected[0])
    doubles = (x.double() for x in (q, k, v, near))
    output, mass = plainly(*doubles, None)
    torch.testing.assert_close(found[0].double(), output, atol=2e-5, rtol=2e-5)
    if with_mass:
        assert found[1] is not None
        assert found[1].dtype == torch.float32
        torch.testing.assert_close(found[1].double(), mass, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("cached", [0, 3])
def test_the_fused_kernel_gets_the_same_task(cached: int) -> None:
    """What a GPU runs, run here."""
    attention = small_model(xl_cache=cached, layers=[]).layers[0].attention
    q, k, v, _ = case(2, 5, cached, 1)
    seen = torch.arange(cached) >= torch.tensor([0, 1, cached])[:, None] if cached else None
    near, far = attention.bias.near(5 + cached)
    blocked = local_attention(q, k, v, near, None if seen is None else ~seen)[0]
    fused = attention.fused(q, k, v, seen)
    torch.testing.assert_close(blocked, fused, atol=1e-5, rtol=1e-5)
    parameters = [attention.bias.table.weight, q, k, v]
    upstream = torch.randn_like(fused)
    for ours, theirs in zip(
        *(torch.autograd.grad((x * upstream).sum(), parameters) for x in (blocked, fused)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    assert torch.equal(far, attention.bias.table.weight[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("groups", "segment", "cached", "distances"),
    [(4, 16, 0, 3), (1, 9, 5, 8), (2, 128, 130, 32), (4, 1, 3, 1), (2, 8, 7, 15)],
)
@torch.no_grad()
def test_flex_attention_gets_the_same_task(
    groups: int, segment: int, cached: int, distances: int, dtype: torch.dtype
) -> None:
    """Torch has its backward pass on a GPU alone."""
    q, k, v, near = case(groups, segment, cached, distances)
    q, k, v, near = (
        x.detach().to(y)
        for x, y in zip((q, k, v, near), (dtype, dtype, dtype, torch.float32), strict=True)
    )
    hidden = torch.arange(cached) < torch.tensor([0, 2, cached])[:, None] if cached else None
    found, mass = flex_local_attention(q, k, v, near, hidden, with_mass=True)
    wanted, wanted_mass = local_attention(q, k, v, near, hidden, with_mass=True)
    close = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.03}
    torch.testing.assert_close(found, wanted, **close)
    torch.testing.assert_close(mass, wanted_mass, **close, check_dtype=False)
    assert flex_local_attention(q, k, v, near, hidden)[1] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("groups", [4, 1])
def test_on_a_gpu_flex_attention_has_the_same_gradients(groups: int, dtype: torch.dtype) -> None:
    rows, segment, cached, width = 2, 128, 128, 64
    shapes = [(rows, HEADS, segment, width), *[(rows, groups, cached + segment, width)] * 2]
    q, k, v = (torch.randn(*shape, device="cuda", dtype=dtype) for shape in shapes)
    near = torch.randn(HEADS, 32, device="cuda")
    inputs = [(x / 4).requires_grad_() for x in (q, k, v, near)]
    hidden = torch.arange(cached, device="cuda") < torch.tensor([[0], [90]], device="cuda")
    assert flex_works(q.device, dtype, HEADS, groups, width)
    results = []
    for attend in (flex_local_attention, local_attention):
        output, mass = attend(*inputs, hidden, with_mass=True)
        gradients = torch.autograd.grad(output.float().square().sum() + mass.sum(), inputs)
        results.append([output, mass, *gradients])
    for found, wanted in zip(*results, strict=True):
        far = (found.float() - wanted.float()).norm() / wanted.float().norm()
        assert far < (1e-3 if dtype == torch.float32 else 0.03)


def test_without_flex_attention_a_large_mask_is_never_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """On tensors that say that they are on a GPU, of which torch makes nothing here."""
    attention = small_model(layers=[]).layers[0].attention
    asked = []
    monkeypatch.setattr(attention, "fused", lambda q, *_: asked.append(1) or q)
    q, k, v, _ = case(2, 8, 0, 1)

    class OnGpu(Tensor):
        is_cuda = property(lambda _: True)

    monkeypatch.setattr(attention_file, "flex_works", lambda *_: False)
    for allowed, times in ((0, 0), (2**20, 1)):
        monkeypatch.setattr(attention_file, "MASK_BYTES", allowed)
        found, _ = attention.local(q.detach().as_subclass(OnGpu), k.detach(), v.detach(), None)
        assert found.shape == q.shape
        assert len(asked) == times


def test_flex_attention_is_asked_for_segments_and_not_for_single_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attention = small_model(layers=[]).layers[0].attention
    asked = []
    monkeypatch.setattr(attention_file, "flex_works", lambda *_: True)
    monkeypatch.setattr(
        attention_file, "flex_local_attention", lambda q, *_: (asked.append(q.shape[2]) or q, None)
    )

    class OnGpu(Tensor):
        is_cuda = property(lambda _: True)

    for segment in (1, FEWEST_QUERIES - 1, FEWEST_QUERIES, 200):
        q, k, v, _ = case(2, segment, 0, 1)
        attention.local(q.detach().as_subclass(OnGpu), k.detach(), v.detach(), None)
    assert asked == [FEWEST_QUERIES, 200]
    torch.use_deterministic_algorithms(True)
    try:  # its backward pass adds up in any order
        attention.local(q.detach().as_subclass(OnGpu), k.detach(), v.detach(), None, True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(asked) == 2


def test_long_segments_equal_short_ones_with_a_cache() -> None:
    """Blocks of one segment see what segments of one block see through the cache."""
    model = small_model(xl_cache=300, layers=[])
    tokens = random_tokens(2, 300)
    whole = model(tokens).logits
    bank, parts = model.new_memory(2), []
    for ids in tokens.split(60, dim=1):
        output = model(ids, bank)
        bank.commit(output.pairs)
        parts.append(output.logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=1e-4)
