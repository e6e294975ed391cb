"""llama.cpp through llama-cpp-python's C interface. Environment: `bench/peers/setup_llama_cpp.sh`.

The weights stay as they are in the file: `--dtype auto`. One `llama_decode` computes a token of every running sequence
and, up to 512 tokens together, the prompts of those that wait for a slot, as llama.cpp's own server does it: whoever is
done makes room for the next. Logits are computed of the tokens that are followed by a new one only.

Fastest on two cores, and therefore set: flash attention; one key-value buffer that all sequences share where more than
one runs; the file mapped (it isn't repacked: ggml has a special layout for Q4_0, none for Q4_1).
"""

import ctypes
from dataclasses import dataclass

from bench.peers.worker import arguments, claim_stdout, gguf_path, serve

BATCH = 512  # most tokens of one llama_decode


@dataclass
class Slot:
    """A sequence that runs: tokens it has yet to compute, how many it has computed, how many will be appended."""

    sequence: int
    tokens: list[int]
    computed: int
    wanted: int


class Engine:
    """Greedy generation, continuously batched. `sequences` run at a time, of `length` tokens at most."""

    def __init__(self, path, threads, sequences, length):
        import llama_cpp
        import numpy

        self.api, self.numpy = llama_cpp, numpy
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = sequences * length, sequences, sequences > 1
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp made no context for {path}")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.sequences = sequences

    def generate(self, prompts, lengths):
        """The `lengths[i]` greedy tokens after `prompts[i]`: a list for each prompt."""
        outputs = [[] for _ in prompts]
        waiting = list(enumerate(zip(prompts, lengths)))[::-1]
        slots = {}  # request -> Slot
        free = list(range(self.sequences))
        while waiting or slots:
            while waiting and free:
                request, (prompt, wanted) = waiting.pop()
                slots[request] = Slot(free.pop(), list(prompt), 0, wanted)
            for request, token in self.step(slots):
                slot = slots[request]
                outputs[request].append(token)
                slot.tokens = [token]
                if len(outputs[request]) == slot.wanted:
                    self.api.llama_memory_seq_rm(self.memory, slot.sequence, -1, -1)
                    free.append(slots.pop(request).sequence)
        return outputs

    def step(self, slots):
        """One llama_decode. (request, new token) of those whose tokens have all been computed."""
        batch, followed = self.batch, []
        batch.n_tokens = 0
        for request, slot in sorted(slots.items(), key=lambda item: len(item[1].tokens) > 1):  # who decodes goes first
            now, slot.tokens = slot.tokens[: BATCH - batch.n_tokens], slot.tokens[BATCH - batch.n_tokens :]
            for token in now:
                self.append(token, slot)
            if now and not slot.tokens:
                batch.logits[batch.n_tokens - 1] = 1
                followed.append(request)
        if status := self.api.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode of {batch.n_tokens} tokens: status {status}")
        if not followed:
            return []
        logits = ctypes.cast(self.api.llama_get_logits(self.context), ctypes.POINTER(ctypes.c_float))
        best = self.numpy.ctypeslib.as_array(logits, (len(followed), self.vocabulary)).argmax(axis=1)
        return list(zip(followed, best.tolist()))

    def append(self, token, slot):
        """`token` of `slot` to the batch, without logits."""
        batch, row = self.batch, self.batch.n_tokens
        batch.token[row], batch.pos[row] = token, slot.computed
        batch.n_seq_id[row], batch.seq_id[row][0] = 1, slot.sequence
        batch.logits[row] = 0
        batch.n_tokens += 1
        slot.computed += 1


def main():
    protocol = claim_stdout()
    options = arguments()
    if options.dtype != "auto":
        raise ValueError(f"llama_cpp:{options.dtype}: the weights are those of the file; say llama_cpp:auto")
    engine = Engine(gguf_path(options.model), options.threads, options.sequences, options.length)
    name = f"llama.cpp (llama-cpp-python {engine.api.__version__})"
    serve(protocol, engine.generate, {"engine": name, "dtype": options.dtype})


if __name__ == "__main__":
    main()
