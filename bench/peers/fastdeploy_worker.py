"""Our own engine: all prompts in one `generate`, batched continuously. Runs in the environment of the driver itself.

The KV cache holds `--sequences` sequences of `--length` tokens: enough for all that run at a time, no more than a peer
sets aside. Besides a float type, `--dtype` may be a value of `quantization`, "auto" for one: `fastdeploy:auto`.
"""

import json

from bench.peers.worker import claim_stdout, parser, serve


def main():
    protocol = claim_stdout()
    command_line = parser()
    command_line.add_argument("--keywords", type=json.loads, default={}, help="further keywords of LLM, JSON")
    options = command_line.parse_args()
    import fastdeploy
    from fastdeploy import LLM, SamplingParams
    from fastdeploy.engine_config import DTYPES

    floats = options.dtype in DTYPES and options.dtype != "auto"
    keywords = {"dtype": options.dtype, "quantization": None} if floats else {"quantization": options.dtype}
    keywords |= {"max_model_len": options.length, "max_num_seqs": options.sequences, **options.keywords}
    llm = LLM(options.model, **keywords)

    def generate(prompts, lengths):
        params = [SamplingParams(temperature=0, max_tokens=length, ignore_eos=True) for length in lengths]
        outputs = llm.generate(prompts, params, use_tqdm=False)
        found = [len(output.outputs.token_ids) for output in outputs]
        if found != lengths:
            errors = [output.error_msg for output in outputs if output.error_msg]
            raise RuntimeError(f"asked for {lengths} tokens after the prompts, got {found}: {errors}")

    serve(protocol, generate, {"engine": f"fastdeploy {fastdeploy.__version__}", **llm.facts})


if __name__ == "__main__":
    main()
