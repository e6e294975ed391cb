"""Lines of a batch, random JSON under the keys of requests: a bad one is told by a ValueError or a TypeError."""

import dataclasses
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fastdeploy.openai_form import CHAT, COMPLETIONS, IGNORED, NEUTRAL, openai_request
from fastdeploy.sampling_params import SamplingParams

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=5) | st.just("none"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
KEYS = [*IGNORED, *NEUTRAL, *(field.name for field in dataclasses.fields(SamplingParams)), "top_logprobs", "other"]
BODIES = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=4)


@given(url=st.sampled_from([CHAT, COMPLETIONS]) | VALUES, body=BODIES | VALUES)
def test_a_body_is_read_or_refused(url: Any, body: Any) -> None:
    try:
        SamplingParams(**openai_request({"url": url, "body": body}))
    except (ValueError, TypeError) as error:
        assert str(error)
