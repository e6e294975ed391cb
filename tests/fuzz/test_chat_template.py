"""Templates from anybody and messages from everybody: a prompt within the limits, or a ValueError or TypeError."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdeploy.text import renderer
from fastdeploy.text.chat_template import render
from fastdeploy.text.jinja_process import MAX_CHARS
from tests.text.families import TEMPLATES

SECONDS = 0.4  # for a template, instead of ten
HANG = 30
VARIABLES = {"tools": None, "add_generation_prompt": True, "bos_token": "<s>", "eos_token": "</s>"}

VALUES = ["messages", "messages[0].content", "tools", "ns.x", "loop", "'ab'", "7", "10**6", "none", "[ns.x, ns.x]", "x"]
FILTERS = [
    "tojson",
    "center(10**9)",
    "list",
    "join('ab')",
    "indent(999999)",
    "batch(99999, 1)",
    "items",
    "map('upper')",
]
FILTERS += ["round(9**9, 'ceil')", "wordwrap(1)", "sort", "unique", "urlize", "sum(start=[])", "slice(3)", "xmlattr"]
CALLS = [".split('a')", ".ljust(10**10)", ".format(1)", "[::-1]", ".items()", "()", ".encode()", ".x", "['content']"]
OPERATORS = ["+", "*", "**", "%", "~", "//", "==", "in", "and", "<"]
BLOCKS = [
    "{% for x in range(99999) %}@{% endfor %}",
    "{% for m in messages %}@{% endfor %}",
    "{% for k, v in messages[0] | items %}@{% endfor %}",
    "{% for x in messages recursive %}{{ loop(x) }}@{% endfor %}",
    "{% for i in range(70) %}{% set ns.x = $ %}{% endfor %}@",
    "{% macro f(x) %}@{{ f(x) }}{% endmacro %}{{ f($) }}",
    "{% set ns = namespace(x=$) %}@",
    "{% if $ %}@{% else %}@{% endif %}",
    "{% filter indent(99) %}@{% endfilter %}",
    "{% generation %}@{% endgeneration %}",
    "{% set x %}@{% endset %}{{ x }}",
    "{{ raise_exception($) }}",
    "{{ strftime_now('%Y') }}{{ lipsum(n=3) }}{{ cycler($, 1).next() }}",
    "{{ '%9999d' % $ }}{{ '{:>999}'.format($) }}",
    "{% break %}",
    "{% include $ %}",
    "{{ $ }}",
    "{% if $",
    "text",
]

expressions = st.recursive(
    st.sampled_from(VALUES),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(FILTERS)).map(lambda parts: f"({parts[0]}) | {parts[1]}"),
        st.tuples(inner, st.sampled_from(CALLS)).map(lambda parts: f"({parts[0]}){parts[1]}"),
        st.tuples(inner, st.sampled_from(OPERATORS), inner).map(lambda parts: "({}) {} ({})".format(*parts)),
    ),
    max_leaves=5,
)


@st.composite
def assembled(draw):
    """Blocks within blocks."""
    template = "{% set ns = namespace(x='ab') %}@"
    for _ in range(draw(st.integers(1, 4))):
        template = template.replace("@", draw(st.sampled_from(BLOCKS)) + draw(st.sampled_from(["", "@"])))
    while "$" in template:
        template = template.replace("$", draw(expressions), 1)
    return template.replace("@", "")


@st.composite
def mutated(draw):
    """A template of a family with a piece cut out, doubled, or replaced by something else."""
    template = draw(st.sampled_from(list(TEMPLATES.values())))
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, len(template)))
        stop = start + draw(st.integers(0, 30))
        piece = draw(st.one_of(st.just(""), st.just(template[start:stop] * 2), expressions, st.sampled_from(BLOCKS)))
        template = template[:start] + piece + template[stop:]
    return template


@pytest.fixture(autouse=True, scope="module")
def short_limit():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(renderer, "MAX_SECONDS", SECONDS)
        yield


def try_to_render(template, messages, **options):
    started = time.monotonic()
    try:
        prompt = render(template, messages, VARIABLES, **options)
    except (ValueError, TypeError) as error:
        assert str(error)
    else:
        assert isinstance(prompt, str) and len(prompt) <= MAX_CHARS
    assert time.monotonic() - started < HANG


MESSAGES = [{"role": "user", "content": "Hi {{ 1 }}"}, {"role": "assistant", "content": "Hello"}]


@settings(max_examples=settings.default.max_examples // 2)
@given(template=st.one_of(assembled(), mutated()), to_continue=st.booleans())
def test_any_template_gives_a_prompt_or_a_value_error(template, to_continue):
    try_to_render(template, MESSAGES, continue_final_message=to_continue)


@given(template=st.text(st.sampled_from("{%}-#'\"|()[]:.,x1 \n\\é"), max_size=40))
def test_any_text_is_a_template_or_a_value_error(template):
    try_to_render(template, MESSAGES)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(st.characters(), max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=3), inner, max_size=3)),
    max_leaves=6,
)
parts = st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": st.text(max_size=5)}), max_size=3)
arguments = st.one_of(json_values, st.sampled_from(['{"a": 1}', "{", "[]", "", '{"a": NaN}', "[" * 9999]))
functions = st.one_of(json_values, st.fixed_dictionaries({}, optional={"name": json_values, "arguments": arguments}))
calls = st.lists(st.one_of(json_values, st.fixed_dictionaries({}, optional={"id": json_values, "function": functions})))
fields = {"role": st.sampled_from(["user", "assistant", "tool", "system"]), "content": st.one_of(st.text(), parts)}
others = {"tool_calls": st.one_of(st.none(), calls), "name": json_values, "content": json_values}
messages = st.one_of(
    st.fixed_dictionaries(fields, optional={"tool_calls": others["tool_calls"], "name": json_values}),
    st.fixed_dictionaries({"role": fields["role"]}, optional=others),
    json_values,
)


@given(
    template=st.sampled_from(list(TEMPLATES.values())),
    conversation=st.one_of(st.lists(messages, max_size=3), json_values),
    to_continue=st.booleans(),
)
def test_any_messages_give_a_prompt_or_an_error_that_says_why_not(template, conversation, to_continue):
    try_to_render(template, conversation, continue_final_message=to_continue)
