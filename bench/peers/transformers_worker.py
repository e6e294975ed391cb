"""transformers on torch. Environment: `bench/peers/setup_transformers.sh`.

Greedy `model.generate` with scaled dot-product attention and a dynamic key-value cache (on a CPU a static cache is not
compiled, and is slower); the prefill computes the logits of the last token only, as `generate` always does. More
prompts than `--sequences` go in static batches, in the given order: unequal ones are padded on the left and masked, and
a batch runs until its longest output is there.
"""

from bench.peers.worker import arguments, claim_stdout, gguf_path, serve

PADDING = 0  # a token that nobody sees: the mask hides it


def load(path, dtype, threads):
    """The model in `dtype`, dequantised from the GGUF file at `path`, set to plain greedy search."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()
    # No end-of-sequence id: every sequence runs to its full length, and no stopping test is paid for.
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=PADDING, use_cache=True)
    return model


def continued(model, prompts, steps):
    """One static batch: the `steps` greedy tokens after each prompt, [prompts, steps]."""
    import torch

    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[PADDING] * count + prompt for count, prompt in zip(padding, prompts)])
    mask = (torch.arange(longest) >= torch.tensor(padding)[:, None]).long()
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=mask, max_new_tokens=steps)
    if tuple(output.shape) != (len(prompts), longest + steps):
        raise RuntimeError(f"asked for {steps} tokens after {tuple(ids.shape)}, got {tuple(output.shape)}")
    return output[:, longest:]


def main():
    protocol = claim_stdout()
    options = arguments()
    model = load(gguf_path(options.model), options.dtype, options.threads)
    import torch
    import transformers

    def generate(prompts, lengths):
        for start in range(0, len(prompts), options.sequences):
            batch = slice(start, start + options.sequences)
            continued(model, prompts[batch], max(lengths[batch]))

    engine = f"transformers {transformers.__version__}, torch {torch.__version__}"
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    serve(protocol, generate, {"engine": engine, "dtype": options.dtype, "weight_bytes": weights})


if __name__ == "__main__":
    main()
