"""Exports through Megatron-Bridge (make test-bridge) of architectures that the package has no
writer for: what transformers and Bridge make of them, against what Megatron says of the model.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if (
    importlib.util.find_spec("megatron") is None
    or importlib.util.find_spec("megatron.bridge") is None
):
    pytest.skip(
        "NOT RUN: exports through Megatron-Bridge; make test-bridge", allow_module_level=True
    )

from support import trained
from support.close import close
from support.hf_folder import word_tokenizer
from support.paths import EVERYTHING, PACKAGE, environment
from support.trained import VOCAB, Trained, corpus_below

from megatron_tst.checkpoint.format import Checkpoint
from megatron_tst.checkpoint.verify import differences

sys.path.insert(0, str(Path(__file__).parent))
from through_bridge_models import CONFIGS, DEEPSEEK, FLAGS, GLM, QWEN2, REFUSED, SIZES

pytestmark = pytest.mark.timeout(1800)  # the first test trains five models

NEW = [name for name in FLAGS if name != DEEPSEEK]
CLASSES = {name: config["architectures"][0] for name, config in CONFIGS.items()}
CHECKPOINT_TESTS = Path(trained.__file__).parents[1] / "checkpoint"


def run(script, *arguments, cpu=True):
    """A script in a process of its own: Megatron's shims are not for transformers."""
    env = os.environ | environment(EVERYTHING if cpu else PACKAGE)
    if not cpu:
        env.pop("MEGATRON_TST_CPU", None)
    command = [sys.executable, "-W", "ignore", str(script), *map(str, arguments)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]


@pytest.fixture(scope="module")
def folders(fork_server, tmp_path_factory, monkeypatch_module):
    """name -> folder with ck, answers.pt and what ask_through_bridge.py and ask_transformers.py
    have made of them
    """
    for name, (processes, flags) in FLAGS.items():
        monkeypatch_module.setitem(trained.RUNS, name, (processes, flags, CLASSES[name]))
    train = Trained(
        fork_server, corpus_below(tmp_path_factory.mktemp("ids")), tmp_path_factory.mktemp
    )
    made = {name: train(name) for name in FLAGS}
    for name, folder in made.items():
        (folder / "name.txt").write_text(name)
        word_tokenizer(folder, range(VOCAB))
        (folder / "config").mkdir()
        (folder / "config/config.json").write_text(json.dumps(CONFIGS[name]))
    run(Path(__file__).parent / "ask_through_bridge.py", *made.values())
    asked = [made[name] for name in NEW]
    run(CHECKPOINT_TESTS / "ask_transformers.py", *asked, cpu=False)
    return made


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def tensors_of(folder):
    from safetensors.torch import load_file

    files = sorted(folder.glob("*.safetensors"))
    assert files
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("name", NEW)
def test_transformers_says_what_megatron_says(folders, name):
    want, got = (
        torch.load(folders[name] / file, weights_only=True)
        for file in ("answers.pt", "transformers.pt")
    )
    assert got["class"] == CLASSES[name] and not got["unloaded"]
    assert got["logits"].shape == want["logits"].shape == (5, 12, VOCAB)
    close(got["logits"], want["logits"], 2e-6)  # largest seen 4e-7
    assert torch.equal(got["generated"], want["generated"]) and len(want["generated"].unique()) > 3


@pytest.mark.parametrize("name", FLAGS)
def test_every_tensor_comes_from_the_checkpoint(folders, name):
    """With all of the checkpoint's weights doubled every exported tensor is."""
    one, two = (tensors_of(folders[name] / export) for export in ("hf", "doubled"))
    assert one.keys() == two.keys()
    assert all(torch.equal(two[key], 2 * one[key]) for key in one)
    # parts that start at zero have been trained too
    assert all(tensor.any() for tensor in one.values())


