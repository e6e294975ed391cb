"""Our own engine, for `bench/engine.py`. Runs in the environment of the driver itself."""

from bench.peers.worker import arguments, claim_stdout, serve

MAX_MODEL_LEN = 1024  # the longest case has 513 tokens; a KV cache for 8192 would be memory that no peer sets aside
MAX_NUM_SEQS = 8


def main():
    protocol = claim_stdout()
    options = arguments()
    import fastdeploy
    from fastdeploy import LLM, SamplingParams

    llm = LLM(options.model, dtype=options.dtype, max_model_len=MAX_MODEL_LEN, max_num_seqs=MAX_NUM_SEQS)

    def generate(prompts, new_tokens):
        params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
        outputs = llm.generate(prompts, params, use_tqdm=False)
        lengths = [len(output.outputs.token_ids) for output in outputs]
        if lengths != [new_tokens] * len(prompts):
            raise RuntimeError(f"asked for {new_tokens} tokens of each prompt, got {lengths}: {outputs[0].error_msg}")

    serve(protocol, generate, {"engine": f"fastdeploy {fastdeploy.__version__}", **llm.facts})


if __name__ == "__main__":
    main()
