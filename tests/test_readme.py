"""What the README says is so: its numbers, its commands, its files."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from linvit.model import registry

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def load_script(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_are_those_of_the_results():
    tables = load_script("make_tables")
    texts = [page.read_text() for page in tables.PAGES]
    assert re.findall(r"<!-- begin (\w+) -->", "".join(texts)) == list(tables.TABLES)
    assert [tables.fill(text) for text in texts] == texts


def test_the_plots_are_those_of_the_results():
    tables = load_script("make_tables")
    assert all(tables.is_plot_of(plot, results) for plot, (results, _) in tables.PLOTS.items())


def measured(model, mode, size, seconds, *, baseline="vit", **others):
    patches = (size // 16) ** 2
    return {
        "model": model,
        "mode": mode,
        "image_size": size,
        "patches": patches,
        "baseline": baseline,
        "seconds": seconds,
        "status": "ok",
        "n": 3,
        "ratio": 4 / seconds,
        "ratio_spread": [3 / seconds, 5 / seconds],
        "tokens_per_second": patches / seconds,
        "step_bytes": None,
        "process_bytes": 3 * 2**30,
        "batch_size": 1,
        "dtype": "float32",
        "compile": False,
        **others,
    }


@pytest.fixture
def results(tmp_path):
    """The script, reading a results file of a few made-up rows."""
    tables = load_script("make_tables")
    rows = [
        measured("vit", "forward", 512, 4.0),
        measured("ours:k=64", "forward", 512, 2.0),
        measured("vit", "train", 1024, 4.0, step_bytes=2**31),
        measured("ours", "train", 1024, 2.0, step_bytes=2**30),
        measured("ours:grad_checkpointing=mlp", "train", 1024, 2.5, step_bytes=2**29),
        measured("ours", "forward", 1024, 1.0, n=1),
        measured("ours", "forward", 4096, 17.6, baseline=None, process_bytes=2**31),
    ]
    found = {
        "rows": rows,
        "dtype": ["float32"],
        "n": [1, 3],
        "hardware": "2 cores",
        "command": "linvit bench --preset readme",
    }
    tables.RESULTS = tmp_path
    tables.BENCH = tmp_path / "bench_readme_cpu.json"
    tables.BENCH.write_text(json.dumps(found))
    return tables


def test_the_bench_table_says_what_was_measured(results):
    assert results.bench().splitlines() == [
        "| | | 1,024 patches (512 px) | 4,096 patches (1024 px) |",
        "|---|---|---|---|",
        "| `vit` | forward | 4 s |  |",
        "|  | train |  | 4 s |",
        "| `ours:k=64` | forward | 2.00 × (1.50–2.50) |  |",
        "| `ours` | forward |  | 4.00 × |",
        "|  | train |  | 2.00 × (1.50–2.50) |",
        "",
        "| a training step at 1024 px | adds | of timm's | time | process at its peak |",
        "|---|---|---|---|---|",
        "| `vit` | 2.00 GiB | 1.00 × | 4 s | 3.00 GiB |",
        "| `ours` | 1.00 GiB | 0.50 × | 2 s | 3.00 GiB |",
        "| `ours:grad_checkpointing=mlp` | 0.50 GiB | 0.25 × | 2.5 s (1.25 × without) | 3.00 GiB |",
        "",
        "At 4096 px, 65,536 patches, `ours` takes 17.6 s forward, 1.10 × the seconds per patch of 1024 px, in a "
        "process of 2.0 GiB. float32, batch 1, 2 cores; times faster are medians (and ranges) of 1 to 3 rounds, memory "
        "beyond what was held before the step. `linvit bench --preset readme`.",
    ]


def test_a_plot_of_other_results_is_noticed(results, tmp_path):
    plot = tmp_path / "bench.png"
    assert not results.is_plot_of(plot, [results.BENCH])
    results.draw(plot, [results.BENCH], results.draw_bench)
    assert results.is_plot_of(plot, [results.BENCH])
    results.BENCH.write_text(results.BENCH.read_text() + "\n")
    assert not results.is_plot_of(plot, [results.BENCH])


def test_it_is_short():
    assert len(README.splitlines()) < 120


def test_links_exist():
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_model_names_are_registered():
    for name in set(re.findall(r"linvit_(?:tiny|small|base|large|mini)_patch\d+_\d+", README)):
        assert name in registry.default_cfgs
