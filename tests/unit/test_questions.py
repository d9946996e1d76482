"""The experiments' configs, and the figure and the numbers that their CSV gives."""

import plot as experiments_plot
import pytest
import questions
import results
from support.runs import ROOT


def rows(question="q", **losses):
    """arm -> (iterations, settings, losses of seeds 1, 2, ...)"""
    blank = dict.fromkeys(results.COLUMNS, "")
    for arm, (iterations, settings, found) in losses.items():
        for seed, loss in enumerate(found, 1):
            yield blank | {
                "question": question,
                "arm": arm,
                "seed": str(seed),
                "base_iterations": "100",
                "iterations": str(iterations),
                "validation_loss": str(loss),
                "flops": str(iterations * 1e9),
                "settings": settings,
                "raw_tokens": "5",
            }


def test_the_experiments_figure(tmp_path, capsys):
    table = results.Table(tmp_path / "results.csv")
    for row in rows(
        base=(100, "gpt", (4.0, 4.4)),
        long=(200, "gpt", (3.0, 3.4)),
        TST=(100, "gpt --tst-bag-size 2", (3.5, 3.8)),
    ):
        table.append(row)
    out = tmp_path / "x.svg"
    call = [str(table.path), "--question", "q", "--output", str(out)]
    assert experiments_plot.main([*call, "--against", "flops"]) == 0
    said = capsys.readouterr().out
    assert out.read_bytes().startswith(b"<?xml")
    assert "minus base: -0.5500 standard error 0.0500 (-0.6000 to -0.5000, 2 seeds)" in said
    assert (
        "stock runs to the loss of TST: flops times 1.5500 standard error 0.0500 (1.5000 to "
        "1.6000, 2 seeds)" in said
    )
    assert experiments_plot.main(call) == 0
    for wrong in (
        ["--question", "none"],
        ["--reference", "none"],
        ["--output", "x.pdf"],
        ["--iterations", "7"],
    ):
        assert (
            experiments_plot.main([*call, *wrong]) == 2
            and "plot: error:" in capsys.readouterr().err
        )


def test_arms_stand_as_in_the_config_whichever_ended_first(tmp_path, capsys):
    table = results.Table(tmp_path / "results.csv")
    found = [("mine", 2.0), ("s=2 r=0.2", 3.0), ("baseline", 4.0)]
    for row in rows(**{name: (100, "gpt", (loss,)) for name, loss in found}):
        table.append(row | {"question": "equal_flops"})
    assert (
        experiments_plot.main(
            [str(table.path), "--question", "equal_flops", "--output", str(tmp_path / "x.png")]
        )
        == 0
    )
    said = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in said[:3]] == [
        "baseline",
        "s=2 r=0.2",
        "mine",
    ] and "minus baseline: -1.0000" in said[1]


@pytest.mark.parametrize(
    "text, message",
    [
        ("question = 'x'\n", "expected .*arm.* tables"),
        (
            "question = 'x'\nseed = 3\n[[arm]]\nname = 'a'\n",
            "expected entries of .*seeds.*got seed",
        ),
        ("question = 'x'\n[[arm]]\nname = 'a'\ntts = ''\n", "arm a: expected entries of .*tst"),
        ("[[arm]]\nname = 'a'\n", "expected an entry 'question'"),
        ("question = 'x'\n[[arm]]\ntst = ''\n", "expected an entry 'name'"),
        (
            "question = 'x'\n[[arm]]\nname = 'a'\n[[arm]]\nname = 'a'\n",
            "a name of its own, got a, a",
        ),
        ("question = 'x'\n[[arm]]\nname = 'a'\nconvert = ''\n", "expected 'tst' beside 'convert'"),
        ("question = ", "expected a TOML file"),
    ],
)
def test_mistakes_in_a_config_are_named(tmp_path, text, message):
    (tmp_path / "q.toml").write_text(text)
    with pytest.raises(questions.ConfigError, match=message):
        questions.load(tmp_path / "q.toml")


def test_every_config_can_be_read():
    found = [
        questions.load(path) for path in sorted((ROOT / "examples" / "experiments").glob("*.toml"))
    ]
    assert len(found) >= 9 and all(q.time and q.expect and not q.arms[0].tst for q in found)
    assert all(len(q.seeds) >= 3 or q.name == "at_100m" for q in found)