def test_names_of_transformer_engines_layers(folders):
    """A checkpoint that has them is exported as one that has the local layers'."""
    one, other = (tensors_of(folders[GLM] / export) for export in ("hf", "of_engine"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    stored = Checkpoint(folders[GLM] / "engine").tensors
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in stored
    assert (
        "decoder.layers.1.pre_mlp_layernorm.weight" not in Checkpoint(folders[GLM] / "ck").tensors
    )


@pytest.mark.parametrize("name", FLAGS)
def test_rounded_once(folders, name):
    """bf16 is the fp32 rounded once; a router's bias stays in fp32."""
    whole, rounded = (tensors_of(folders[name] / export) for export in ("hf", "bf16"))
    assert whole.keys() == rounded.keys()
    for key, tensor in whole.items():
        kept = key.endswith("e_score_correction_bias")
        assert torch.equal(rounded[key], tensor if kept else tensor.bfloat16()), key


def test_bridges_names_equal_our_own(folders):
    """DeepSeek-V3 has a writer here: the same tensors, multi-token prediction's too, whose copies
    of embedding and head Bridge leaves out.
    """
    ours, theirs = (tensors_of(folders[DEEPSEEK] / export) for export in ("own", "hf"))
    for copy, of in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        assert torch.equal(ours.pop(f"model.layers.3.{copy}.weight"), ours[f"{of}.weight"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", [GLM, DEEPSEEK])
def test_on_a_login_node(folders, tmp_path, name):
    """Without a GPU and without the shims of CPU training the same bytes are written."""
    folder = folders[name]
    flags = ["--through-bridge", "--hf-config", folder / "config", "--dtype", "float32"]
    exported = ["export-hf", folder / "ck", tmp_path / "hf", *flags]
    run(Path(__file__).parent / "with_bridge.py", *exported, cpu=False)
    file = "model.safetensors"
    assert (tmp_path / "hf" / file).read_bytes() == (folder / "hf" / file).read_bytes()


@pytest.mark.parametrize("name", FLAGS)
def test_config_json_is_kept(folders, name):
    folder = folders[name] / "hf"
    written = json.loads((folder / "config.json").read_text())
    released = "quantization_config", "auto_map"
    given = {key: value for key, value in CONFIGS[name].items() if key not in released}
    assert written == given | {"torch_dtype": "float32"}
    assert (folder / "tokenizer.json").is_file() and (folder / "README.md").is_file()


@pytest.mark.parametrize("name", NEW)
def test_bridge_loads_the_nemo_export(folders, name):
    got, want = (
        torch.load(folders[name] / file, weights_only=True) for file in ("bridge.pt", "answers.pt")
    )
    close(got["logits"][..., :VOCAB], want["logits"], 2e-6)


@pytest.mark.parametrize("name", [name for name in NEW if "ep2" not in name])
def test_bridge_resumes(folders, name):
    """Bridge's pretrain goes on where the run stopped, with its weights and optimizer state."""
    resumed = torch.load(folders[name] / "bridge.pt", weights_only=True)["resumed"]
    counts = {"step": 10, "consumed_train_samples": 40, "consumed_valid_samples": 16}
    assert counts.items() <= resumed["counts"].items()
    assert 4 < resumed["loss"] < 8 and 0 < resumed["grad_norm"] < 100
    nemo, again = (
        Checkpoint(folders[name] / place) for place in ("nemo", "bridge_again/iter_0000010")
    )
    ends = ("word_embeddings.weight", "output_layer.weight")  # whose padding is another one
    assert all(key.endswith(ends) for key in differences(nemo, again, optimizer=True))
    assert sum(key.startswith("optimizer.") for key in nemo.tensors) > 10


def test_bridge_itself_exports_no_local_experts_of_glm(folders):
    """Bridge 0.6's GLM-4.5; docs/export.md says so. When this fails, it does, and the page is to be
    changed.
    """
    assert torch.load(folders[GLM] / "bridge.pt", weights_only=True)["refusal"]


@pytest.mark.parametrize("name", [name for name in NEW if name != GLM])
@pytest.mark.parametrize("how", ["bridge_auto", "bridge_folder"])
def test_bridges_own_export_equals_ours(folders, name, how):
    ours, theirs = (tensors_of(folders[name] / export) for export in ("hf", how))
    if how == "bridge_auto" and "tied" in name:  # Bridge writes the head too
        assert torch.equal(theirs.pop("lm_head.weight"), ours["model.embed_tokens.weight"])
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("case", REFUSED)
def test_refused(folders, case):
    of, _, expected = REFUSED[case]
    code, said, there = json.loads((folders[of] / "refusals.json").read_text())[case]
    (line,) = [line for line in said.splitlines() if "error" in line]
    assert code == 2 and not there
    assert line.startswith("megatron-tst export-hf: error: ") and expected in line, line


def test_every_architecture_that_bridge_lists(folders):
    """With the default config.json of each, of another model: one sentence, and nothing that was
    not foreseen. Those of Megatron's own layers get as far as the settings.
    """
    known = json.loads((folders[QWEN2] / "known.json").read_text())
    settings = set()
    for name, (code, said, there) in known.items():
        (line,) = [line for line in said.splitlines() if "error" in line]
        assert code == 2 and not there and "foreseen" not in line, line
        if "error: --" in line:
            settings.add(name.removesuffix("ForCausalLM"))
    assert len(known) > 30
    assert settings == {
        *("DeepseekV2", "DeepseekV3", "Glm4Moe", "Glm4MoeLite", "GptOss", "Llama", "Mistral"),
        *("Nemotron", "Qwen2", "Qwen3", "Qwen3Moe"),
    }


@pytest.mark.parametrize("name", SIZES)
def test_released_sizes_are_planned(folders, name):
    """As many numbers as the makers state, each from one place in a Megatron model."""
    found = json.loads((folders[QWEN2] / "sizes.json").read_text())
    assert found[name] / 1e9 == pytest.approx(SIZES[name], rel=5e-4)
