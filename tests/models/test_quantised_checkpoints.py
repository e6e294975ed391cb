"""Quantised checkpoints of Hugging Face, made by hand, against the values that their layouts stand for."""

import json
import logging
from dataclasses import replace

import numpy as np
import pytest

from fastdeploy.device import open_device
from fastdeploy.models import load_model
from fastdeploy.models.weights import open_checkpoint
from tests.models import reference
from tests.models.quantised_layouts import AWQ, BLOCKS, CASES, FP8, GPTQ, compressed, gptq, mxfp4_tensors, packed, save
from tests.models.test_decoder import Steps
from tests.models.test_paddle import config_json
from tests.models.test_sharding import divided_logits
from tests.models.tiny import GROUPED, random_tensors
from tests.references.families import CASES as FAMILIES
from tests.references.families import tensors
from tests.test_weights import resident_file_bytes

CONFIG = replace(
    GROUPED, hidden_size=128, intermediate_size=256, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=32
)
IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 89, 79]
Q_PROJ = "model.layers.0.self_attn.q_proj"


def write(directory, said, layout, config=CONFIG, dtype="float32", change=lambda tensors: None):
    """A checkpoint whose linear layers are quantised; the values that its tensors stand for, in float64."""
    generator, values, entries = np.random.default_rng(7), random_tensors(config), {}
    for name, array in list(values.items()):
        if "_proj.weight" not in name:
            entries[name] = ("F32", array)
            continue
        parts, values[name] = layout(generator, *array.shape)
        module = name.removesuffix(".weight")
        entries |= {module + (end if end[0] == "_" else f".{end}"): tensor for end, tensor in parts.items()}
    change(entries)
    directory.mkdir(exist_ok=True)
    save(directory / "model.safetensors", entries)
    content = config_json(config) | {"quantization_config": said, "torch_dtype": dtype, "rms_norm_eps": 1e-5}
    (directory / "config.json").write_text(json.dumps(content))
    return values


def logits(directory, quantization, dtype="auto"):
    model = load_model(open_checkpoint(directory), open_device(), dtype, 64, quantization, progress=False)
    return Steps(model, "float32").run((0, 0, IDS))  # it is the weights that matter here


def distance(found, expected):
    return np.abs(found - expected).max() / np.abs(expected).max()


@pytest.mark.parametrize("case", CASES)
def test_the_values_are_those_of_the_layout(case, tmp_path):
    values = write(tmp_path, *CASES[case])
    checkpoint = open_checkpoint(tmp_path)
    assert set(checkpoint.names()) == set(values)
    for name, expected in values.items():
        found = checkpoint.read(name).array
        np.testing.assert_array_equal(found, expected.astype(np.float32), err_msg=name)
        np.testing.assert_array_equal(checkpoint.read_rows(name, 3, 13).array, found[3:13])


@pytest.mark.parametrize("case", CASES)
def test_the_logits_are_those_of_the_values(case, tmp_path):
    expected = reference.logits(CONFIG, write(tmp_path, *CASES[case]), "float32", IDS)
    for quantization, tolerance in {None: 3e-5, "exact": 3e-5, "auto": 2e-2}.items():
        assert distance(logits(tmp_path, quantization), expected) < tolerance, quantization


def log_of_loading(directory, caplog, quantization="auto"):
    with caplog.at_level(logging.INFO, "fastdeploy"):
        logits(directory, quantization)
    return caplog.text


def shuffled(tensors):
    """Another order for each module that has one: q, k and v read the same, but in three orders."""
    generator = np.random.default_rng(5)
    for name, (dtype, array) in list(tensors.items()):
        if name.endswith("g_idx"):
            tensors[name] = (dtype, generator.permutation(array))


def without_most_orders(tensors):
    for name in [name for name in tensors if name.endswith("g_idx") and ".k_proj" not in name and ".up" not in name]:
        del tensors[name]


