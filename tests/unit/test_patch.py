"""The patch reaches Megatron in either import order, is all or nothing, and goes away without a
trace.
"""

import re
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
def clean(megatron, monkeypatch):  # taken down before monkeypatch, which puts stock back
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


# What a Megatron that is not known yet could have made of a function: the seam, the function (it is
# handed the real one), and what is wrong with it, or None where we rely on nothing that changed.
def relabelled(stock):
    return lambda self, logits, labels: stock(self, labels, logits)


def loss_with_a_mask(stock):
    return lambda self, labels, logits, loss_mask: stock(self, labels, logits)


def loss_with_an_option(stock):
    return lambda self, labels, logits, scale=None: stock(self, labels, logits)


def loss_by_name(stock):
    return lambda self, *, labels, logits: stock(self, labels, logits)


def loss_of_anything(stock):
    return lambda *positional, **named: stock(*positional, **named)


def roll_that_may_sum(stock):
    def roll_tensor(
        tensor, shifts=-1, dims=-1, cp_group=None, packed_seq_params=None, return_sum=True
    ):
        rolled, total = stock(tensor, shifts, dims, cp_group, packed_seq_params)
        return rolled, total if return_sum else None

    return roll_tensor


def roll_with_a_mandatory_layout(stock):
    def roll_tensor(tensor, layout, shifts=-1, dims=-1):
        return stock(tensor, shifts, dims)

    return roll_tensor


def roll_of_an_axis(stock):
    return lambda tensor, shifts=-1, axis=-1: stock(tensor, shifts, axis)


def forward_reordered(stock):
    return lambda self, labels, input_ids, **rest: stock(
        self, input_ids=input_ids, labels=labels, **rest
    )


def forward_of_targets(stock):
    return lambda self, input_ids, targets: stock(self, input_ids, labels=targets)


def log_with_the_clock(stock):
    return lambda loss_dict, total_loss_dict, learning_rate, iteration, *, is_first_iteration: None


def log_iteration_first(stock):
    return lambda iteration, loss_dict, total_loss_dict, learning_rate, is_first_iteration: None


def log_that_does_not_know_the_first(stock):
    return lambda loss_dict, total_loss_dict, learning_rate, iteration: None


def evaluate_by_name(stock):
    return lambda *, model, data: stock(model, data)


def batch_in_tokens(stock):
    return lambda batch, tp_rank, tokens: stock(batch, tp_rank=tp_rank)


def pretrain_reordered(stock):
    return lambda forward_step_func, train_valid_test_dataset_provider, *, config: None


def pretrain_renamed(stock):
    return lambda cfg_container, provider, forward_step_func: None


def helpers_somewhere(stock):
    return lambda folder: None


