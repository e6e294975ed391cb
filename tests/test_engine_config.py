from pathlib import Path

import pytest

from fastdeploy.engine_config import EngineConfig


@pytest.mark.parametrize(
    ("field", "value", "error"),
    [
        ("model", 5, TypeError),
        ("model", "", ValueError),
        ("model", None, TypeError),
        ("tokenizer", ["x"], TypeError),
        ("max_model_len", 1, ValueError),
        ("max_model_len", 100.0, TypeError),
        ("max_num_seqs", 0, ValueError),
        ("max_num_seqs", True, TypeError),
        ("max_num_batched_tokens", -5, ValueError),
        ("block_size", 48, ValueError),
        ("block_size", 8, ValueError),
        ("block_size", 64.0, TypeError),
        ("num_gpu_blocks_override", 0, ValueError),
        ("gpu_memory_utilization", 0, ValueError),
        ("gpu_memory_utilization", 1.5, ValueError),
        ("gpu_memory_utilization", "0.9", TypeError),
        ("dtype", "float64", ValueError),
        ("dtype", 16, TypeError),
        ("kv_cache_dtype", "int4", ValueError),
        ("kv_cache_dtype", 8, TypeError),
        ("quantization", "int4", ValueError),
        ("quantization", 4, TypeError),
        ("seed", -1, ValueError),
        ("enable_prefix_caching", 1, TypeError),
        ("enforce_eager", 1, TypeError),
        ("overlap_steps", 1, TypeError),
        ("reasoning_parser", "qwen4", ValueError),
        ("reasoning_parser", True, TypeError),
        ("chat_template", 5, TypeError),
        ("chat_template", "no-such-file.jinja", FileNotFoundError),
        ("chat_template", "{% if %}", ValueError),
        ("tensor_parallel_size", "1", TypeError),
    ],
)
def test_a_bad_value_is_refused_by_name(field: str, value: object, error: type[Exception]) -> None:
    with pytest.raises(error) as raised:
        EngineConfig(**{"model": "some-model", field: value})
    assert str(raised.value).startswith(f"LLM({field}={value!r}): must be ")


def test_ranks_do_not_overlap_steps() -> None:
    assert EngineConfig("some-model", tensor_parallel_size=2).overlap_steps is None
    with pytest.raises(ValueError, match="overlap_steps=True.* must be False or None where tensor_parallel_size"):
        EngineConfig("some-model", overlap_steps=True, tensor_parallel_size=2)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("max_len", "max_model_len"),
        ("tensor_paralel_size", "tensor_parallel_size"),
        ("tensor_parallel", "tensor_parallel_size"),
        ("max_seq_len", "max_model_len"),
        ("max_length", "max_model_len"),
        ("n_ctx", "max_model_len"),
        ("gpu_memory", "gpu_memory_utilization"),
        ("model_path", "model"),
        ("torch_dtype", "dtype"),
    ],
)
def test_an_unknown_keyword_is_a_type_error_that_suggests_a_name(name: str, nearest: str) -> None:
    with pytest.raises(TypeError, match=f"LLM has no keyword '{name}': did you mean '{nearest}'"):
        EngineConfig("some-model", **{name: 1})


@pytest.mark.parametrize("name", ["pipeline_parallel_size", "expert_parallel_size", "kv_cache_size", "max_tokens"])
def test_a_name_for_something_else_is_met_with_a_list(name: str) -> None:
    with pytest.raises(TypeError, match=f"LLM has no keyword '{name}': it takes model, tokenizer, .*max_model_len"):
        EngineConfig("some-model", **{name: 1})


def test_the_known_reasoning_parsers_are_listed() -> None:
    with pytest.raises(ValueError, match="must be one of") as raised:
        EngineConfig("some-model", reasoning_parser="other")
    assert all(repr(name) in str(raised.value) for name in ("qwen3", "ernie-x1", "deepseek_r1"))


def test_a_chat_template_may_be_source_or_a_file(tmp_path: Path) -> None:
    path = tmp_path / "template.jinja"
    path.write_text("{{ messages[0].content }}")
    for template in (path, str(path), "{{ messages[0].content }}"):
        assert EngineConfig("some-model", chat_template=template).chat_template == str(template)


def test_paths_are_taken_and_the_home_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    assert EngineConfig(Path("some") / "model").model == str(Path("some") / "model")
    for kind in (str, Path):
        config = EngineConfig(kind("~/model"), tokenizer=kind("~/tokenizer"), chat_template=kind("~/t.jinja"))
        expected = [str(tmp_path / name) for name in ("model", "tokenizer", "t.jinja")]
        assert [config.model, config.tokenizer, config.chat_template] == expected
    assert EngineConfig("m", chat_template="~/{{ messages }}").chat_template == "~/{{ messages }}"


def test_a_templates_path_holds_wherever_the_program_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t.jinja").write_text("{{ messages }}")
    monkeypatch.chdir(tmp_path)
    assert EngineConfig("m", chat_template="t.jinja").chat_template == str(tmp_path / "t.jinja")


def test_resolved_lengths_are_numbers_within_the_models_limit() -> None:
    config = EngineConfig("some-model")
    assert (config.max_model_len, config.max_num_batched_tokens) == (None, None)
    assert config.resolved(model_limit=2048).max_model_len == 2048
    assert config.resolved(model_limit=131072).max_model_len == 131072
    assert config.resolved(model_limit=2048).max_num_batched_tokens == 2048
    assert EngineConfig("some-model", max_model_len=100).resolved(2048).max_model_len == 100
    assert EngineConfig("some-model", max_num_batched_tokens=7).resolved(2048).max_num_batched_tokens == 7


def test_a_length_above_the_models_limit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_model_len=4096\): must be at most 2048"):
        EngineConfig("some-model", max_model_len=4096).resolved(model_limit=2048)


@pytest.mark.parametrize(
    ("keywords", "quantization"),
    [
        ({}, "auto"),
        ({"dtype": "float32"}, None),
        ({"dtype": "bfloat16"}, "auto"),  # as "half" beside an AWQ checkpoint in old scripts: its weights stay small
        ({"quantization": "awq_marlin"}, "auto"),
        ({"dtype": "float32", "quantization": "w8a8"}, "w8a8"),
        ({"quantization": None}, None),
    ],
)
def test_float32_asks_for_floats_where_no_quantization_is_named(keywords: dict, quantization: object) -> None:
    assert EngineConfig("some-model", **keywords).resolved(2048).quantization == quantization
