"""The patch reaches Megatron in either import order, is all or nothing, and goes away without a
trace.
"""

import subprocess
import sys
import types

import pytest
import torch
from support.models import batch, gpt
from support.paths import PACKAGE, environment

from megatron_tst import TSTConfig
from megatron_tst.loop import patch, seams


@pytest.fixture(autouse=True)
def clean(megatron):
    yield
    patch.remove()


SEAMS = (*seams.MODEL_SEAMS, *[seams.MTP_ACCEPTANCE] * seams.MTP_ACCEPTANCE.exists)


def stock_functions():
    return {seam: vars(seam.owner())[seam.attribute] for seam in SEAMS}


def test_apply_is_idempotent_and_remove_restores():
    before = stock_functions()
    first = patch.apply()
    ours = stock_functions()
    assert set(first.seams) == {str(seam) for seam in SEAMS} and all(
        ours[s] is not before[s] for s in before
    )
    assert patch.apply() == first and stock_functions() == ours
    patch.remove()
    assert stock_functions() == before and patch.status() == patch.Status()
    patch.remove()
    assert stock_functions() == before


def test_settings_follow_the_last_apply():
    labels, logits = torch.randint(0, 96, (2, 8, 3)), torch.randn(8, 2, 96)
    model = gpt()
    losses = []
    for config in (TSTConfig(), TSTConfig(target_weighting="power-law"), TSTConfig(loss="mce-alt")):
        assert patch.apply(config).config == config
        losses.append(model.compute_language_model_loss(labels, logits))
    assert all(
        (a - b).abs().max() > 1e-3
        for a, b in ((losses[0], losses[1]), (losses[1], losses[2]), (losses[0], losses[2]))
    )


@pytest.mark.parametrize("seam", seams.MODEL_SEAMS, ids=lambda seam: seam.attribute)
def test_a_renamed_seam_raises_and_leaves_nothing_patched(monkeypatch, seam):
    owner = seam.owner()
    stock = vars(owner)[seam.attribute]
    monkeypatch.delattr(owner, seam.attribute)
    monkeypatch.setattr(owner, seam.attribute + "_renamed", stock, raising=False)
    with pytest.raises(
        patch.PatchError, match=rf"nothing was patched: .*{seam.attribute}: expected to exist"
    ):
        patch.apply()
    assert patch.status().seams == ()
    others = [s for s in SEAMS if s != seam]
    assert not any(hasattr(vars(s.owner())[s.attribute], "__wrapped__") for s in others)
    monkeypatch.undo()
    assert len(patch.apply().seams) == len(SEAMS)


def test_a_changed_signature_raises(monkeypatch):
    from megatron.core.models.common.language_module.language_module import LanguageModule

    monkeypatch.setattr(
        LanguageModule, "compute_language_model_loss", lambda self, logits, labels: None
    )
    with pytest.raises(
        patch.PatchError,
        match=r"expected parameters \('self', 'labels', 'logits'\), got \('self', 'logits', "
        r"'labels'\)",
    ):
        patch.apply()
    assert patch.status().seams == ()


def test_remove_does_not_drop_somebody_elses_patch(monkeypatch):
    patch.apply()
    from megatron.core.models.common.language_module.language_module import LanguageModule

    ours = LanguageModule.compute_language_model_loss
    LanguageModule.compute_language_model_loss = lambda self, labels, logits: ours(
        self, labels, logits
    )
    with pytest.raises(patch.PatchError, match="was patched again"):
        patch.remove()
    assert len(patch.status().seams) == len(SEAMS)
    LanguageModule.compute_language_model_loss = ours


@pytest.fixture
def script():
    """A user's module, which has imported Megatron's function by name."""
    from megatron.core.utils import get_batch_on_this_tp_rank

    module = types.ModuleType("users_script")
    module.get_batch_on_this_tp_rank = get_batch_on_this_tp_rank
    return module


