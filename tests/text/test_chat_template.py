"""What chat templates make of conversations: published families, choice among several, where checkpoints have them."""

import json
import logging
import os
from datetime import datetime

import gguf
import jinja2.ext
import jinja2.sandbox
import openai.types.chat
import pytest

from fastdeploy.models.gguf import GGUFFile
from fastdeploy.text.chat_template import check, choose, given_source, render, templates_of_directory, templates_of_gguf
from tests.text.families import TEMPLATES

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello!"}
SYSTEM = {"role": "system", "content": "Be brief."}
CITY = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "array", "items": {}}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Of a city.", "parameters": CITY}}]
RESULT = {"role": "tool", "tool_call_id": "c1", "name": "weather", "content": "20 degrees"}
VARIABLES = {"tools": None, "documents": None, "bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}


def call(arguments, **others):
    function = {"name": "weather", "arguments": arguments}
    return {"role": "assistant", "tool_calls": [{"id": "c1", "type": "function", "function": function}], **others}


def reference(template, messages, **variables):
    """Jinja as transformers documents it, with the messages as they are."""
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    source = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    return environment.from_string(source).render(messages=messages, **{**VARIABLES, **variables})


def rendered(template, messages, continue_final_message=False, **variables):
    return render(template, messages, {**VARIABLES, **variables}, continue_final_message)


# --- published families --------------------------------------------------------------------------------------------

WITHOUT_SYSTEM = ("gemma", "mistral", "llama2")


@pytest.mark.parametrize("family", TEMPLATES)
def test_plain_conversations_are_rendered_as_jinja_does(family):
    template = TEMPLATES[family]
    turns = [HI, {**HELLO, "content": "<think>\nhm\n</think>\n\nHello!"}, {**HI, "content": " And <you>? é "}]
    for messages in ([HI], turns, turns[:2], [SYSTEM, *turns] if family not in WITHOUT_SYSTEM else turns):
        for flag in (True, False):
            expected = reference(template, messages, add_generation_prompt=flag)
            assert rendered(template, messages, add_generation_prompt=flag) == expected
            assert "Hi" in expected


CALLING = ("llama3", "qwen3", "mistral", "glm", "hermes", "harmony")


@pytest.mark.parametrize("family", CALLING)
def test_arguments_as_json_text_are_the_object_that_templates_expect(family):
    template, arguments = TEMPLATES[family], {"city": "Zürich", "days": [1, 2]}
    tools = TOOLS if "tools" in template else None
    expected = reference(template, [HI, call(arguments, content=""), RESULT, HELLO], tools=tools)
    given = call(json.dumps(arguments, ensure_ascii=False), content=None)
    assert rendered(template, [HI, given, RESULT, HELLO], tools=tools) == expected
    assert "Zürich" in expected
    assert isinstance(given["tool_calls"][0]["function"]["arguments"], str), "the caller's own is as it was"


def test_arguments_are_text_to_a_template_that_adds_text_to_them():
    text = '{"city":  "Rome"}'
    messages = [HI, call(text, content=None), RESULT]
    expected = reference(TEMPLATES["deepseek"], messages)
    assert text in expected
    assert rendered(TEMPLATES["deepseek"], messages) == expected
    template = "{{ x }}|{{ x ~ '' }}|{{ x + 'b' }}|{{ 'a' + x }}|{{ x | string }}|{{ '%s' % x }}"
    template = "{% set x = messages[1].tool_calls[0].function.arguments %}" + template
    assert rendered(template, messages) == "|".join([text, text, text + "b", "a" + text, text, text])


@pytest.mark.parametrize(("text", "seen"), [("", "{}"), ("{", '"{"'), ("[1]", '"[1]"'), ("null", '"null"')])
def test_arguments_that_are_no_json_object_stay_text(text, seen):
    template = "{{ messages[0].tool_calls[0].function.arguments | tojson }}"
    assert rendered(template, [call(text)]) == seen


@pytest.mark.parametrize("family", TEMPLATES)
def test_a_text_in_parts_is_rendered_whole(family):
    template = TEMPLATES[family]
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    iterates = family in ("glm", "vision")
    expected = reference(template, [{**HI, "content": "onetwo" if iterates else "one\ntwo"}, HELLO])
    assert rendered(template, [{**HI, "content": parts}, HELLO]) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for c in messages[0].content %}{{ c.text }}.{% endfor %}",
        "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] }}.{% endfor %}{% endfor %}",
        "{% set x = messages[0]['content'] %}{% for c in x | list %}{{ c['text'] }}.{% endfor %}",
        "{% macro f(x) %}{% for c in x %}{{ c.text }}.{% endfor %}{% endmacro %}{{ f(messages[0].content) }}",
        "{% macro f(x) %}{% for c in x %}{{ c.text }}.{% endfor %}{% endmacro %}{{ f(x=messages[0].content) }}",
        "{% macro f(m) %}{% set c = m.get('content') %}{% for p in c %}{{ p.text }}.{% endfor %}{% endmacro %}"
        "{{ f(messages[0]) }}",
        "{% set ns = namespace() %}{% set ns.c = messages[0].content %}{% for p in ns.c %}{{ p.text }}.{% endfor %}",
        "{{ messages[0].content | map(attribute='text') | join('.') }}.",
        "{{ messages[0].content[0].text }}.{{ messages[0]['content'][1]['text'] }}.",
    ],
)
def test_a_template_that_looks_into_parts_gets_them(template):
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert rendered(template, [{**HI, "content": parts}]) == "one.two."