@pytest.mark.parametrize("change", [shuffled, without_most_orders])
@pytest.mark.parametrize("quantization", ["exact", "auto"])
def test_weights_that_read_the_same_may_have_orders_of_their_own(change, quantization, tmp_path):
    write(tmp_path, GPTQ, gptq(act_order=True), change=change)
    values = {name: open_checkpoint(tmp_path).read(name).array for name in random_tensors(CONFIG)}
    expected = reference.logits(CONFIG, values, "float32", IDS)
    assert distance(logits(tmp_path, quantization), expected) < {"exact": 3e-5, "auto": 2e-2}[quantization]


def test_a_row_in_an_order_has_the_same_bits_alone(tmp_path):
    write(tmp_path, *CASES["gptq, act order"])
    together = logits(tmp_path, "auto")
    model = load_model(open_checkpoint(tmp_path), open_device(), "auto", 64, "auto", progress=False)
    steps = Steps(model, "float32")
    alone = np.concatenate([steps.run((0, index, [token])) for index, token in enumerate(IDS)])
    np.testing.assert_array_equal(alone, together)


@pytest.mark.parametrize("case", [case for case in CASES if "2 bits" not in case and "3 bits" not in case])
def test_weights_take_no_more_than_a_tenth_more_than_in_the_file(case, tmp_path):
    write(tmp_path, *CASES[case])
    checkpoint = open_checkpoint(tmp_path)
    for name in checkpoint.names():
        if "_proj.weight" in name:
            stored = checkpoint.encoded(name).format.bits_per_weight / 8 * np.prod(checkpoint.shape(name))
            assert stored <= 1.10 * checkpoint._tensor(name).nbytes


def test_the_log_says_what_became_what(tmp_path, caplog):
    write(tmp_path, *CASES["gptq, 3 bits"])
    text = log_of_loading(tmp_path, caplog)
    assert "GPTQ 3 bits kept as int4 with zeros, float16 scales of 64 weights, 7 tensors (q_proj, k_proj" in text


@pytest.mark.parametrize(("said", "expected"), [("float16", "float16"), ("bfloat16", "bfloat16"), (None, "bfloat16")])
def test_the_dtype_is_what_the_configuration_says(said, expected, tmp_path):
    write(tmp_path, *CASES["awq"], dtype=said, change=lambda tensors: tensors.pop("model.embed_tokens.weight"))
    assert open_checkpoint(tmp_path).config.dtype == expected


def test_rows_of_no_multiple_of_32_are_floats_and_a_warning_says_so(tmp_path, caplog):
    config = replace(CONFIG, hidden_size=144)
    values = write(tmp_path, {**GPTQ, "group_size": -1}, gptq(size=-1), config)
    expected = reference.logits(config, values, "float32", IDS)
    assert distance(logits(tmp_path, "exact"), expected) < 3e-5
    assert "5 tensors are kept in floats" in caplog.text


@pytest.mark.parametrize("case", ["gptq", "awq", "packed int4, zeros", "fp8, blocks", "gptq, act order"])
def test_ranks_have_the_values_of_one(case, tmp_path, caplog):
    """Ranks that share the features which an order is of have them in floats."""
    expected = reference.logits(CONFIG, write(tmp_path, *CASES[case]), "float32", IDS)
    for found in divided_logits(open_checkpoint(tmp_path), 2, IDS, "exact"):
        assert distance(found, expected) < 3e-5
    assert ("o_proj.weight: has its weights in an order" in caplog.text) == ("order" in case)


