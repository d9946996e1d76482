"""Folders of DeepSeek-class models as they were released: imported tensor by tensor, exported again
as they came, or refused by name.
"""

import json
import os

import pytest
import torch
from support.hf_folder import config_of, tensors_of, with_copies, write_folder

from megatron_tst.checkpoint.boundary import renaming
from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.errors import TSTError
from megatron_tst.export.hf import export
from megatron_tst.export.import_hf import import_

pytestmark = pytest.mark.filterwarnings("ignore:megatron_tst")
FP8 = dict(quant_method="fp8", fmt="e4m3", weight_block_size=[16, 16])
SPECS = "local", "transformer_engine"
MTP = dict(num_nextn_predict_layers=2)


def deepseek(**changes):
    return config_of("deepseek_v3", dtype="bfloat16", **changes)


def folder_of(path, config, change=lambda tensors: None, files=0):
    tensors = with_copies(config, tensors_of(config))
    change(tensors)
    return write_folder(path, config, tensors, files), tensors


def content(folder):
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("spec", ["transformer_engine", "local"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(q_lora_rank=None, n_group=1, topk_group=1, tie_word_embeddings=True),
        dict(**MTP),
        dict(tie_word_embeddings=True, num_nextn_predict_layers=1, first_k_dense_replace=0),
        dict(n_shared_experts=1, num_hidden_layers=4, first_k_dense_replace=3),
    ],
)
def test_it_comes_back_byte_for_byte(tmp_path, changes, spec):
    folder, _ = folder_of(tmp_path / "m", deepseek(**changes))
    import_(folder, tmp_path / "ck", layer_spec=spec)
    gone = export(Checkpoint(tmp_path / "ck"), tmp_path / "hf")
    for name in ("model.safetensors", "config.json"):
        assert (gone / name).read_bytes() == (folder / name).read_bytes(), name


def test_code_that_a_released_folder_names_is_said_to_be_missing(tmp_path):
    """config.json comes back as it was, and its code does not."""
    config = deepseek(auto_map={"AutoConfig": "configuration_deepseek.DeepseekV3Config"})
    folder, _ = folder_of(tmp_path / "m", config)
    import_(folder, tmp_path / "ck")
    with pytest.warns(UserWarning, match="auto_map of config.json names code .* not copied"):
        gone = export(Checkpoint(tmp_path / "ck"), tmp_path / "hf")
    assert (gone / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_several_files_and_no_copies_are_the_same_model(tmp_path):
    """Where embedding and head are not stored once more, an export has them all the same."""

    def without(tensors):
        for name in list(tensors):
            if name.endswith(("layers.2.embed_tokens.weight", "shared_head.head.weight")):
                del tensors[name]

    folder, _ = folder_of(tmp_path / "m", deepseek(**MTP), without, files=3)
    import_(folder, tmp_path / "ck")
    got = content(export(Checkpoint(tmp_path / "ck"), tmp_path / "hf"))
    want = with_copies(deepseek(**MTP), tensors_of(deepseek(**MTP)))
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in got)


def test_layers_that_are_named_and_not_there(tmp_path):
    """transformers' class says one layer of multi-token prediction where config.json says none; a
    run without them exports none.
    """
    for i, said in enumerate((..., 1)):
        config = deepseek(num_nextn_predict_layers=0)
        tensors = tensors_of(config)
        config["num_nextn_predict_layers"] = said
        config = {key: value for key, value in config.items() if value is not ...}
        folder = write_folder(tmp_path / f"m{i}", config, tensors)
        flags = import_(folder, tmp_path / f"ck{i}")
        assert not [flag for flag in flags if "mtp" in flag]
        gone = export(Checkpoint(tmp_path / f"ck{i}"), tmp_path / f"hf{i}")
        assert content(gone).keys() == tensors.keys()
        assert json.loads((gone / "config.json").read_text())["num_nextn_predict_layers"] == 0


def test_a_run_without_the_imports_last_layers_exports_none(tmp_path):
    """The run was started without --mtp-num-layers; its checkpoint has no such layers."""
    import argparse

    from megatron_tst.checkpoint.rewrite import Changes, rewrite

    folder, tensors = folder_of(tmp_path / "m", deepseek(**MTP))
    import_(folder, tmp_path / "ck")
    source = Checkpoint(tmp_path / "ck")
    args = argparse.Namespace(**vars(source.args) | dict(mtp_num_layers=None))
    changes = Changes(
        common=source.common | {"args": args}, keep=lambda name: not name.startswith("mtp.")
    )
    rewrite(source, tmp_path / "run", changes)
    got = content(export(Checkpoint(tmp_path / "run"), tmp_path / "hf"))
    assert got.keys() == {name for name in tensors if ".layers.2." not in name} - {
        name for name in tensors if ".layers.3." in name
    }