def test_a_users_script_is_put_back_as_it_was(script):
    stock = script.get_batch_on_this_tp_rank
    patch.install({seams.batches_of(vars(script)): lambda stock: lambda batch, **named: batch})
    ours = script.get_batch_on_this_tp_rank
    assert ours is not stock and ours("the batch") == "the batch"
    assert patch.status().in_scripts == ("users_script.get_batch_on_this_tp_rank",)
    assert patch.status().seams == ()
    patch.install({seams.batches_of(vars(script)): lambda stock: None})
    assert script.get_batch_on_this_tp_rank is ours
    assert patch.remove() == patch.Status() and script.get_batch_on_this_tp_rank is stock


def test_a_users_script_is_never_left_half_patched(script):
    stock, seam = script.get_batch_on_this_tp_rank, seams.batches_of(vars(script))
    both = {seams.EMBEDDING: patch._embedding, seam: lambda stock: lambda batch: batch}
    script.get_batch_on_this_tp_rank = lambda data_iterator: None  # of another Megatron
    with pytest.raises(patch.PatchError, match=r"users_script.* got \('data_iterator',\)"):
        patch.install(both)
    del script.get_batch_on_this_tp_rank
    with pytest.raises(patch.PatchError, match="users_script.*expected to exist"):
        patch.install(both)
    assert patch.status() == patch.Status()
    script.get_batch_on_this_tp_rank = stock
    patch.install(both)
    ours = script.get_batch_on_this_tp_rank
    script.get_batch_on_this_tp_rank = lambda batch: ours(batch)
    with pytest.raises(patch.PatchError, match="users_script.* was patched again"):
        patch.remove()
    assert len(patch.status().seams) == 1  # nothing was put back
    script.get_batch_on_this_tp_rank = ours


def test_models_built_before_apply_are_reached_and_released():
    model = gpt()
    arguments = batch(torch.randint(0, 96, (2, 25)), 3)
    patch.apply()
    assert model(**arguments).isfinite().all() and patch.status().multi_hot_losses == 1
    patch.remove()
    with pytest.raises((RuntimeError, ValueError)):  # stock Megatron cannot take a bag
        model(**arguments)


IMPORT_ORDER = """
import os
os.environ["MEGATRON_TST_CPU"] = "1"
from megatron_tst import cpu
cpu.enable_if_asked()
{order}
ours = LanguageModule.compute_language_model_loss
assert VocabParallelEmbedding.forward.__wrapped__ and ours.__wrapped__
assert GPTModel.compute_language_model_loss is ours is HybridModel.compute_language_model_loss
print("reached")
"""
MEGATRON_IMPORTS = """
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
"""


@pytest.mark.parametrize("megatron_first", [True, False])
def test_both_import_orders(megatron_first):
    ours = "import megatron_tst\nmegatron_tst.apply()"
    order = f"{MEGATRON_IMPORTS}\n{ours}" if megatron_first else f"{ours}\n{MEGATRON_IMPORTS}"
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ORDER.format(order=order)], capture_output=True, text=True
    )
    assert done.stdout.strip().endswith("reached"), done.stderr[-2000:]


def test_importing_the_package_imports_neither_torch_nor_megatron():
    code = "import sys, megatron_tst; sys.exit('torch' in sys.modules or 'megatron' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_half_installed_transformer_engine_is_survived(tmp_path):
    """Transformer Engine without its torch part raises AssertionError on import, which Megatron
    does not catch.
    """
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text(
        "assert False, 'Could not find shared object file for Transformer Engine torch lib.'"
    )
    code = (
        "import sys\n"
        "from megatron_tst import compat\n"
        "if len(sys.argv) > 1: compat.hide_broken_transformer_engine()\n"
        "import megatron.core.utils; print('imported')"
    )
    command = dict(capture_output=True, text=True, env=environment([str(tmp_path), *PACKAGE]))
    without = subprocess.run([sys.executable, "-c", code], **command)
    assert without.returncode and "AssertionError" in without.stderr  # the trap is still there
    with_ = subprocess.run([sys.executable, "-c", code, "hide"], **command)
    assert (
        with_.stdout.strip() == "imported" and "cannot be imported (AssertionError" in with_.stderr
    )
