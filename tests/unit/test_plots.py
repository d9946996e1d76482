"""The pictures of training curves: what the drawn figure says, read from matplotlib's objects, and
the files.
"""

import numpy as np
import pytest
from matplotlib.collections import PolyCollection
from matplotlib.colors import same_color, to_rgba
from PIL import Image

from megatron_tst.cli import plot
from megatron_tst.planning import plots
from megatron_tst.planning.runs import Run

TST = Run(
    train={1: 7.0, 2: 6.5, 3: 6.25, 4: 5.0, 5: 4.5, 8: 4.25},
    excess={1: 6.0, 3: 5.25},
    validation={2: 9.0, 5: 4.0, 8: 3.5},
    boundary=3,
)
BASE = Run(train={1: 6.0, 4: 5.5, 8: 5.0}, validation={2: 6.0, 8: 4.5}, nan={9})


@pytest.fixture
def drawn(monkeypatch, tmp_path):
    """Draws; -> the panels of what would be written."""
    saved = []
    monkeypatch.setattr(plots, "save", lambda *call: saved.append(call))

    def draw(how, what, title="a title"):
        how(what, tmp_path / "x.png", title, ["source"])
        (figure, output, sources) = saved.pop()
        assert (output, sources) == (tmp_path / "x.png", ["source"])
        assert figure.get_suptitle() == title.replace("$", r"\$")
        assert tuple(figure.get_size_inches()) == (5 * len(figure.axes), 4)
        return figure.axes

    return draw


def curves(panel):
    """label -> (line, x, y), the marks of iterations left out"""
    lines = [line for line in panel.lines if not line.get_label().startswith("_")]
    return {
        line.get_label(): (line, list(line.get_xdata()), list(line.get_ydata())) for line in lines
    }


def marks(panel):
    """(text, x, its colour) of each line over the whole height; the text stands at its top."""
    lines = [line for line in panel.lines if line.get_label().startswith("_")]
    assert len(lines) == len(panel.texts)
    for line, text in zip(lines, panel.texts):
        x, y = text.get_position()
        assert line.get_xdata() == [x, x] and line.get_ydata() == [0, 1]
        high = panel.transAxes.inverted().transform(text.get_transform().transform((x, y)))[1]
        assert high == pytest.approx(1) and text.get_verticalalignment() == "top"
        assert same_color(line.get_color(), text.get_color())
        yield text.get_text().strip(), x, line.get_color()


def described(panel, x, y, title):
    assert (panel.get_xlabel(), panel.get_ylabel(), panel.get_title()) == (x, y, title)
    assert [text.get_text() for text in panel.get_legend().get_texts()] == list(curves(panel))
    assert all(line.get_visible() for line in panel.get_xgridlines() + panel.get_ygridlines())
    assert panel.get_xscale() == panel.get_yscale() == "linear"


def test_losses_over_iterations(drawn):
    left, right = drawn(plots.plot, {"base": BASE, "TST $s$": TST})
    described(left, "iteration (equal FLOPs)", "nats per position", "training loss")
    described(right, "iteration (equal FLOPs)", "nats per position", "validation loss, next token")
    found = curves(left)
    assert {label: tuple(of) for label, (_, *of) in found.items()} == {
        "base: next token": ([1, 4, 8], [6.0, 5.5, 5.0]),
        r"TST \$s\$: superposition (mce)": ([1, 2, 3], [7.0, 6.5, 6.25]),
        r"TST \$s\$: mce minus bag entropy": ([1, 3], [6.0, 5.25]),
        r"TST \$s\$: next token": ([4, 5, 8], [5.0, 4.5, 4.25]),
    }
    base, *tst = (line for line, _, _ in found.values())
    assert [line.get_linestyle() for line in (base, *tst)] == ["-", "--", ":", "-"]
    validation = curves(right)
    assert {label: tuple(of) for label, (_, *of) in validation.items()} == {
        "base": ([2, 8], [6.0, 4.5]),
        r"TST \$s\$": ([2, 5, 8], [9.0, 4.0, 3.5]),
    }
    # a run has one colour in both panels, and another one than the other run
    first, second = (line.get_color() for line, _, _ in validation.values())
    assert all(line.get_marker() == "." for line, _, _ in validation.values())
    assert base.get_color() == first != second
    assert [line.get_color() for line in tst] == [second] * 3
    for panel in (left, right):
        assert list(marks(panel)) == [("NaN", 9, first), ("boundary", 3, second)]
    # the end is to be seen, where the lowest last loss is 3.5, not the start
    assert right.get_ylim() == pytest.approx((3.4, 5.7))
    low, high = left.get_ylim()
    assert low < 4.25 and high > 7