def test_float8_with_scales_becomes_bf16(tmp_path):
    """As DeepSeek-V3 was released: each block of a weight has a scale, and the router's bias and
    the norms are as they are. The product is rounded once.
    """
    config, scaled = deepseek(), {}

    def quantise(tensors):
        draw = torch.Generator().manual_seed(1)
        for name in list(tensors):
            if "proj" in name:
                weight = tensors[name].to(torch.float8_e4m3fn)
                rows, columns = (-(-n // 16) for n in weight.shape)
                scale = torch.rand(rows, columns, generator=draw) + 0.5
                tensors[name], tensors[f"{name}_scale_inv"] = weight, scale
                scaled[name] = torch.empty(weight.shape)
                for i in range(rows):
                    for j in range(columns):
                        at = slice(16 * i, 16 * i + 16), slice(16 * j, 16 * j + 16)
                        scaled[name][at] = weight[at].float() * scale[i, j]

    folder, tensors = folder_of(tmp_path / "m", config | {"quantization_config": FP8}, quantise)
    import_(folder, tmp_path / "ck")
    gone = export(Checkpoint(tmp_path / "ck"), tmp_path / "hf")
    got = content(gone)
    assert got.keys() == {name for name in tensors if not name.endswith("_scale_inv")}
    for name, tensor in got.items():
        assert torch.equal(tensor, scaled[name].bfloat16() if name in scaled else tensors[name])
    assert json.loads((gone / "config.json").read_text()) == config


def other_embedding(tensors):
    tensors["model.layers.3.embed_tokens.weight"] += 1


def drop(name):
    return lambda tensors: tensors.pop(name)


def reshaped(name, *shape):
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
UP = "model.layers.1.mlp.experts.3.up_proj.weight"
DAMAGED = {
    "another embedding": (
        MTP,
        other_embedding,
        "layers.3.embed_tokens.weight: expected model.embed_tokens.weight, which multi-token pred",
    ),
    "no bias": ({}, drop(BIAS), f"a tensor {BIAS}, got none"),
    "a bias of another length": ({}, reshaped(BIAS, 4), r"expected shape \(8,\), got \(4,\)"),
    "no shared expert": (
        {},
        drop("model.layers.1.mlp.shared_experts.gate_proj.weight"),
        "a tensor model.layers.1.mlp.shared_experts.gate_proj.weight, got none",
    ),
    "one shared expert of two": (
        dict(n_shared_experts=1),
        lambda tensors: tensors.update(tensors_of(deepseek(n_shared_experts=2))),
        r"shared_experts.gate_proj.weight: expected shape \(24, 32\), got \(48, 32\)",
    ),
    "one dense layer more": (
        {},
        lambda tensors: tensors.update(tensors_of(deepseek(first_k_dense_replace=2))),
        "the tensors of its architecture alone, got model.layers.1.mlp.down_proj.weight besides",
    ),
    "a rank of queries that is not said": (
        dict(q_lora_rank=None),
        lambda tensors: tensors.update(tensors_of(deepseek())),
        "got model.layers.0.self_attn.q_a_layernorm.weight besides",
    ),
    "the second of two layers": (
        MTP,
        drop("model.layers.3.eh_proj.weight"),
        "a tensor model.layers.3.eh_proj.weight, got none",
    ),
    "layers that are not said": (
        {},
        lambda tensors: tensors.update(tensors_of(deepseek(**MTP))),
        "the tensors of its architecture alone, got model.layers.2.eh_proj.weight besides",
    ),
    "float8 that is not said": (
        {},
        lambda tensors: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)}),
        "up_proj.weight: expected BF16 or F16 or F32, got F8_E4M3",
    ),
    "float8 without a scale": (
        dict(quantization_config=FP8),
        lambda tensors: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)}),
        "up_proj.weight: expected BF16 or F16 or F32, got F8_E4M3",
    ),
    "scales of other blocks": (
        dict(quantization_config=FP8),
        lambda tensors: tensors.update(
            {UP: tensors[UP].to(torch.float8_e4m3fn), f"{UP}_scale_inv": torch.ones(1, 1)}
        ),
        r"scale_inv: expected a scale in F32 for each block, \(2, 2\), got \(1, 1\) in F32",
    ),
    "scales of integers": (
        dict(quantization_config=FP8),
        lambda tensors: tensors.update(
            {
                UP: tensors[UP].to(torch.float8_e4m3fn),
                f"{UP}_scale_inv": torch.ones(2, 2, dtype=torch.int32),
            }
        ),
        r"scale_inv: expected a scale in F32 .*, got \(2, 2\) in I32",
    ),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_folder_is_refused_by_name(tmp_path, name):
    changes, damage, message = DAMAGED[name]
    folder, _ = folder_of(tmp_path / "m", deepseek(**changes), damage)
    with pytest.raises(TSTError, match=message) as error:
        import_(folder, tmp_path / "ck")
    assert "\n" not in str(error.value) and os.listdir(tmp_path) == ["m"]