def test_parts_are_text_where_such_a_template_takes_text():
    parts = [{"type": "text", "text": "Be brief."}]
    messages = [{**SYSTEM, "content": parts}, {**HI, "content": parts}]
    assert rendered(TEMPLATES["vision"], messages) == "<s>Be brief.<user>Be brief.<assistant>"


def test_fields_that_are_none_are_absent():
    template = "{% for m in messages %}{{ m | list | join(',') }};{% endfor %}{{ messages | tojson }}"
    bare = [HI, {"role": "assistant", "tool_calls": [{"type": "function"}]}]
    given = [{**HI, "name": None, "tool_calls": None}, {**bare[1], "content": None, "refusal": None}]
    assert rendered(template, given) == reference(template, bare)


def test_no_content_beside_a_tool_call_is_no_text():
    template = "{{ 'a' + messages[0].content + messages[0]['content'] | trim }}{{ 'content' in messages[0] }}"
    assert rendered(template, [call("{}", content=None)]) == "aFalse" == rendered(template, [call("{}")])


def test_messages_of_the_openai_package_are_taken_as_they_come():
    function = {"name": "weather", "arguments": '{"city": "Rome"}'}
    message = openai.types.chat.ChatCompletionMessage.model_validate(
        {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": function}]}
    )
    messages = [HI, message, RESULT]
    expected = reference(TEMPLATES["qwen3"], [HI, call({"city": "Rome"}, content=""), RESULT])
    assert rendered(TEMPLATES["qwen3"], messages) == expected
    messages[1] = {"role": "assistant", "content": None, "tool_calls": message.tool_calls}
    assert rendered(TEMPLATES["qwen3"], messages) == expected


def test_the_callers_messages_are_not_changed():
    messages = [HI, call('{"city": "Rome"}', content=None), {**HI, "content": [{"type": "text", "text": "a"}]}]
    before = json.dumps(messages)
    rendered(TEMPLATES["glm"], messages, continue_final_message=True, add_generation_prompt=False)
    assert json.dumps(messages) == before


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        (
            [{**HI, "content": [{"type": "image_url", "image_url": {}}]}],
            ValueError,
            r"\[0\]\['content'\]\[0\].*'image_url'",
        ),
        ([HI, {**HI, "content": ["text"]}], TypeError, r"messages\[1\]\['content'\]\[0\] must be a dict"),
        ([{**HI, "content": [{"type": "text", "text": None}]}], TypeError, r"\[0\]\['text'\] must be a str"),
        ([{**HI, "content": [{"text": "a"}]}], ValueError, r"\[0\] is of type None"),
        ([{**HI, "content": {"text": "a"}}], TypeError, r"messages\[0\]\['content'\] must be a str or a list"),
        ([{**HI, "content": None}], TypeError, r"messages\[0\]\['content'\] must be a str.*NoneType"),
        (
            [{"role": "assistant", "tool_calls": "x"}],
            TypeError,
            r"messages\[0\]\['tool_calls'\] must be a list of dicts",
        ),
        (
            [{"role": "assistant", "tool_calls": [1]}],
            TypeError,
            r"messages\[0\]\['tool_calls'\] must be a list of dicts",
        ),
        ([{**HI, "when": datetime(2026, 1, 1)}], TypeError, r"messages\[0\] must be made of what JSON has.*datetime"),
        ([{"role": "assistant", "tool_calls": []}], ValueError, r"messages\[0\] has no 'content'"),
    ],
)
def test_messages_that_no_template_can_take_are_refused_by_place(messages, error, message):
    with pytest.raises(error, match=message):
        rendered(TEMPLATES["chatml"], messages)


