"""Make families.json: what transformers in fp32 computes with the tiny random checkpoints of families.py.

    sh bench/peers/setup_transformers.sh
    .peers/transformers/bin/python -m tests.references.make_families       # from the repository's root; a few seconds

For every checkpoint and prompt: the logits after the prompt's last token, the logprob of each token of the prompt given
those before it, and the greedy tokens that follow, with their logprobs and margins (largest logit less the second).
"""

import json
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.references.families import CASES, NEW_TOKENS, prompts, write_checkpoint


def load(config: dict) -> torch.nn.Module:
    with tempfile.TemporaryDirectory() as directory:
        write_checkpoint(Path(directory), config)
        model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: found for kind, found in info.items() if found}
    if wrong:
        raise ValueError(f"the tensors are not those that transformers expects: {wrong}")
    return model.eval()


@torch.inference_mode()
def answer(model: torch.nn.Module, ids: list[int]) -> dict:
    """Every step computes the whole sequence anew: no cache that could be wrong."""
    sequence, margins = list(ids), []
    for _ in range(NEW_TOKENS):
        logits = model(torch.tensor([sequence]), use_cache=False).logits[0]
        largest = logits[-1].topk(2).values
        margins.append(round(float(largest[0] - largest[1]), 4))
        if len(sequence) == len(ids):
            after_prompt = [round(float(value), 5) for value in logits[-1]]
        sequence.append(int(logits[-1].argmax()))
    logprobs = logits.log_softmax(dim=-1)  # of all tokens but the first
    chosen = [round(float(logprobs[i, token]), 5) for i, token in enumerate(sequence[1:])]
    return {
        "prompt_token_ids": ids,
        "logits": after_prompt,
        "prompt_logprobs": chosen[: len(ids) - 1],
        "token_ids": sequence[len(ids) :],
        "logprobs": chosen[len(ids) - 1 :],
        "margins": margins,
    }


def main() -> None:
    references = {}
    for name, config in CASES.items():
        model = load(config)
        references[name] = [answer(model, ids) for ids in prompts(config)]
        print(name, "least margins", [min(reference["margins"]) for reference in references[name]])
    made_with = {module.__name__: module.__version__ for module in (torch, transformers)}
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(answers)}" for name, answers in references.items())
    path = Path(__file__).with_name("families.json")
    path.write_text(f'{{"made_with": {json.dumps(made_with)},\n"references": {{\n{lines}\n}}}}\n')


if __name__ == "__main__":
    main()
