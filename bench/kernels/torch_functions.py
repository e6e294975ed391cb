"""What a PyTorch user would write, one function for each operation: eager as it stands, and for torch.compile.

For each there is a pair: `operation(case, tensors)` prepares, `_operation(...)` computes and is what is compiled.
None of them waits for the device, so that each can be captured in a CUDA graph.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import functional

from bench.kernels.cases import Case
from bench.kernels.machine import Unavailable
from bench.kernels.operations import EPS, Attention, Linear, Logprobs, Mixture, Rope, Sampling


def rms_norm(case: Case, tensors: Any) -> partial:
    return partial(_rms_norm, tensors["x"], tensors["weight"].to(tensors["x"].dtype))


def _rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.rms_norm(x, weight.shape, weight, EPS)


def add_rms_norm(case: Case, tensors: Any) -> partial:
    residual = tensors["residual"]
    return partial(_add_rms_norm, residual, tensors["delta"], tensors["weight"].to(residual.dtype))


def _add_rms_norm(residual: torch.Tensor, delta: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    residual.add_(delta)
    return functional.rms_norm(residual, weight.shape, weight, EPS)


def silu_mul(case: Case, tensors: Any) -> partial:
    return partial(_silu_mul, tensors["gate_up"])


def _silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def rope_and_cache(case: Rope, tensors: Any) -> partial:
    heads, qkv = case.model.heads, tensors["qkv"]
    caches = [
        torch.empty(case.tokens, heads.num_kv_heads, heads.head_dim, dtype=torch.bfloat16, device=qkv.device)
        for _ in range(2)
    ]
    norms = [tensors[name].to(qkv.dtype) if name in tensors else None for name in ("q_norm", "k_norm")]
    inputs = [tensors[name] for name in ("positions", "slots", "cos", "sin")]
    split = (heads.num_heads, heads.num_kv_heads, heads.num_kv_heads)
    return partial(_rope_and_cache, qkv, *inputs, *caches, *norms, split, heads.interleaved)


def _rope_and_cache(
    qkv: torch.Tensor, positions: torch.Tensor, slots: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor,
    k_cache: torch.Tensor, v_cache: torch.Tensor, q_norm: torch.Tensor | None, k_norm: torch.Tensor | None,
    split: tuple[int, int, int], interleaved: bool,
) -> torch.Tensor:  # fmt: skip
    """The turned q; keys and values go to [slots, KVH, D]."""
    width = k_cache.shape[2]
    q, k, v = qkv.view(len(qkv), -1, width).split(split, dim=1)
    if q_norm is not None:
        q, k = functional.rms_norm(q, (width,), q_norm, EPS), functional.rms_norm(k, (width,), k_norm, EPS)
    cosines, sines = (table.index_select(0, positions).unsqueeze(1) for table in (cos, sin))
    k_cache.index_copy_(0, slots, _turned(k, cosines, sines, interleaved).to(k_cache.dtype))
    v_cache.index_copy_(0, slots, v.to(v_cache.dtype))
    return _turned(q, cosines, sines, interleaved).to(qkv.dtype).flatten(1)


def _turned(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor, interleaved: bool) -> torch.Tensor:
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.chunk(2, dim=-1)
    turned = (a * cosines - b * sines, b * cosines + a * sines)
    return torch.stack(turned, dim=-1).flatten(-2) if interleaved else torch.cat(turned, dim=-1)


def embedding(case: Case, tensors: Any) -> partial:
    return partial(_embedding, tensors["ids"], tensors["table"], getattr(torch, case.dtype))


def _embedding(ids: torch.Tensor, table: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return functional.embedding(ids, table).to(dtype)


def gather_rows(case: Case, tensors: Any) -> partial:
    return partial(_gather_rows, tensors["x"], tensors["rows"])


def _gather_rows(x: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return x.index_select(0, rows)


def linear(case: Linear, tensors: Any) -> partial:
    return partial(_linear, tensors["x"], tensors["weight"].to(tensors["x"].dtype))


def _linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return functional.linear(x, weight)


def attention(case: Attention, tensors: Any) -> partial:
    heads, (tokens, context) = case.model.heads, case.sequences[0]
    if case.kind == "mixed":
        raise Unavailable("scaled_dot_product_attention takes sequences of one length")
    batch, qkv = len(case.sequences), tensors["qkv"]
    q = qkv[:, : heads.num_heads * heads.head_dim].view(batch, tokens, heads.num_heads, heads.head_dim)
    shape = (batch, context, heads.num_kv_heads, heads.head_dim)
    k, v = (tensors[name].view(shape).to(qkv.dtype) for name in ("keys", "values"))
    return partial(_attention, *(x.transpose(1, 2) for x in (q, k, v)), tokens > 1)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    attended = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
    return attended.transpose(1, 2).flatten(2).flatten(0, 1)


def moe(case: Mixture, tensors: Any) -> partial:
    model, x = case.model, tensors["x"]
    gate_up = tensors["gate_up"].view(model.experts, 2 * model.expert_width, model.hidden)
    down = tensors["down"].view(model.experts, model.hidden, model.expert_width)
    weights = (gate_up.to(x.dtype).transpose(1, 2), down.to(x.dtype).transpose(1, 2))
    return partial(_moe, x, tensors["logits"], *weights, model.top_k, case.floor)


def _moe(
    x: torch.Tensor, logits: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, top_k: int, floor: float
) -> torch.Tensor:
    """gate_up [E, H, 2I], down [E, I, H]; pairs of token and expert sorted by expert, as in our kernel."""
    product = functional.grouped_mm if hasattr(functional, "grouped_mm") else torch._grouped_mm
    weights, experts = torch.softmax(logits, dim=-1).topk(top_k)
    weights = weights / weights.sum(dim=-1, keepdim=True).clamp(min=floor)
    pairs = experts.flatten()
    order = pairs.argsort(stable=True)
    counts = (pairs.unsqueeze(1) == torch.arange(len(gate_up), device=x.device)).sum(dim=0)
    ends = counts.cumsum(0).to(torch.int32)
    gated = _silu_mul(product(x.index_select(0, order // top_k), gate_up, offs=ends))
    sorted_rows = product(gated, down, offs=ends)
    rows = torch.empty_like(sorted_rows).index_copy_(0, order, sorted_rows).view(len(x), top_k, -1)
    return (rows * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)


def sample(case: Sampling, tensors: Any) -> partial:
    logits, steering = tensors["logits"], case.steering
    if steering.temperature == 0:
        return partial(_argmax, logits)
    return partial(_draw, logits, steering.top_k, steering.top_p)


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(dim=-1)


def _draw(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """By sorting; the draw is a race of exponential variates, as torch.multinomial would wait for the device."""
    values, ids = logits.topk(top_k) if top_k else logits.sort(dim=-1, descending=True)
    masses = torch.softmax(values, dim=-1)
    masses = masses.masked_fill(masses.cumsum(dim=-1) - masses >= top_p, 0.0)
    winners = (masses / torch.empty_like(masses).exponential_()).argmax(dim=-1, keepdim=True)
    return ids.gather(1, winners).squeeze(1)


def token_logprobs(case: Logprobs, tensors: Any) -> partial:
    return partial(_token_logprobs, tensors["logits"], tensors["tokens"].long().unsqueeze(1), case.num_top)


def _token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> tuple[Any, ...]:
    value = logits.gather(1, tokens)
    logprob = value - logits.logsumexp(dim=-1, keepdim=True)
    return logprob.squeeze(1), (logits > value).sum(dim=-1) + 1, *logits.topk(num_top)
