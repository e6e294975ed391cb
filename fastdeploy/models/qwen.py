"""Qwen2 and 2.5: a Llama whose q, k and v add a bias. Qwen3: a Llama that normalises every head of q and k."""

from __future__ import annotations

from fastdeploy.models.decoder import Biases, Decoder
from fastdeploy.models.llama import Llama


class Qwen2(Decoder):
    """`Qwen2ForCausalLM`."""

    def biases(self) -> Biases:
        return Biases(qkv=True)


class Qwen3(Llama):
    """`Qwen3ForCausalLM`."""

    normalises_heads = True
