"""SamplingParams: how the tokens of one request are chosen and when they end. Checked when built."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass

from fastdeploy.checks import check_int, check_number, complaint, suggesting_keywords

logger = logging.getLogger("fastdeploy")

DEFAULT_TEMPERATURE = 1.0
DEFAULT_TOP_P = 0.7  # FastDeploy's default where the checkpoint names none; most engines take 1.0
MAX_SEED = 2**63 - 1
MAX_TEMPERATURE = 3.4e38  # it goes to the sampler as a float32


@suggesting_keywords("SamplingParams")
@dataclass
class SamplingParams:
    """How to sample one completion. Wrong types are a TypeError, wrong values a ValueError, when built.

    One object may serve many prompts and many calls: the engine works on a copy and never changes it.

    temperature: logits are divided by it before the softmax; 0 takes the most probable token (ties: lowest id).
        None: the checkpoint's generation config, else 1.0.
    top_p: keep the fewest most probable tokens whose probabilities reach top_p; 0 takes the most probable token.
        None: the checkpoint's generation config, else 0.7.
    max_tokens: end after this many output tokens; clipped to what the prompt leaves of max_model_len. None: all of it.
    seed: the random numbers are a function of (seed, position, token id) alone, so a seeded request draws the same
        tokens in any company. None: drawn from the engine's own seed, another one for each request.
    ignore_eos: go on after an end-of-sequence token.
    stop_token_ids: end after any of these ids, which stays in token_ids but not in the text.
    """

    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if self.temperature is not None:
            self.temperature = check_number(owner, "temperature", self.temperature, low=0, high=MAX_TEMPERATURE)
        if self.top_p is not None:
            self.top_p = check_number(owner, "top_p", self.top_p, low=0, high=1)
        if self.max_tokens is not None:
            self.max_tokens = check_int(owner, "max_tokens", self.max_tokens, low=1)
        if self.seed is not None:
            self.seed = check_int(owner, "seed", self.seed, low=0, high=MAX_SEED)
        if not isinstance(self.ignore_eos, bool):
            raise TypeError(complaint(owner, "ignore_eos", self.ignore_eos, "must be True or False"))
        if self.stop_token_ids is not None:
            self.stop_token_ids = self._checked_ids("stop_token_ids", self.stop_token_ids)

    def _checked_ids(self, field: str, ids: object) -> list[int]:
        """A copy of `ids`, so that a list the caller changes later does not change the request."""
        owner = type(self).__name__
        if not isinstance(ids, (list, tuple)):
            raise TypeError(complaint(owner, field, ids, f"must be a list of token ids, not {type(ids).__name__}"))
        return [check_int(owner, f"{field}[{i}]", token_id, low=0) for i, token_id in enumerate(ids)]

    def resolved(self, defaults: SamplingParams, room: int, seed: int) -> SamplingParams:
        """A copy in which nothing is left open, checked anew: the caller may have assigned to fields since.

        defaults: what `sampling_defaults` made of the checkpoint. room: most output tokens that max_model_len leaves.
        seed: for a request that names none.
        """
        return dataclasses.replace(
            self,
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            max_tokens=room if self.max_tokens is None else min(self.max_tokens, room),
            seed=seed if self.seed is None else self.seed,
            stop_token_ids=self.stop_token_ids or [],
        )


def sampling_defaults(generation_config: Mapping[str, object]) -> SamplingParams:
    """What temperature and top_p are when a request names none: the checkpoint's word, else 1.0 and 0.7. Logged."""
    named = {
        field: generation_config[field]
        for field in ("temperature", "top_p")
        if generation_config.get(field) is not None
    }
    values = {"temperature": DEFAULT_TEMPERATURE, "top_p": DEFAULT_TOP_P, **named}
    try:
        defaults = SamplingParams(**values)  # type: ignore[arg-type]
    except (TypeError, ValueError) as error:
        raise ValueError(f"the checkpoint's generation_config has a bad default: {error}") from error
    origin = "the generation config names " + ", ".join(named) if named else "no generation config names them"
    logger.info("sampling defaults: temperature %g, top_p %g (%s)", defaults.temperature, defaults.top_p, origin)
    return defaults