def test_variables_that_json_cannot_say_are_refused_by_name():
    with pytest.raises(TypeError, match="variable 'when' must be made of what JSON has.*datetime"):
        rendered(TEMPLATES["chatml"], [HI], when=datetime(2026, 1, 1))


def test_half_a_surrogate_pair_goes_through():
    assert rendered("{{ messages[0].content }}", [{**HI, "content": "\ud800"}]) == "\ud800"


def test_tools_for_a_template_without_a_place_for_them_are_refused():
    with pytest.raises(ValueError, match="no place for tools"):
        rendered("{# tools #}" + TEMPLATES["chatml"], [HI], tools=TOOLS)


# --- continue_final_message ----------------------------------------------------------------------------------------


TRIMMING = ("llama3", "gemma", "llama2")


@pytest.mark.parametrize("family", TEMPLATES)
@pytest.mark.parametrize("text", ["The answer is", "The answer is ", "Hi", "", "a\n\n"])
def test_a_continued_prompt_ends_with_the_last_messages_text(family, text):
    longer = reference(TEMPLATES[family], [HI, {**HELLO, "content": f"{text}☃"}], add_generation_prompt=False)
    spaces = text[len(text.rstrip()) :] if family in TRIMMING else ""
    messages = [HI, {**HELLO, "content": text}]
    prompt = rendered(TEMPLATES[family], messages, continue_final_message=True, add_generation_prompt=False)
    assert prompt == longer[: longer.rindex("☃")].removesuffix(spaces)
    assert prompt.endswith(text.removesuffix(spaces)) and prompt != text


def test_the_last_part_is_continued():
    messages = [
        HI,
        {"role": "assistant", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
    ]
    assert rendered(TEMPLATES["vision"], messages, True, add_generation_prompt=False).endswith("<assistant>onetwo")
    assert rendered(TEMPLATES["chatml"], messages, True, add_generation_prompt=False).endswith("assistant\none\ntwo")


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        ("{{ messages[0].content }}", [HI, HELLO], "doesn't write the last message"),
        ("{{ messages[1].content | upper }}", [HI, HELLO], "doesn't write the last message"),
        ("{{ messages[1].content.split('l')[-1] }}", [HI, HELLO], "doesn't write the last message"),
        (TEMPLATES["glm"], [HI, call("{}", content=None)], "no content to continue"),
        (TEMPLATES["glm"], [{**HI, "content": []}], "no content to continue"),
    ],
)
def test_a_message_that_cannot_be_continued_is_a_value_error(template, messages, message):
    with pytest.raises(ValueError, match=f"continue_final_message: .*{message}"):
        rendered(template, messages, continue_final_message=True)


# --- variables that do nothing -------------------------------------------------------------------------------------


