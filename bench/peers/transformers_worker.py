"""transformers on torch, for `bench/engine.py`. Environment: `bench/peers/setup_transformers.sh`.

Greedy `model.generate` with scaled dot-product attention and a dynamic key-value cache (on a CPU a static cache is not
compiled, and is slower); the prefill computes the logits of the last token only, as `generate` always does.
"""

from bench.peers.worker import arguments, claim_stdout, gguf_path, serve


def load(path, dtype, threads):
    """The model in `dtype`, dequantised from the GGUF file at `path`, set to plain greedy search."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()
    # No end-of-sequence id: every sequence runs to its full length, and no stopping test is paid for.
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0, use_cache=True)
    return model


def main():
    protocol = claim_stdout()
    options = arguments()
    model = load(gguf_path(options.model), options.dtype, options.threads)
    import torch
    import transformers

    def generate(prompts, new_tokens):
        ids = torch.tensor(prompts)
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new_tokens)
        if tuple(output.shape) != (len(prompts), len(prompts[0]) + new_tokens):
            raise RuntimeError(f"asked for {new_tokens} tokens after {tuple(ids.shape)}, got {tuple(output.shape)}")

    engine = f"transformers {transformers.__version__}, torch {torch.__version__}"
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    serve(protocol, generate, {"engine": engine, "dtype": options.dtype, "weight_bytes": weights})


if __name__ == "__main__":
    main()
