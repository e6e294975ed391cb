"""How a model is divided among the ranks of tensor parallelism, after Megatron-LM (Shoeybi et al., 2019).

    q, k, v; gate, up     by output features: whole heads, and equal shares of the intermediate features. What a rank
                          has computed is input to its own share of the next layer alone
    attention output,     by input features. Every rank has a summand of the result: an all-gather and a sum in the
    down                  order of ranks make it whole, twice a layer
    embedding, LM head    by vocabulary, in shares of the same size, the last one padded. A rank embeds the tokens that
                          it has, the others are zeros in its summand; the logits of all ranks are joined
    norms                 every rank has all of them

Where there are more ranks than KV heads, several ranks hold the same one.
"""

from __future__ import annotations

from dataclasses import dataclass

from fastdeploy.config import ModelConfig


@dataclass(frozen=True)
class Shard:
    """The part of a model that rank `rank` of `ranks` holds."""

    rank: int = 0
    ranks: int = 1

    def of(self, count: int) -> range:
        """Its share of `count` things, which `check_divisible` has found divisible."""
        return range(count * self.rank // self.ranks, count * (self.rank + 1) // self.ranks)

    def of_kv_heads(self, count: int) -> range:
        """Its KV heads: a share, or the one that its query heads read."""
        if count >= self.ranks:
            return self.of(count)
        head = self.rank * count // self.ranks
        return range(head, head + 1)

    def of_vocabulary(self, size: int) -> range:
        """Its tokens: `vocabulary_width` of them, fewer on the last rank."""
        width = self.vocabulary_width(size)
        return range(min(self.rank * width, size), min((self.rank + 1) * width, size))

    def vocabulary_width(self, size: int) -> int:
        """Tokens of a rank, padding included."""
        return -(-size // self.ranks)


WHOLE = Shard()


def check_divisible(config: ModelConfig, ranks: int) -> None:
    """Raise ValueError if this model can't be divided among so many ranks."""
    found = _indivisible(config, ranks)
    if found:
        possible = [str(number) for number in range(1, config.num_heads + 1) if not _indivisible(config, number)]
        raise ValueError(
            f"tensor_parallel_size={ranks}: {' and '.join(found)} can't be divided among so many ranks; this model "
            f"takes {', '.join(possible)}"
        )


def _indivisible(config: ModelConfig, ranks: int) -> list[str]:
    """What of the model can't be divided, in words."""
    heads, kv_heads, intermediate = config.num_heads, config.num_kv_heads, config.intermediate_size
    remainders = {
        f"{heads} query heads": heads % ranks,
        f"{kv_heads} KV heads": kv_heads % ranks if kv_heads >= ranks else ranks % kv_heads,
        f"{intermediate} intermediate features": intermediate % ranks,
    }
    if config.mixture is not None:
        experts, shared = config.mixture.intermediate_size, config.mixture.shared_size
        remainders |= {f"{experts} features of an expert": experts % ranks, f"{shared} shared ones": shared % ranks}
    return [name for name, remainder in remainders.items() if remainder]