def test_a_variable_that_the_template_never_reads_is_a_warning_once(caplog):
    template = TEMPLATES["qwen3"] + "{# for this test #}"
    given = {"enable_thinking": False, "enable_thought": True}
    with caplog.at_level(logging.WARNING, "fastdeploy"):
        for _ in range(2):
            render(template, [HI], {**VARIABLES, **given}, optional=list(given))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "'enable_thought'" in caplog.text and "'enable_thinking'" not in caplog.text


@pytest.mark.parametrize(
    "template",
    [
        "{{ x }}",
        "{% macro f() %}{{ x }}{% endmacro %}",
        "{% if x is defined %}{% endif %}",
        "{% set x = x or 1 %}",
        "{% if not x is defined %}{% set x = 1 %}{% endif %}{{ x }}",
        "{% for y in x %}{% endfor %}",
    ],
)
def test_a_variable_that_is_read_anywhere_is_none(caplog, template):
    with caplog.at_level(logging.WARNING, "fastdeploy"):
        render(template, [HI], {"x": []}, optional=["x"])
    assert not caplog.records


# --- which template ------------------------------------------------------------------------------------------------

NAMED = {"default": "default {{ 1 }}", "tool_use": "tools {{ 1 }}", "rag": "rag {{ 1 }}"}


@pytest.mark.parametrize(
    ("own", "given", "has_tools", "chosen"),
    [
        ("own", None, False, "own"),
        ("own", None, True, "own"),
        (NAMED, None, False, NAMED["default"]),
        (NAMED, None, True, NAMED["tool_use"]),
        ({"default": "d"}, None, True, "d"),
        ({"tool_use": "t"}, None, True, "t"),
        (NAMED, "rag", True, NAMED["rag"]),
        (NAMED, "{{ 2 }}", True, "{{ 2 }}"),
        (None, "{{ 2 }}", False, "{{ 2 }}"),
    ],
)
def test_the_template_is_the_one_transformers_would_take(own, given, has_tools, chosen):
    assert choose(own, given, has_tools) == chosen


def test_several_templates_without_a_default_are_listed():
    with pytest.raises(ValueError, match="none of .* is the default: pass chat_template=, one of 'rag', 'tool_use'"):
        choose({"tool_use": "t", "rag": "r"}, None, has_tools=False)


def test_a_path_may_look_like_a_template(tmp_path):
    path = tmp_path / "{{ 2 }}.jinja"
    path.write_text("{{ 1 }}")
    for given in (path, str(path)):
        assert given_source(given) == "{{ 1 }}"


def test_only_what_a_caller_gives_may_be_a_path(tmp_path, monkeypatch):
    path = tmp_path / "t.jinja"
    path.write_text("from the file {{ 1 }}")
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in (path, str(path), "~/t.jinja"):
        assert given_source(given) == "from the file {{ 1 }}"
    assert rendered(choose(str(path), None, False), [HI]) == str(path)
    for missing in (
        "~/none.jinja",
        tmp_path / "none.jinja",
        tmp_path,
        "",
        "~nobody-here/t",
        "a\0b",
        "You help. " * 999,
    ):
        with pytest.raises(FileNotFoundError, match="neither a Jinja template nor an existing file"):
            given_source(missing)


@pytest.mark.parametrize("source", ["{% if %}", "{{", "{{ 1 | nothing }}", "{{ 2 ** 20000 }}", "{{ " + "(" * 9999])
def test_a_broken_template_is_a_value_error(source):
    with pytest.raises(ValueError, match="the chat template is broken: "):
        check(source)


# --- where checkpoints have them -----------------------------------------------------------------------------------

CONFIG = {"chat_template": "in the config"}


def write(directory, **files):
    """A file for each keyword, "__" standing for "/" and "_jinja" for its ending."""
    for name, text in files.items():
        stem, _, ending = name.replace("__", "/").rpartition("_")
        path = directory / f"{stem}.{ending}"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return directory


