"""Llama 1 to 3, and what shares their architecture: SmolLM, TinyLlama, Yi, Mistral, ERNIE 4.5.

They differ from the shared decoder in nothing but biases: none, or by the checkpoint's two switches, attention_bias for
q, k, v and o, mlp_bias for gate, up and down. ERNIE's rotary pairs lie in another order, which the configuration says.
"""

from __future__ import annotations

from fastdeploy.models.decoder import Biases, Decoder


class Llama(Decoder):
    """`LlamaForCausalLM`."""

    def biases(self) -> Biases:
        attention = self.config.attention_bias
        return Biases(qkv=attention, attention_output=attention, mlp=self.config.mlp_bias)