def test_experts_in_orders_of_their_own_are_floats_and_one_warning_a_matrix_says_so(tmp_path, caplog):
    config = FAMILIES["qwen3 moe"] | {"hidden_size": 128, "head_dim": 32, "moe_intermediate_size": 64}
    generator, entries = np.random.default_rng(7), {}
    for name, array in tensors(config).items():
        if ".experts." not in name:
            entries[name] = ("F32", array)
            continue
        parts, _ = gptq(act_order=True)(generator, *array.shape)
        entries |= {f"{name.removesuffix('.weight')}.{end}": tensor for end, tensor in parts.items()}
    save(tmp_path / "model.safetensors", entries)
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": GPTQ, "dtype": "float32"}))
    np.testing.assert_array_equal(logits(tmp_path, "exact"), logits(tmp_path, None))
    warnings = [record.getMessage() for record in caplog.records if "order" in record.getMessage()]
    assert len(warnings) == 3 * config["num_hidden_layers"]
    first = "model.layers.0.mlp.experts.0.gate_proj.weight (and 5 others): has its weights in an order"
    assert warnings[0].startswith(first)


def test_reading_keeps_one_slice_of_the_integers_in_memory(tmp_path):
    said, _ = CASES["fp8, blocks"]
    rows, columns, scales = 8192, 4096, np.ones((64, 32), np.float32)  # 32 MiB
    weight = {"x.weight": ("F8_E4M3", np.full((rows, columns), 56, np.uint8)), "x.weight_scale_inv": ("F32", scales)}
    save(tmp_path / "model.safetensors", weight)
    (tmp_path / "config.json").write_text(json.dumps({**config_json(CONFIG), "quantization_config": said}))
    checkpoint, before = open_checkpoint(tmp_path), resident_file_bytes()
    for start in range(0, rows, 256):
        assert (checkpoint.read_codes("x.weight", start, start + 256).blocks == 56).all()
    assert resident_file_bytes() - before < 4 << 20


def test_modules_that_are_not_quantised_stay_floats(tmp_path):
    """Those that "ignore" names: the tensors say it already."""

    def layout(generator, rows, width):
        if rows == CONFIG.intermediate_size:
            array = generator.normal(size=(rows, width)).astype(np.float32)
            return {"weight": ("F32", array)}, array
        return CASES["float8 of channels"][1](generator, rows, width)

    values = write(tmp_path, CASES["float8 of channels"][0], layout)
    assert open_checkpoint(tmp_path).storage("model.layers.0.mlp.up_proj.weight") == "float32"
    assert distance(logits(tmp_path, "exact"), reference.logits(CONFIG, values, "float32", IDS)) < 3e-5


def test_modules_have_the_group_of_the_configuration_that_fits_them(tmp_path):
    int4 = compressed("mixed-precision", num_bits=4, strategy="group", group_size=32)
    int8 = compressed("mixed-precision", num_bits=8, strategy="channel")["config_groups"]["group_0"]
    said = {**int4, "config_groups": {**int4["config_groups"], "group_1": {**int8, "targets": ["re:.*(gate|up)_proj"]}}}

    def layout(generator, rows, width):
        return (packed(8, None) if rows == CONFIG.intermediate_size else packed(4, 32))(generator, rows, width)

    expected = reference.logits(CONFIG, write(tmp_path, said, layout), "float32", IDS)
    assert distance(logits(tmp_path, "exact"), expected) < 3e-5


def test_what_only_activations_need_is_left_out(tmp_path):
    def change(tensors):
        for name in (
            "self_attn.q_proj.input_scale",
            "self_attn.k_scale",
            "self_attn.v_scale",
            "mlp.up_proj.input_scale",
        ):
            tensors[f"model.layers.0.{name}"] = ("F32", np.ones(1))

    write(tmp_path, *CASES["float8 of a matrix"], change=change)
    assert np.isfinite(logits(tmp_path, "auto")).all()


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_biases_that_the_model_lacks_may_be_there_if_they_are_zeros(value, tmp_path):
    bias = ("F16", np.full(128, value))
    write(tmp_path, *CASES["gptq"], change=lambda tensors: tensors.update({f"{Q_PROJ}.bias": bias}))
    if value:
        with pytest.raises(ValueError, match="1 unexpected: .*q_proj.bias"):
            logits(tmp_path, "auto")
    else:
        assert np.isfinite(logits(tmp_path, "auto")).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_zero_points_that_are_all_zeros_need_not_be_asked_for(symmetric, tmp_path):
    def layout(generator, rows, width):
        tensors, values = CASES["int8"][1](generator, rows, width)
        return tensors | {"weight_zero_point": ("I8", np.zeros((rows, 1)))}, values

    said = compressed("int-quantized", num_bits=8, strategy="channel", symmetric=symmetric)
    expected = reference.logits(CONFIG, write(tmp_path, said, layout), "float32", IDS)
    assert distance(logits(tmp_path, "exact"), expected) < 3e-5