@pytest.mark.parametrize(
    ("files", "config", "templates"),
    [
        ({}, {}, None),
        ({}, CONFIG, "in the config"),
        ({}, {"chat_template": "/etc/hostname"}, "/etc/hostname"),
        ({}, {"chat_template": [{"name": "default", "template": "d"}]}, "d"),
        ({}, {"chat_template": [{"name": "tool_use", "template": "t"}]}, {"tool_use": "t"}),
        ({"chat_template_json": '{"chat_template": "j"}'}, {}, "j"),
        ({"chat_template_json": '{"chat_template": "j"}'}, CONFIG, "in the config"),
        ({"chat_template_jinja": "f", "chat_template_json": '{"chat_template": "j"}'}, CONFIG, "f"),
        ({"additional_chat_templates__tool_use_jinja": "t"}, CONFIG, {"tool_use": "t"}),
        (
            {"chat_template_jinja": "f", "additional_chat_templates__rag_jinja": "r"},
            CONFIG,
            {"default": "f", "rag": "r"},
        ),
    ],
)
def test_a_directorys_templates_are_found_where_transformers_finds_them(tmp_path, files, config, templates):
    assert templates_of_directory(write(tmp_path, **files), config) == templates


@pytest.mark.parametrize(
    "given", [3, [], ["a"], [{"name": "default"}], [{"name": 1, "template": "a"}], {"default": "a"}]
)
def test_a_config_without_text_for_a_template_is_refused_by_file(tmp_path, given):
    with pytest.raises(ValueError, match=f"{tmp_path}/tokenizer_config.json: chat_template must be a str or a list"):
        templates_of_directory(tmp_path, {"chat_template": given})


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/a.jinja", "chat_template.json"])
def test_a_link_out_of_the_directory_is_not_followed(tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_text('{"chat_template": "secret"}')
    link = tmp_path / "model" / name
    link.parent.mkdir(parents=True)
    link.symlink_to(secret)
    with pytest.raises(ValueError, match=f"{link}: a link out of its folder, to {secret}"):
        templates_of_directory(tmp_path / "model", {})


def test_the_hugging_face_caches_links_are_followed(tmp_path):
    blob = tmp_path / "blobs" / "0123"
    snapshot = tmp_path / "snapshots" / "abcd"
    for directory in (blob.parent, snapshot):
        directory.mkdir(parents=True)
    blob.write_text("from a blob")
    (snapshot / "chat_template.jinja").symlink_to("../../blobs/0123")
    assert templates_of_directory(snapshot, {}) == "from a blob"


def test_a_template_file_that_is_no_text_is_refused_by_name(tmp_path):
    path = tmp_path / "chat_template.jinja"
    path.write_bytes(b"\xff{{ 1 }}")
    with pytest.raises(ValueError, match=f"{path}: a chat template is UTF-8 text"):
        templates_of_directory(tmp_path, {})
    os.truncate(path, 2**40)  # sparse
    with pytest.raises(ValueError, match=f"{path}: no file of at most"):
        templates_of_directory(tmp_path, {})
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(ValueError, match=f"{path}: no file of at most"):
        templates_of_directory(tmp_path, {})


@pytest.mark.parametrize(
    ("metadata", "templates"),
    [
        ({}, None),
        ({"tokenizer.chat_template": "d"}, "d"),
        (
            {
                "tokenizer.chat_template": "d",
                "tokenizer.chat_templates": ["tool_use"],
                "tokenizer.chat_template.tool_use": "t",
            },
            {"default": "d", "tool_use": "t"},
        ),
        ({"tokenizer.chat_template.tool_use": "t"}, {"tool_use": "t"}),
    ],
)
def test_a_ggufs_templates_are_found_by_name(metadata, templates):
    assert templates_of_gguf(metadata, "m.gguf") == templates


def test_templates_that_gguf_has_written_are_found(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_chat_template([{"name": name, "template": template} for name, template in NAMED.items()])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert templates_of_gguf(GGUFFile(tmp_path / "m.gguf").metadata, "m.gguf") == NAMED


def test_a_ggufs_template_that_is_no_text_is_refused_by_file():
    with pytest.raises(ValueError, match="m.gguf.*tokenizer.chat_template.tool_use"):
        templates_of_gguf({"tokenizer.chat_template.tool_use": 3}, "m.gguf")
