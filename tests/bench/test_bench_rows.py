"""The arithmetic of a row, and its CSV."""

import csv
import io

import pytest
from bench_groups import OURS, TIMM, group

from linvit.bench.plan import Facts
from linvit.bench.rows import make_row, to_csv
from linvit.measure.memory import StepMemory

FACTS = Facts(patches=64, k=(4, 16), kind="separable", share="kv", num_parameters=1000, num_projection_parameters=10)


def row(model=OURS, *, own=(1.0, 2.0, 4.0), base=(4.0, 4.0, 6.0), measured=None, **others):
    return make_row(
        model,
        measured or group(batch_size=2),
        FACTS,
        **{
            "flops": 10**9,
            "seconds": own,
            "baseline_seconds": base,
            "is_out_of_memory": False,
            "gemm_flops_per_second": 2e9,
            "memory": StepMemory(100, 300),
            **others,
        },
    )


def test_ratios_are_taken_round_by_round():
    found = row()
    assert (found.seconds, found.spread, found.n) == (2.0, (1.0, 4.0), 3)
    # 4/1, 4/2 and 6/4. The ratio of the medians is 2 too, so the next row distinguishes the two.
    assert (found.ratio, found.ratio_spread) == (2.0, (1.5, 4.0))
    assert row(own=(1.0, 2.0, 3.0), base=(9.0, 2.0, 3.0)).ratio == 1.0
    assert found.baseline == TIMM
    assert (found.images_per_second, found.tokens_per_second) == (1.0, 64.0)
    assert found.peak_share == 0.25
    assert (found.step_bytes, found.process_bytes) == (100, 300)
    assert found.all_seconds == [1.0, 2.0, 4.0]


def test_an_interrupted_round_is_not_compared():
    assert row(own=(1.0,), base=(3.0, 5.0)).ratio == 3.0


def test_out_of_memory_keeps_only_the_seconds_measured_before():
    found = row(is_out_of_memory=True, own=(1.0,), memory=None)
    assert found.status == "out of memory"
    assert (found.seconds, found.ratio, found.peak_share, found.step_bytes) == (None, None, None, None)
    assert found.all_seconds == [1.0]


def test_a_model_alone_has_no_baseline():
    found = row(measured=group(models=(OURS,)), base=(1.0, 2.0, 4.0))
    assert (found.baseline, found.ratio, found.ratio_spread) == (None, None, None)
    assert found.seconds == 2.0


@pytest.mark.parametrize(("size", "written"), [((32, 32), 32), ((32, 64), (32, 64))])
def test_square_sizes_are_one_number(size, written):
    assert row(measured=group(img_size=size)).image_size == written


def test_csv_has_a_line_per_row():
    lines = list(csv.DictReader(io.StringIO(to_csv([row(), row(TIMM, is_out_of_memory=True)]))))
    assert [line["model"] for line in lines] == [OURS, TIMM]
    assert (lines[0]["k"], lines[0]["ratio_spread"], lines[0]["all_seconds"]) == ("4 16", "1.5 4.0", "1.0 2.0 4.0")
    assert (lines[1]["status"], lines[1]["seconds"]) == ("out of memory", "")