@pytest.mark.parametrize(
    "run, labels",
    [
        (Run(train={1: 5.0, 2: 4.0}), {"a: next token": [1, 2]}),
        (Run(train={1: 5.0}, boundary=2), {"a: superposition (mce)": [1]}),
        (Run(train={3: 5.0}, boundary=2), {"a: next token": [3]}),
    ],
    ids=["a baseline", "before the boundary", "after it"],
)
def test_a_phase_without_losses_is_not_in_the_legend(drawn, run, labels):
    left, right = drawn(plots.plot, {"a": run})
    assert {label: x for label, (_, x, _) in curves(left).items()} == labels
    assert [text for text, _, _ in marks(left)] == ["boundary"] * (run.boundary is not None)
    assert curves(right)["a"][1:] == ([], [])  # it has no evaluation


ARGUMENTS = {"global_batch_size": "4", "seq_length": "8", "hidden_size": "16"}
MORE = {"arguments": ARGUMENTS, "parameters": 1000}
FLOPS = 6 * 1000 * 32  # of a step: the tied table multiplies too


def seed(first, last, seconds, **more):
    """Half the seconds and a third of the tokens by iteration 10."""
    return Run(
        train={20: last},
        validation={10: first, 20: last},
        raw_tokens={10: 320, 20: 960},
        seconds={10: seconds / 2, 20: seconds},
        **MORE,
        **more,
    )


def test_losses_against_all_axes(drawn):
    """Two seeds are their mean and a band between them, at the iterations that both have."""
    tst = [seed(5.0, 4.0, 8.0, boundary=10), seed(6.0, 4.5, 12.0, boundary=20)]
    tst[1].validation |= {15: 1.0}
    panels = drawn(plots.plot_axes, {"base$": [seed(7.0, 5.0, 6.0)], "TST": tst})
    expected = {
        "steps": ("iteration", [10, 20], [10, 20], 15),
        "FLOPs": ("FLOPs (6 N D)", [10 * FLOPS, 20 * FLOPS], [10 * FLOPS, 20 * FLOPS], 15 * FLOPS),
        "raw tokens": ("raw tokens read", [320, 960], [320, 960], 640),
        "seconds": ("seconds of training", [3.0, 6.0], [5.0, 10.0], (4.0 + 12.0) / 2),
    }
    assert len(panels) == 4
    for panel, (axis, (name, base_at, tst_at, boundary)) in zip(panels, expected.items()):
        described(panel, name, "next-token validation loss, nats", axis)
        found = curves(panel)
        assert {label: tuple(of) for label, (_, *of) in found.items()} == {
            r"base\$ (n = 1)": (base_at, [7.0, 5.0]),
            "TST (n = 2)": (tst_at, [5.5, 4.25]),
        }
        base, line = (line for line, _, _ in found.values())
        assert base.get_marker() == line.get_marker() == "."
        assert base.get_color() != line.get_color()
        assert list(marks(panel)) == [("boundary", boundary, line.get_color())]
        _, band = [it for it in panel.collections if isinstance(it, PolyCollection)]
        corners = {tuple(corner) for corner in band.get_paths()[0].vertices}
        low, high = zip(tst_at, (5.0, 4.0)), zip(tst_at, (6.0, 4.5))
        assert corners == {*low, *high}
        (colour,) = band.get_facecolor()
        assert tuple(colour[:3]) == to_rgba(line.get_color())[:3] and 0 < colour[3] < 1
        assert panel.get_ylim() == pytest.approx((3.9, 6.2))  # of all runs, not of means


@pytest.mark.parametrize(
    "without, axes",
    [
        ({}, ["steps", "FLOPs", "raw tokens", "seconds"]),
        ({"seconds": {}}, ["steps", "FLOPs", "raw tokens"]),
        ({"parameters": None, "raw_tokens": {}}, ["steps", "seconds"]),
        ({"parameters": None, "raw_tokens": {}, "seconds": {}}, ["steps"]),
    ],
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_an_axis_that_one_run_does_not_know_is_left_out(drawn, without, axes, place):
    runs = [seed(5.0, 4.0, 8.0) for _ in range(3)]
    for name, value in without.items():
        setattr(runs[place], name, value)
    panels = drawn(plots.plot_axes, {"a": runs[:1], "b": runs[1:]}, "")
    assert [panel.get_title() for panel in panels] == axes
    assert not any(list(marks(panel)) for panel in panels)  # no run has a boundary


# ---- the file


@pytest.fixture
def figure():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2, 1))
    figure.text(0, 0, "x")
    return figure


