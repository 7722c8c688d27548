"""The plot shows every series, and nothing that was not measured; tables fit the page."""

import numpy as np
from bench_groups import OURS, TIMM, group
from PIL import Image
from rich.console import Console

from linvit.bench.output import DIGEST_KEY, PAPER_LABEL, draw, save_plot, show_models, show_rows
from linvit.bench.plan import Plan, make_row
from linvit.measure.memory import StepMemory


def row(model, mode, patches, seconds, **others):
    return {
        "model": model,
        "baseline": "timm",
        "mode": mode,
        "patches": patches,
        "seconds": seconds,
        "step_bytes": None,
        "batch_size": 1,
        "dtype": "float32",
        "compile": False,
        **others,
    }


ROWS = [
    row("timm", "forward", 4096, 6.4),
    row("timm", "forward", 1024, 1.6),
    row("ours", "forward", 1024, 1.0),
    row("ours", "forward", 4096, None),
    row("timm", "train", 1024, 3.2, step_bytes=2.9 * 2**30),
    row("ours", "train", 1024, 2.0, step_bytes=2**30),
    row("ours", "train", 1024, 0.1, dtype="bfloat16"),
]


def series(axes):
    return {
        (line.get_label(), line.get_linestyle()): np.column_stack([line.get_xdata(), line.get_ydata()]).tolist()
        for line in axes.lines
    }


def test_a_line_per_model_and_mode():
    time, memory = draw(ROWS).axes
    found = series(time)
    # The paper's Linformer is 1.6 times faster at 1,024 and 3.2 times at 4,096.
    assert found.pop((PAPER_LABEL, "None")) == [[1024, 1.0], [4096, 2.0]]
    assert found == {
        ("timm", "-"): [[1024, 1.6], [4096, 6.4]],
        ("ours", "-"): [[1024, 1.0]],
        ("timm", "--"): [[1024, 3.2]],
        ("ours", "--"): [[1024, 2.0]],
    }
    assert series(memory) == {
        ("timm", "--"): [[1024, 2.9]],
        ("ours", "--"): [[1024, 1.0]],
        (PAPER_LABEL, "None"): [[1024, 1.0]],
    }
    for axes, unit in ((time, "seconds"), (memory, "GiB")):
        assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("patches N", unit)


def test_different_batch_sizes_are_drawn_per_image():
    rows = [
        row("timm", "forward", 1024, 3.2, batch_size=4),
        row("timm", "forward", 4096, 6.4),
        row("timm", "forward", 4096, 12.8, batch_size=2),
        row("timm", "train", 1024, 4.0, batch_size=4, step_bytes=2**30),
    ]
    time, memory = draw(rows).axes
    assert series(time)["timm", "-"] == [[1024, 0.8], [4096, 6.4]]
    assert series(time)["timm", "--"] == [[1024, 1.0]]
    assert series(memory)["timm", "--"] == [[1024, 0.25]]
    assert time.get_title() == "time per image, batches of 1 to 4, float32"
    assert memory.get_title() == "training memory per image, batches of 1 to 4, float32"


def test_models_differ_in_colour_and_marker():
    many = [row(f"model {index}", "forward", 1024, 1.0) for index in range(20)]
    looks = [(line.get_color(), line.get_marker()) for line in draw(many).axes[0].lines]
    assert len(set(looks)) == 20


def test_the_legend_names_all_and_covers_nothing():
    figure = draw(ROWS)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["timm", "ours", "forward", "train", PAPER_LABEL]
    assert not any(legend.get_window_extent().overlaps(axes.get_tightbbox()) for axes in figure.axes)


def test_a_panel_without_values_says_so():
    _, memory = draw([row("timm", "forward", 1024, 1.6)]).axes
    assert [text.get_text() for text in memory.texts] == ["not measured"]


def test_the_plot_carries_the_digest(tmp_path):
    path = tmp_path / "plot.png"
    save_plot({"rows": ROWS}, path, digest="0123abcd")
    with Image.open(path) as image:
        assert image.format == "PNG"
        assert image.info[DIGEST_KEY] == "0123abcd"


def test_tables_show_models_and_measurements_in_100_columns(capsys):
    measured = group(models=(TIMM, f"{OURS},projection=linear,share=headwise"), batch_size=2)
    plan = Plan([measured])
    rows = [
        make_row(
            model,
            measured,
            plan.facts[model, measured.img_size],
            flops=plan.flops(model, measured),
            seconds=[0.5, 1.0, 2.0],
            baseline_seconds=[1.0, 1.0, 1.0],
            is_out_of_memory=model == TIMM,
            gemm_flops_per_second=1e9,
            memory=None if model == TIMM else StepMemory(3 * 2**29, 2**31),
        )
        for model in measured.models
    ]
    console = Console(width=100, highlight=False)
    show_models(console, plan)
    show_rows(console, measured.title, rows)
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "full attention" in out
    assert "headwise" in out
    assert "out of memory" in out
    for cell in ("1.00 (0.50–2.00)", "128", "1.50 GiB"):
        assert cell in out
