"""LLM.save_quantised: a directory's model, quantised while loading, becomes a file that says the same."""

import json
import logging
from itertools import chain

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from fastdeploy import LLM, SamplingParams
from fastdeploy.models import calibration
from tests.models.test_families import open_llm
from tests.references.families import CASES, write_checkpoint

SIZES = {"hidden_size": 96, "head_dim": 32, "intermediate_size": 64, "vocab_size": 300}  # whole groups of 32
REFUSED = [name for name, config in CASES.items() if config.get("norm_topk_prob") is False or "truncate" in str(config)]
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
PROMPTS = ["Hello", "a b c", "12 Äpfel, 你好"]


def byte_tokenizer(directory, with_form=True):
    """A tokenizer.json with a token for every byte, and ids to spare."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate([*alphabet, "el"])}, [("e", "l")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=with_form)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))


def opened(source, quantization, **keywords):
    return LLM(source, quantization=quantization, max_model_len=64, block_size=16, max_num_seqs=4, **keywords)


def said(llm):
    greedy = SamplingParams(temperature=0, max_tokens=12, logprobs=1, ignore_eos=True)
    outputs = llm.generate(PROMPTS, greedy, use_tqdm=False)
    chosen = [[next(iter(step.values())).logprob for step in output.outputs.logprobs] for output in outputs]
    return [(output.prompt_token_ids, output.outputs.token_ids) for output in outputs], chosen


def written(directory, name):
    write_checkpoint(directory, CASES[name] | SIZES)
    byte_tokenizer(directory)
    return directory


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
def test_every_family_says_the_same_from_the_file(name, tmp_path):
    with opened(written(tmp_path, name), "wint4") as llm:
        expected, logprobs = said(llm)
        llm.save_quantised(tmp_path / "saved.gguf")
        template = llm.tokenizer.chat_template
    with opened(tmp_path / "saved.gguf", "exact") as llm:
        found, found_logprobs = said(llm)
        assert llm.tokenizer.chat_template == template
    assert found == expected
    for step, expected_step in zip(chain(*found_logprobs), chain(*logprobs)):
        # GGUF keeps what Llama 3's scaling divides by in float32.
        assert step == pytest.approx(expected_step, abs=1e-5 if "llama3" in str(CASES[name]) else 0)


@pytest.mark.parametrize("name", REFUSED)
def test_what_gguf_cannot_say_is_refused_and_nothing_written(name, tmp_path):
    with opened(written(tmp_path, name), "wint4") as llm, pytest.raises(ValueError, match="GGUF can't say"):
        llm.save_quantised(tmp_path / "saved.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_integers_are_the_same_integers(tmp_path):
    with opened(written(tmp_path, "qwen3"), "w4a8") as llm:
        expected = said(llm)
        llm.save_quantised(str(tmp_path / "saved.gguf"))
    with opened(tmp_path / "saved.gguf", "auto") as llm:
        assert said(llm) == expected


def test_a_tokenizer_that_gguf_has_no_form_for_is_left_out_with_a_warning(tmp_path, caplog):
    write_checkpoint(tmp_path, CASES["llama"] | SIZES)
    byte_tokenizer(tmp_path, with_form=False)
    with opened(tmp_path, "wint4") as llm:
        expected = said(llm)
        with caplog.at_level(logging.WARNING, "fastdeploy"):
            llm.save_quantised(tmp_path / "saved.gguf")
    assert "no form for its tokenizer" in caplog.text
    with opened(tmp_path / "saved.gguf", "exact", tokenizer=str(tmp_path)) as llm:
        assert said(llm) == expected


def test_a_name_that_is_no_gguf_files_is_refused(tmp_path):
    with opened(written(tmp_path, "llama"), "wint4") as llm:
        with pytest.raises(ValueError, match=r"must end in .gguf, found '.*saved.bin'"):
            llm.save_quantised(tmp_path / "saved.bin")
        with pytest.raises(FileNotFoundError):
            llm.save_quantised(tmp_path / "no folder" / "saved.gguf")
    with pytest.raises(RuntimeError, match="closed"):
        llm.save_quantised(tmp_path / "saved.gguf")


def test_weights_that_are_made_up_are_not_calibrated(tmp_path, monkeypatch):
    def unwanted(*_):
        raise AssertionError("calibrated")

    monkeypatch.setattr(calibration, "importance", unwanted)
    with opened(written(tmp_path, "llama"), "wint4", load_format="dummy") as llm:
        expected = said(llm)
        llm.save_quantised(tmp_path / "saved.gguf")
    with opened(tmp_path / "saved.gguf", "exact") as llm:
        assert said(llm) == expected


def test_a_rank_of_several_is_refused(tmp_path):
    ranks = open_llm(tmp_path, CASES["llama"], tensor_parallel_size=2)
    with ranks as llm, pytest.raises(ValueError, match="each rank has a part"):
        llm.save_quantised(tmp_path / "saved.gguf")


def test_ranks_calibrate_their_own_parts(tmp_path):
    """Sums in another order change the statistics' last bits: outputs are close, but not the same."""
    config = CASES["qwen3"] | SIZES | {"intermediate_size": 128, "num_key_value_heads": 2, "num_attention_heads": 4}
    write_checkpoint(tmp_path, config)
    byte_tokenizer(tmp_path)
    found = []
    for ranks in (1, 2):
        with opened(tmp_path, "wint4", dtype="float32", tensor_parallel_size=ranks) as llm:
            llm.generate(PROMPTS[2], SamplingParams(max_tokens=1), use_tqdm=False)
            found.append(llm.engine.runner.last_logits()[-1])
    assert abs(found[0] - found[1]).max() < 0.05 * found[0].std()