@pytest.mark.parametrize(
    ("file", "content", "case"),
    [
        ("quantize_config.json", {"bits": 4, "group_size": 32, "desc_act": False}, "gptq"),
        ("quant_config.json", {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}, "awq"),
        ("hf_quant_config.json", {"producer": {}, "quantization": {"quant_algo": "FP8"}}, "modelopt"),
    ],
)
def test_files_beside_the_configuration_say_it_too(file, content, case, tmp_path):
    values = write(tmp_path, {}, CASES[case][1])
    (tmp_path / file).write_text(json.dumps(content))
    assert distance(logits(tmp_path, "exact"), reference.logits(CONFIG, values, "float32", IDS)) < 3e-5


def test_experts_of_one_tensor_become_matrices_of_their_own(tmp_path):
    blocks, exponents, values = mxfp4_tensors(np.random.default_rng(0), 3, 20, 64)
    experts = "model.layers.0.mlp.experts"

    def change(tensors):
        tensors[f"{experts}.gate_up_proj_blocks"] = ("U8", blocks)
        tensors[f"{experts}.gate_up_proj_scales"] = ("U8", exponents)

    write(tmp_path, *CASES["mxfp4"], change=change)
    checkpoint = open_checkpoint(tmp_path)
    for index, expected in enumerate(values):
        name = f"{experts}.{index}.gate_up_proj.weight"
        np.testing.assert_array_equal(checkpoint.read(name).array, expected)
        np.testing.assert_array_equal(checkpoint.read_rows(name, 5, 17).array, expected[5:17])
        assert checkpoint.read_codes(name, 2, 9).blocks.shape == (7, 32)


# Bad input


def drop(part):
    return lambda tensors: tensors.pop(f"{Q_PROJ}.{part}")


def put(part, value, dtype=None):
    """The tensor of q_proj replaced by what `value` makes of it, perhaps of another dtype."""

    def change(tensors):
        old_dtype, array = tensors.get(f"{Q_PROJ}.{part}", (None, None))
        tensors[f"{Q_PROJ}.{part}"] = (dtype or old_dtype, np.asarray(value(array)))

    return change


def at(index, value):
    def changed(array):
        array = np.array(array, order="C")
        array.reshape(-1)[index] = value
        return array

    return changed