@pytest.mark.parametrize(
    "spec, want",
    [
        (
            "transformer_engine",
            {
                "0.self_attention.linear_q_up_proj.layer_norm_weight",
                "0.self_attention.linear_kv_up_proj.layer_norm_weight",
                "0.mlp.linear_fc1.layer_norm_weight",
                "1.pre_mlp_layernorm.weight",
            },
        ),
        (
            "local",
            {
                "0.self_attention.q_layernorm.weight",
                "0.self_attention.kv_layernorm.weight",
                "0.pre_mlp_layernorm.weight",
                "1.pre_mlp_layernorm.weight",
            },
        ),
    ],
)
def test_each_layer_spec_finds_its_norms(tmp_path, spec, want):
    """Transformer Engine's fuses them into the layer that follows, where it can."""
    folder, _ = folder_of(tmp_path / "m", deepseek())
    import_(folder, tmp_path / "ck", layer_spec=spec)
    found = {name.removeprefix("decoder.layers.") for name in Checkpoint(tmp_path / "ck").tensors}
    assert want <= found
    norms = {name for name in found if "norm" in name and not name.startswith("1.self")}
    assert norms - want == {
        "0.input_layernorm.weight",
        "1.input_layernorm.weight",
        "decoder.final_layernorm.weight",
    }


@pytest.mark.parametrize("old, new", [SPECS, SPECS[::-1]])
def test_names_of_one_layer_spec_become_those_of_the_other(tmp_path, old, new):
    """--layer-spec of `boundary` and `export-nemo`: norms of latents, and those before the MLP."""
    folder, _ = folder_of(tmp_path / "m", deepseek())
    names = {}
    for spec in SPECS:
        import_(folder, tmp_path / spec, layer_spec=spec)
        names[spec] = set(Checkpoint(tmp_path / spec).tensors)
    source = Checkpoint(tmp_path / old)
    rename = renaming(source, new)
    assert {rename(name) for name in source.tensors} == names[new] != names[old]
    state = "optimizer.state.exp_avg."
    assert {rename(state + name) for name in names[old]} == {state + name for name in names[new]}
    assert {renaming(source, old)(name) for name in names[old]} == names[old]


def changed(folder, tmp_path, tensors=None, **args):
    """The import as if another run had written it: other arguments, tensors left out or added."""
    import argparse

    from megatron_tst.checkpoint.rewrite import Changes, rewrite

    import_(folder, tmp_path / "ck")
    source = Checkpoint(tmp_path / "ck")
    given = argparse.Namespace(**vars(source.args) | args)
    name = tensors or (lambda name: name)
    keep = Changes(common=source.common | {"args": given}, name=name)
    rewrite(source, tmp_path / "run", keep)
    return Checkpoint(tmp_path / "run")


@pytest.mark.parametrize(
    "args, renamed, message",
    [
        (
            dict(moe_shared_expert_intermediate_size=24),
            None,
            r"shared_experts.down_proj.weight: expected shape \(32, 24\), got \(32, 48\)",
        ),
        (dict(moe_layer_freq=[0, 0]), None, "--num-experts and --moe-layer-freq: expected experts"),
        (dict(moe_layer_freq=[1, 1]), None, "layer 0's mlp.router.weight, got none|mlp.linear_fc1"),
        (dict(kv_lora_rank=8), None, r"kv_a_.*: expected shape \(8,\), got \(16,\)"),
        (
            dict(q_lora_rank=None),
            None,
            "the tensors of DeepseekV3ForCausalLM, got decoder.layers.0.self_attention.linear_q_",
        ),
        (
            {},
            ("linear_kv_up_proj.weight", "linear_q_proj.layer_norm_weight"),
            "linear_q_proj.layer_norm_weight too. Megatron-Core 0.19 gives multi-latent attention",
        ),
        (
            {},
            ("mlp.router.expert_bias", "mlp.router.qb_beta"),
            "the tensors of DeepseekV3ForCausalLM, got decoder.layers.1.mlp.router.qb_beta too",
        ),
        (
            dict(mtp_num_layers=1),
            None,
            "a tensor mtp.layers.0.transformer_layer.mlp.router.expert_bias",
        ),
    ],
)
def test_what_the_arguments_do_not_say_is_refused(tmp_path, args, renamed, message):
    """Tensors that are missing, left over, or of another shape; nothing is written."""

    def rename(name):
        return name.replace(*renamed) if renamed else name

    folder, _ = folder_of(tmp_path / "m", deepseek())
    source = changed(folder, tmp_path, rename, **args)
    with pytest.raises(TSTError, match=message) as error:
        export(source, tmp_path / "hf")
    assert "\n" not in str(error.value) and not (tmp_path / "hf").exists()


def test_without_a_bias_of_the_router_it_is_zero(tmp_path):
    """A run without --moe-router-enable-expert-bias has none, and transformers asks for one."""
    import argparse

    from megatron_tst.checkpoint.rewrite import Changes, rewrite

    folder, _ = folder_of(tmp_path / "m", deepseek())
    import_(folder, tmp_path / "ck")
    source = Checkpoint(tmp_path / "ck")
    args = vars(source.args) | dict(moe_router_enable_expert_bias=False)
    changes = Changes(
        common=source.common | {"args": argparse.Namespace(**args)},
        keep=lambda name: not name.endswith("expert_bias"),
    )
    rewrite(source, tmp_path / "run", changes)
    bias = content(export(Checkpoint(tmp_path / "run"), tmp_path / "hf"))[BIAS]
    assert torch.equal(bias, torch.zeros(8)) and bias.dtype == torch.float32