@pytest.mark.parametrize(
    "seam, changed, problem",
    [
        (
            seams.LOSS,
            relabelled,
            r"the parameters \(self, labels, logits\) by position, got "
            r"\(self, logits, labels\)",
        ),
        (seams.LOSS, loss_with_a_mask, r"a default of loss_mask, got \(self, labels, logits, "),
        (seams.LOSS, loss_by_name, r"the parameters \(self, labels, logits\) by position"),
        (seams.LOSS, loss_of_anything, r".* by position, got \(\*positional, \*\*named\)"),
        (seams.LOSS, loss_with_an_option, None),
        (seams.MTP_ROLL, roll_that_may_sum, None),
        (seams.MTP_ROLL, roll_with_a_mandatory_layout, None),  # what it is given is handed on
        (seams.MTP_ROLL, roll_of_an_axis, "to take dims by name"),
        (seams.GPT_FORWARD, forward_reordered, None),  # labels are found by name
        (seams.GPT_FORWARD, forward_of_targets, "to take labels by name"),
        (seams.TRAINING_LOG, log_with_the_clock, None),
        (seams.TRAINING_LOG, log_iteration_first, r"the parameters \(loss_dict, "),
        (seams.TRAINING_LOG, log_that_does_not_know_the_first, "to take is_first_iteration"),
        (seams.EVALUATE, evaluate_by_name, None),
        (seams.SKIPPED_BATCH, batch_in_tokens, "to take broadcast_src_rank, broadcast_group, "),
        (seams.PRETRAIN, pretrain_reordered, None),
        (seams.PRETRAIN, pretrain_renamed, "to take train_valid_test_dataset_provider by name"),
        (seams.BUILD_HELPERS, helpers_somewhere, r"a default of folder, got \(folder\)"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_what_we_rely_on_in_a_signature_is_compared(monkeypatch, seam, changed, problem):
    before = seam.function()
    there = changed(before)
    monkeypatch.setattr(seam.owner(), seam.attribute, there)
    replacement = {seam: lambda stock: lambda *positional, **named: "ours"}
    if problem:
        with pytest.raises(patch.PatchError, match=rf"{re.escape(str(seam))}: expected {problem}"):
            patch.install(replacement)
        assert seam.function() is there and patch.status() == patch.Status()
    else:
        patch.install(replacement)
        assert seam.function()() == "ours"
        patch.remove()


def test_a_function_that_takes_more_is_handed_it_and_bags_refuse_it(monkeypatch):
    """Ours is called as Megatron calls its own: what it does not know goes to the stock function.
    With bags nobody would do what is asked.
    """
    from megatron.core.models.common.language_module.language_module import LanguageModule

    stock, asked = LanguageModule.compute_language_model_loss, []
    monkeypatch.setattr(
        LanguageModule,
        "compute_language_model_loss",
        lambda self, labels, logits, scale=None: (asked.append(scale), stock(self, labels, logits))[
            1
        ],
    )
    patch.apply()
    model, logits = gpt(), torch.randn(8, 2, 96)
    loss = model.compute_language_model_loss
    ids = torch.randint(0, 96, (2, 8, 3))
    want = loss(ids[..., 0], logits.clone())
    assert torch.equal(loss(ids[..., 0], logits.clone(), scale="half"), want)
    assert asked == [None, "half"] and loss(ids, logits).shape == (2, 8)
    for name in ("scale", "something"):
        with pytest.raises(patch.PatchError, match=f"no further arguments, got {name}"):
            loss(ids, logits, **{name: 1})
    with pytest.raises(patch.PatchError, match="VocabParallelEmbedding.forward with bags"):
        model.embedding.word_embeddings(ids, "half")


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


def test_what_is_kept_stays_for_the_next_run():
    patch.apply()
    ours = stock_functions()
    after = patch.remove(keep=[seams.EMBEDDING])
    assert after.seams == (str(seams.EMBEDDING),) and after.config is None
    assert [seam for seam in SEAMS if stock_functions()[seam] is ours[seam]] == [seams.EMBEDDING]
    # somebody's patch over one that stays is nobody's loss
    owner = seams.EMBEDDING.owner()
    owner.forward = lambda *given: None
    assert patch.remove(keep=[seams.EMBEDDING]) == after
    owner.forward = ours[seams.EMBEDDING]


@pytest.mark.parametrize("bags", [True, False])
def test_the_loss_gets_the_models_group(monkeypatch, bags):
    """Over the model's own tensor-parallel ranks, whatever Megatron's global ones are."""
    from megatron_tst.ops import loss as module

    seen = []

    def recorded(logits, labels, weights, **named):
        seen.append((tuple(labels.shape), named))
        return torch.arange(8.0).view(4, 2) + 0 * logits.sum()

    monkeypatch.setattr(module, "multi_hot_cross_entropy", recorded)
    config = TSTConfig(3, iters=1, loss="mce-alt", kernel="torch", kernel_in_recovery=True)
    patch.apply(config)
    model = gpt()
    group = model.tp_group = types.SimpleNamespace(size=lambda: 2, rank=lambda: 1)
    labels, logits = (
        torch.zeros((2, 4, 3) if bags else (2, 4), dtype=torch.int64),
        torch.ones(4, 2, 9),
    )
    got = model.compute_language_model_loss(labels, logits)
    assert got.tolist() == [[0, 2, 4, 6], [1, 3, 5, 7]] and got.is_contiguous()
    assert seen == [
        (
            (4, 2, 3 if bags else 1),
            dict(
                tp_group=group,
                loss="mce-alt" if bags else "mce",  # recovery has the ordinary loss
                inplace_backward=True,
                kernel="torch",
            ),
        )
    ]


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
    with pytest.raises(patch.PatchError, match=r"users_script.* got \(data_iterator\)"):
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


def test_transformer_engines_loss_is_of_single_labels_alone(monkeypatch):
    """--cross-entropy-fusion-impl te: chosen inside the stock method, which bags do not reach, nor
    single labels with kernel_in_recovery.
    """
    from megatron.core.models.common.language_module import language_module as module

    def te(logits, labels, *_):
        seen.append(tuple(labels.shape))
        return logits.sum(-1)

    seen = []
    monkeypatch.setattr(module, "te_parallel_cross_entropy", te)
    model = gpt(cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="te")
    plain, logits = gpt(), torch.randn(8, 2, 96)
    ids = torch.randint(0, 96, (2, 8, 3))

    def loss(model, labels):
        return model.compute_language_model_loss(labels, logits.clone().requires_grad_())

    patch.apply()
    assert torch.equal(loss(model, ids), loss(plain, ids)) and not seen
    loss(model, ids[..., 0])
    loss(model, ids[..., :1])  # a bag of one is a token
    assert seen == [(8, 2), (8, 2)]
    patch.apply(TSTConfig(3, iters=1, kernel_in_recovery=True))
    loss(model, ids[..., 0])
    assert len(seen) == 2
    with torch.no_grad():  # validation
        loss(model, ids[..., 0])
    assert len(seen) == 3