INT4 = CASES["packed int4, zeros"][0]
GROUPS_OF_32 = {"num_bits": 4, "strategy": "group", "group_size": 32}
MXFP4 = {"quant_method": "mxfp4"}
BAD = {
    "no scales": (GPTQ, "gptq", drop("scales"), "q_proj.scales' is missing beside .qweight"),
    "no zeros": (GPTQ, "gptq", drop("qzeros"), "q_proj.qzeros' is missing"),
    "no weights": (GPTQ, "gptq", drop("qweight"), "q_proj.qweight' is missing"),
    "other bits": ({**GPTQ, "bits": 8}, "gptq", None, r"has the shape \[4, 128\], expected \[2, 128\]"),
    "unknown bits": ({**GPTQ, "bits": 5}, "gptq", None, "config.json.*'bits' is 5; 2, 3, 4, 8 can be read"),
    "no number of bits": ({**GPTQ, "bits": "4"}, "gptq", None, "config.json.*'bits' is '4'"),
    "no bits": ({"quant_method": "gptq"}, "gptq", None, "config.json.*'bits' is missing"),
    "groups of 0": ({**GPTQ, "group_size": 0}, "gptq", None, "'group_size' is 0; must be"),
    "other groups": (
        {**GPTQ, "group_size": 64},
        "gptq",
        None,
        r"scales' has the shape \[4, 128\], expected \[2, 128\]",
    ),
    "turned weights": (GPTQ, "gptq", put("qweight", np.transpose), "q_proj.* has the shape"),
    "flat weights": (GPTQ, "gptq", put("qweight", np.ravel), r"qweight' has the shape \[2048\]"),
    "float weights": (GPTQ, "gptq", put("qweight", np.float32, "F32"), "qweight' is stored as float32, expected int32"),
    "integer scales": (GPTQ, "gptq", put("scales", np.uint32, "I32"), "scales' is stored as int32"),
    "no order": ({**GPTQ, "desc_act": True}, "gptq", drop("g_idx"), "q_proj.g_idx' is missing"),
    "a group too many": (GPTQ, "gptq", put("g_idx", at(5, 4)), "g_idx' names the groups 0 to 4; there are 4"),
    "a group below 0": (GPTQ, "gptq", put("g_idx", at(5, -1)), "g_idx' names the groups -1 to 3; there are 4"),
    "a short order": (GPTQ, "gptq", put("g_idx", lambda array: array[:9]), r"g_idx' has the shape \[9\]"),
    "two weights": (GPTQ, "gptq", put("weight", lambda _: np.zeros((128, 128)), "F32"), "as it is and quantised"),
    "cut groups": ({**AWQ, "group_size": 96}, "awq", None, "qweight' has 128 rows, which are no groups of 96"),
    "AWQ of 8 bits": ({**AWQ, "bits": 8}, "awq", None, "'bits' is 8; 4 can be read"),
    "GPTQ as MXFP4": (MXFP4, "gptq", None, "quantised, by mxfp4; no tensor is"),
    "no quantisation": ({}, "gptq", None, "21 tensors are no floats: .*q_proj.qweight .int32"),
    "other blocks": (
        {**BLOCKS, "weight_block_size": [64, 64]},
        "fp8, blocks",
        None,
        r"scale_inv' has the shape \[1, 1\]; of a matrix \[128, 128\] expected \[2, 2\]",
    ),
    "one block size": (
        {**BLOCKS, "weight_block_size": [128]},
        "fp8, blocks",
        None,
        "block_size' is .128.; must be two",
    ),
    "blocks of 0": ({**BLOCKS, "weight_block_size": [0, 128]}, "fp8, blocks", None, "weight_block_size' is .0, 128"),
    "blocks that nobody names": (FP8, "fp8, blocks", None, r"_proj.weight_scale_inv' has the shape \[2, 1\]"),
    "no scale": (FP8, "fp8, a number", drop("weight_scale"), "q_proj.weight_scale_inv' is missing beside .weight"),
    "e5m2": (FP8, "fp8, a number", put("weight", np.uint8, "F8_E5M2"), "weight' is stored as float8_e5m2"),
    "no shape": (INT4, "packed int4, zeros", drop("weight_shape"), "q_proj.weight_shape' is missing"),
    "other shape": (
        INT4,
        "packed int4, zeros",
        put("weight_shape", lambda _: np.array([128, 256])),
        r"weight_packed' has the shape \[128, 16\]; weight_shape is \[128, 256\]",
    ),
    "empty shape": (
        INT4,
        "packed int4, zeros",
        lambda tensors: (
            put("weight_shape", lambda _: np.array([128, 0]))(tensors),
            put("weight_packed", lambda array: array[:, :0])(tensors),
        ),
        r"weight_packed' has the shape \[128, 0\]",
    ),
    "float8 as float4": (
        compressed("float-quantized", num_bits=4, type="float", strategy="channel"),
        "float8 of channels",
        None,
        "weight' holds float weights, 'config_groups' say float4",
    ),
    "negative shape": (INT4, "packed int4, zeros", put("weight_shape", lambda _: np.array([128, -1])), "_packed' has"),
    "zeros missing": (
        INT4,
        "packed int4, zeros",
        drop("weight_zero_point"),
        "holds int weights, .* say int4 with zeros",
    ),
    "zeros too many": (
        compressed("pack-quantized", **GROUPS_OF_32),
        "packed int4, zeros",
        None,
        "holds int weights with zeros, 'config_groups' say int4",
    ),
    "int4 as int8": (
        compressed("pack-quantized", num_bits=8, strategy="channel"),
        "packed int4",
        None,
        r"weight_packed' has the shape \[128, 16\].* say 8 bits",
    ),
    "float8 as int8": (
        compressed("int-quantized", num_bits=8, strategy="channel"),
        "float8 of channels",
        None,
        "weight' holds float weights, 'config_groups' say int8",
    ),
    "no groups": ({**INT4, "config_groups": {}}, "packed int4, zeros", None, "'config_groups' is {}; expected"),
    "strange groups": (
        {**INT4, "config_groups": {"g": 4}},
        "packed int4, zeros",
        None,
        "'config_groups' is .*; expected",
    ),
    "strategy": (compressed("pack-quantized", num_bits=4, strategy="row"), "packed int4", None, "'strategy' is 'row'"),
    "5 bits": (compressed("pack-quantized", num_bits=5, strategy="channel"), "packed int4", None, "'num_bits' is 5"),
    "a second scale": (
        CASES["packed int8, channels"][0],
        "packed int8, channels",
        put("weight_global_scale", lambda _: np.ones(1), "F32"),
        "weight_global_scale' is not expected beside",
    ),
    "exponents of other shape": (
        MXFP4,
        "mxfp4",
        lambda tensors: tensors.update({f"{Q_PROJ}_scales": ("U8", np.zeros((128, 3)))}),
        r"q_proj_blocks' has the shape \[128, 4, 16\], and its scales \[128, 3\]",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_tensors_that_contradict_the_configuration_are_refused(name, tmp_path):
    said, case, change, message = BAD[name]
    write(tmp_path, said, CASES[case][1], change=change or (lambda tensors: None))
    with pytest.raises(ValueError, match=message) as caught:
        logits(tmp_path, "auto")
    assert str(caught.value).startswith((f"{tmp_path}/model.safetensors: ", f"{tmp_path}/config.json: "))


@pytest.mark.parametrize("quantization", [None, "auto"])
@pytest.mark.parametrize(
    ("case", "change", "message"),
    [
        ("gptq", put("scales", at(77, np.nan)), "q_proj.scales' has scales"),
        ("awq", put("scales", at(0, np.inf)), "q_proj.scales' has scales"),
        ("packed int4", put("weight_scale", at(3, -np.inf)), "q_proj.weight_scale' has scales"),
        ("fp8, a number", put("weight_scale", lambda _: np.nan), "q_proj.weight_scale' has scales"),
        ("fp8, blocks", put("weight", at(5000, 0x7F)), "q_proj.weight' has weights"),
        ("fp8, blocks", put("weight", at(5000, 0xFF)), "q_proj.weight' has weights"),
        ("packed MXFP4", put("weight_scale", at(9, 255)), "q_proj.weight_scale' has scales"),
        ("packed MXFP4", put("weight_scale", at(9, 253)), "q_proj.weight_scale' has scales"),  # 6 * 2^126
        ("fp8, blocks", put("weight_scale_inv", at(0, 3e38)), "q_proj.weight_scale_inv' has scales"),
        ("fp8, blocks, bfloat16", put("weight_scale_inv", at(0, -1e37)), "q_proj.weight_scale_inv' has scales"),
    ],
)
def test_numbers_that_are_none_are_refused_while_loading(quantization, case, change, message, tmp_path):
    write(tmp_path, *CASES[case], change=change)
    with pytest.raises(
        ValueError,
        match=f"{tmp_path}/model.safetensors: tensor '.*{message} that are NaN.*download or convert it again",
    ):
        logits(tmp_path, quantization)