def test_the_files(tmp_path, figure):
    """Both say who drew them; a PNG has 130 dots an inch."""
    plots.save(figure, tmp_path / "x.svg")
    assert b"<dc:title>megatron-tst</dc:title>" in (tmp_path / "x.svg").read_bytes()
    plots.save(figure, tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.format == "PNG" and picture.size == (260, 130)
        assert picture.info["Creator"] == "megatron-tst"
        assert np.asarray(picture.convert("L")).min() < 128  # something is drawn
    assert {file.name for file in tmp_path.iterdir()} == {"x.svg", "x.png"}


@pytest.mark.parametrize("ending", ["png", "svg"])
@pytest.mark.filterwarnings("ignore:megatron_tst. .* held what this tool did not")
def test_a_picture_is_replaced_and_what_is_none_of_ours_is_moved_aside(tmp_path, figure, ending):
    output = tmp_path / f"x.{ending}"
    plots.save(figure, output)
    plots.save(figure, output)
    assert [file.name for file in tmp_path.iterdir()] == [output.name]
    figure.savefig(output)
    other = output.read_bytes()
    plots.save(figure, output)
    assert (tmp_path / f"{output.name}.old-1").read_bytes() == other != output.read_bytes()


def test_panels_do_not_lie_over_each_other(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plots, "save", lambda figure, *_: figures.append(figure))
    plots.plot({"base": BASE, "TST": TST}, tmp_path / "x.png", "a title")
    (figure,) = figures
    figure.draw_without_rendering()
    left, right = (axis.get_tightbbox() for axis in figure.axes)
    width, height = figure.get_size_inches() * figure.dpi
    title = figure.texts[0].get_window_extent()
    assert 0 <= left.x0 < left.x1 <= right.x0 < right.x1 <= width
    assert min(axis.get_position().height for axis in figure.axes) > 0.6  # of the figure's
    assert 0 <= left.y0 and max(left.y1, right.y1) <= title.y0 < title.y1 <= height


LOG = """\
  global_batch_size ............................... 4
  seq_length ...................................... 8
 [2026-01-01] iteration       10/      20 | elapsed time per iteration (ms): 100.0 | \
lm loss: 4.5E+00 | x
 [tst] boundary after iteration 5: superposition is done (320 raw tokens), recovery begins
 validation loss at iteration 10 | lm loss value: 4.0E+00 | x
"""


@pytest.mark.parametrize("suffix", [".png", ".svg"])
@pytest.mark.parametrize("axes", [False, True])
def test_the_verb_draws_what_the_logs_say(tmp_path, capsys, monkeypatch, suffix, axes):
    """A name that holds "=" and dollars, and a path that holds "="."""
    for name in ("one", "with=sign"):
        (tmp_path / name).write_text(LOG)
    saved = []
    monkeypatch.setattr(plots, "save", lambda *call: saved.append(call))
    paths = [tmp_path / "one", tmp_path / "with=sign"]
    runs = [f"b={paths[0]}", rf"$\frac$=.5={paths[1]}"]
    call = ["--output", str(tmp_path / f"x{suffix}"), "--title", "T$", *runs]
    assert plot.main([*call, *["--axes"] * axes]) == 0
    ((figure, output, sources),) = saved
    assert output == tmp_path / f"x{suffix}" and sources == paths
    assert figure.get_suptitle() == r"T\$" and len(figure.axes) == (3 if axes else 2)
    assert list(curves(figure.axes[-1])) == (
        ["b (n = 1)", r"\$\frac\$=.5 (n = 1)"] if axes else ["b", r"\$\frac\$=.5"]
    )
    assert (r"$\frac$=.5 against b, equal" in capsys.readouterr().out) == axes
    if not axes:
        monkeypatch.undo()
        assert plot.main(call) == 0 and output.read_bytes()[:5] in (b"\x89PNG\r", b"<?xml")


def test_the_verb_refuses_other_formats(tmp_path, capsys):
    (tmp_path / "log").write_text(LOG)
    assert plot.main(["--output", str(tmp_path / "x.pdf"), f"b={tmp_path / 'log'}"]) == 2
    assert "--output: expected a name that ends in .png or .svg" in capsys.readouterr().err
