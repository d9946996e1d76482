"""Checkpoints between Megatron-LM 0.18 and 0.19, written and read by their own pretrain_gpt.py,
over the boundary to a stock run.
"""

import pytest
from support.runs import CHECKOUTS, NO_CHECKOUT, TINY, TST, data, from_checkout

from megatron_tst import cli
from megatron_tst.checkpoint.format import Checkpoint

SCRIPT = "pretrain_gpt.py"
needs_checkouts = pytest.mark.skipif(not CHECKOUTS, reason=NO_CHECKOUT)


@needs_checkouts
@pytest.mark.parametrize("reads", CHECKOUTS, ids=lambda p: f"to {p.name}")
@pytest.mark.parametrize("writes", CHECKOUTS, ids=lambda p: f"from {p.name}")
def test_a_stock_run_goes_on(writes, reads, corpus, tmp_path):
    """The loss of each recovery iteration is the one that the TST run prints, to the last digit;
    the two versions train alike.
    """
    flags = [*TINY, *data(corpus)]
    run = from_checkout(
        writes / SCRIPT,
        *flags,
        *TST,
        "--save",
        tmp_path / "tst",
        "--save-interval",
        "6",
        "--tst-stock-index",
        tmp_path / "index",
    )
    assert run.ok, run.log[-3000:]
    (tmp_path / "tst" / "latest_checkpointed_iteration.txt").write_text("6")
    legacy = "0.18" in reads.name
    assert (
        cli.main(
            [
                "boundary",
                str(tmp_path / "tst"),
                str(tmp_path / "stock"),
                "--format",
                "0.18" if legacy else "0.19",
            ]
        )
        == 0
    )
    assert (
        (Checkpoint(tmp_path / "stock").common_item is None)
        == legacy
        == bool(list((tmp_path / "stock").rglob("common.pt")))
    )
    index = ["--data-cache-path", tmp_path / "index"]
    stock = from_checkout(reads / SCRIPT, *flags, *index, "--load", tmp_path / "stock", stock=True)
    assert stock.ok and "[tst]" not in stock.log, stock.log[-3000:]
    for i in (7, 9, 10):  # the line of 8 averages 7 and 8 after a start
        assert (stock.stock_losses[i], stock.grad_norms[i]) == (
            run.stock_losses[i],
            run.grad_norms[i],
        ), i
    assert stock.validation[10] == run.validation[10]
