"""python -m megatron_tst.launch: scripts that know nothing of TST, and Megatron-LM's own."""

import os
import re
import subprocess
import sys

import pytest
from support.runs import (
    CHECKOUTS,
    NO_CHECKOUT,
    ROOT,
    TINY,
    TST,
    Run,
    data,
    from_checkout,
    losses_close,
)

TP2 = ["--tensor-model-parallel-size", "2", "--make-vocab-size-divisible-by", "64"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The package's script without its two lines: an ordinary script on megatron.training."""
    path = tmp_path_factory.mktemp("script") / "pretrain_plain.py"
    lines = open(ROOT / "megatron_tst/pretrain_gpt.py")
    path.write_text("".join(line for line in lines if "(TST)" not in line))
    assert "megatron_tst" not in path.read_text().split('"""')[2]
    return path


def test_plain_script_trains_both_phases_as_our_own_does(fork_server, corpus, plain):
    want = fork_server.train(*TINY, *TST, *data(corpus))
    got = fork_server.launch(plain, *TINY, *TST, *data(corpus))
    assert got.ok and len(got.losses) == 10, got.log[-3000:]
    assert got.losses == want.losses and got.validation == want.validation


def test_remove_puts_the_scripts_own_function_back(fork_server, corpus, plain, tmp_path):
    script = tmp_path / "removes.py"
    after = """
    import megatron_tst
    from megatron.core import utils

    ours = get_batch_on_this_tp_rank
    megatron_tst.remove()
    print("replaced", ours is not utils.get_batch_on_this_tp_rank)
    print("restored", get_batch_on_this_tp_rank is utils.get_batch_on_this_tp_rank)
"""
    script.write_text(plain.read_text() + after)
    run = fork_server.launch(script, *TINY, *TST, *data(corpus))
    assert run.ok and "replaced True" in run.log and "restored True" in run.log, run.log[-3000:]


def test_without_flags_the_script_is_stock(fork_server, corpus, plain):
    got = fork_server.launch(plain, *TINY, *data(corpus))
    assert got.ok and "[tst]" not in got.log and len(got.stock_losses) == 10, got.log[-3000:]


def test_tensor_parallel_ranks_get_their_batches(fork_server, corpus, plain, tmp_path):
    flags = [*TINY, *TST, *data(corpus)]
    one = fork_server.launch(plain, *flags, "--save", tmp_path, "--save-interval", "4")
    assert one.ok, one.log[-3000:]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    two = fork_server.launch(plain, *flags, "--load", tmp_path, *TP2, nproc=2)
    assert two.ok, two.log[-3000:]
    losses_close(two, one, range(5, 11))


def test_a_script_whose_batches_cannot_be_reached_is_refused_under_tensor_parallelism(
    fork_server, corpus, plain, tmp_path
):
    script = tmp_path / "other.py"
    script.write_text(
        plain.read_text()
        .replace("get_batch_on_this_tp_rank", "another_name")
        .replace("    another_name,\n", "    get_batch_on_this_tp_rank as another_name,\n")
    )
    run = fork_server.launch(script, *TINY, *TST, *data(corpus), *TP2, nproc=2)
    assert (
        run.codes == [2, 2]
        and "tensor parallelism with this script: expected a forward_step whose module calls"
        in run.error
    )


def test_hybrid_model_gives_the_digits_of_the_gpt_model(fork_server, corpus, plain, tmp_path):
    hybrid = tmp_path / "pretrain_hybrid.py"
    hybrid.write_text(plain.read_text().replace("gpt_config_from_args", "hybrid_config_from_args"))
    flags = [*TINY, *TST, *data(corpus)]
    at = flags.index("--num-layers")
    layers = [
        "--hybrid-layer-pattern",
        "*-*-",
        "--spec",
        "support.hybrid_spec",
        "hybrid_stack_spec",
    ]
    want = fork_server.launch(plain, *flags)
    got = fork_server.launch(hybrid, *flags[:at], *flags[at + 2 :], *layers)
    assert got.ok and len(got.losses) == 10, got.log[-3000:]
    assert got.losses == want.losses and got.validation == want.validation


def test_a_launch_line_after_the_readmes_change(corpus, plain, tmp_path):
    """README's diff, applied to the launch line of a user whose script knows nothing of TST:
    torchrun, two processes.
    """
    before, after = re.search(
        r"^```diff\n- (.*)\n\+ (.*)\n```", (ROOT / "README.md").read_text(), re.M
    ).groups()
    assert re.sub(" +", " ", before) == "torchrun ... pretrain_gpt.py $ARGS" and after.startswith(
        "torchrun ... -m megatron_tst.launch pretrain_gpt.py "
    )
    (tmp_path / "pretrain_gpt.py").write_text(plain.read_text())
    line = after.replace(
        "...", "--nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint localhost:0"
    )
    environment = dict(
        os.environ,
        ARGS=" ".join([*TINY, *data(corpus)]),
        OMP_NUM_THREADS="1",
        PATH=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]),
    )
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    run = Run([done.returncode], done.stdout + done.stderr)
    assert run.ok and "[tst] on: bag size 6" in run.log, run.log[-3000:]
    assert [run.phases[i][:2] for i in (1, 3, 4, 10)] == [("superposition", 6)] * 2 + [
        ("recovery", 1)
    ] * 2


def test_a_script_with_the_readmes_two_lines(fork_server, corpus, plain, tmp_path):
    lines = re.search(
        r"^```python\n(from megatron_tst import training\n.*?)```",
        (ROOT / "README.md").read_text(),
        re.M | re.S,
    )[1]
    (tmp_path / "mine.py").write_text(lines + plain.read_text())
    run = fork_server.train(*TINY, *TST, *data(corpus), script=str(tmp_path / "mine.py"))
    assert run.ok and run.phases[6][0] == "superposition" and run.phases[7][0] == "recovery", (
        run.log[-3000:]
    )


@pytest.mark.skipif(not CHECKOUTS, reason=NO_CHECKOUT)
@pytest.mark.parametrize("checkout", CHECKOUTS, ids=lambda p: p.name)
@pytest.mark.parametrize("script", ["pretrain_gpt.py", "pretrain_hybrid.py"])
def test_megatron_lms_own_script(checkout, script, corpus, tmp_path):
    """Both phases and a resume, in a fresh process that takes Megatron from the checkout."""
    flags = [*TINY, *TST, *data(corpus)]
    if script == "pretrain_hybrid.py":
        at = flags.index("--num-layers")
        flags = [
            *flags[:at],
            *flags[at + 2 :],
            "--hybrid-layer-pattern",
            "*-*-",
            "--spec",
            "support.hybrid_spec",
            "hybrid_stack_spec",
        ]
    first = from_checkout(checkout / script, *flags, "--save", tmp_path, "--save-interval", "4")
    assert first.ok and len(first.losses) == 10, first.log[-3000:]
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("4")
    again = from_checkout(checkout / script, *flags, "--load", tmp_path)
    assert again.ok and again.losses == {i: first.losses[i] for i in range(5, 11)}, again.log[
        -3000:
    ]
