"""OpenVINO GenAI. Environment: `bench/peers/setup_openvino.sh`.

It reads the GGUF file itself: 4-bit weights, activations and key-value cache quantised as OpenVINO does by default
(`--dtype auto`). Its reader changes the weights: even with everything else in float32 its greedy tokens leave those of
transformers at the first tokens already. All prompts in one `generate`, batched continuously, without a prefix cache.

Fastest on two cores, and therefore set: the hint LATENCY (tok/s at batch 1, 8 and in prefill: 73, 427, 1573; without it
67, 383, 1573). Not faster: float32 instead of bfloat16 (69, 440, 1430), wider groups for its int8 activations (72, 286,
1274), its `LLMPipeline` (63, 367, 1445).
"""

from bench.peers.worker import arguments, claim_stdout, gguf_path, serve

BLOCK = 32  # tokens: OpenVINO's own choice on CPUs
PROMPT_TOKENS = 2048  # most tokens of a step


def load(path, threads, sequences, length):
    """The pipeline, with a cache for `sequences` of `length` tokens."""
    import openvino_genai

    scheduler = openvino_genai.SchedulerConfig()
    scheduler.enable_prefix_caching = False
    scheduler.max_num_seqs = sequences
    scheduler.max_num_batched_tokens = PROMPT_TOKENS
    scheduler.num_kv_blocks = sequences * -(-length // BLOCK)
    return openvino_genai.ContinuousBatchingPipeline(
        str(path), scheduler, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    )


def main():
    protocol = claim_stdout()
    options = arguments()
    if options.dtype != "auto":
        raise ValueError(f"openvino:{options.dtype}: the weights are those of the file; say openvino:auto")
    import numpy
    import openvino
    import openvino_genai

    pipeline = load(gguf_path(options.model), options.threads, options.sequences, options.length)

    def greedy(length):
        config = openvino_genai.GenerationConfig()
        config.max_new_tokens, config.ignore_eos, config.do_sample = length, True, False
        return config

    def generate(prompts, lengths):
        inputs = [openvino.Tensor(numpy.array([prompt], numpy.int64)) for prompt in prompts]
        found = [result.m_generation_ids[0] for result in pipeline.generate(inputs, list(map(greedy, lengths)))]
        if [len(tokens) for tokens in found] != lengths:
            raise RuntimeError(f"asked for {lengths} tokens after the prompts, got {[len(tokens) for tokens in found]}")
        return found

    serve(protocol, generate, {"engine": f"openvino-genai {openvino_genai.__version__}", "dtype": options.dtype})


if __name__ == "__main__":
    main()
