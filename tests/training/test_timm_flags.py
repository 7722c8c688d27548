"""timm's command lines and args.yaml: supported options, refused ones with the reason, and docs/flags.md."""

from pathlib import Path

import pytest
import yaml
from timm_options import TIMM_OPTIONS
from tiny_runs import make_images, read_summary

import train_imagenet
from linvit.settings.flags import UsageError, flag_of
from linvit.training.config import TrainConfig, parse
from linvit.training.timm_flags import UNSUPPORTED

FLAGS_PAGE = Path(__file__).parents[2] / "docs" / "flags.md"
FIELDS = TrainConfig.model_fields


def write(folder, settings):
    path = folder / "args.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def refusal(argv):
    with pytest.raises(UsageError) as error:
        parse(argv)
    return str(error.value)


# The field of linvit for each flag of timm.
TIMM_FIELDS = {flag: {"dr": "decay_rate"}.get(name := flag[2:].replace("-", "_"), name) for flag in TIMM_OPTIONS}


def test_every_option_of_timm_is_supported_or_refused_with_a_reason():
    supported = {name for name in TIMM_FIELDS.values() if name in FIELDS}
    assert supported | set(UNSUPPORTED) == set(TIMM_FIELDS.values())
    assert not supported & set(UNSUPPORTED)
    for flag, name in TIMM_FIELDS.items():
        if name in UNSUPPORTED:
            assert UNSUPPORTED[name].default == TIMM_OPTIONS[flag], flag
            expected = f"linvit does not support timm's option {flag}: {UNSUPPORTED[name].reason}"
            assert refusal(["D", flag, "1"]) == expected


def table(title):
    section = FLAGS_PAGE.read_text(encoding="utf-8").split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in section.splitlines() if line]
    return {row[0]: row[1:] for row in rows[2:]}


def test_the_tables_of_the_flags_page_are_true():
    reasons = {flag: UNSUPPORTED[name].reason for flag, name in TIMM_FIELDS.items() if name in UNSUPPORTED}
    assert {flag: row[0] for flag, row in table("Not supported").items()} == reasons

    assert set(table("Only here")) == {flag_of(name) for name in set(FIELDS) - set(TIMM_FIELDS.values())}

    others = {}
    for flag, name in TIMM_FIELDS.items():
        if name in FIELDS:
            ours = FIELDS[name].get_default(call_default_factory=True)
            ours = ours[0] if isinstance(ours, tuple) and len(ours) == 1 else ours
            ours = list(ours) if isinstance(ours, tuple) else ours
            timms = TIMM_OPTIONS[flag] if TIMM_OPTIONS[flag] != "" else None
            if ours != timms:
                others[flag] = ["none" if value is None else str(value) for value in (timms, ours)]
    assert {flag: row[:2] for flag, row in table("Other defaults").items()} == others


# The published recipe of DeiT-S (Touvron et al. 2021, Table 9, and the defaults of its main.py) on four GPUs, in timm's
# names; everything else is timm's default.
DEIT_SMALL = {
    "data": "/imagenet",
    "model": "deit_small_patch16_224",
    "batch_size": 256,
    "epochs": 300,
    "opt": "adamw",
    "opt_eps": 1e-8,
    "momentum": 0.9,
    "lr": 1e-3,
    "weight_decay": 0.05,
    "sched": "cosine",
    "warmup_lr": 1e-6,
    "warmup_epochs": 5,
    "min_lr": 1e-5,
    "cooldown_epochs": 10,
    "decay_epochs": 30.0,
    "dr": 0.1,
    "drop": 0.0,
    "drop_path": 0.1,
    "color_jitter": 0.3,
    "aa": "rand-m9-mstd0.5-inc1",
    "smoothing": 0.1,
    "train_interpolation": "bicubic",
    "aug_repeats": 3.0,
    "reprob": 0.25,
    "remode": "pixel",
    "recount": 1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixup_prob": 1.0,
    "mixup_switch_prob": 0.5,
    "mixup_mode": "batch",
    "model_ema": True,
    "model_ema_decay": 0.99996,
    "amp": True,
    "workers": 10,
    "pin_mem": True,
    "seed": 0,
}
DEIT_SMALL_COMMAND = """
/imagenet --model deit_small_patch16_224 -b 256 --epochs 300 --opt adamw --opt-eps 1e-8 --momentum 0.9 --lr 1e-3
--weight-decay 0.05 --sched cosine --warmup-lr 1e-6 --warmup-epochs 5 --min-lr 1e-5 --cooldown-epochs 10
--decay-epochs 30 --dr 0.1 --drop 0.0 --drop-path 0.1 --color-jitter 0.3 --aa rand-m9-mstd0.5-inc1 --smoothing 0.1
--train-interpolation bicubic --aug-repeats 3 --reprob 0.25 --remode pixel --recount 1 --mixup 0.8 --cutmix 1.0
--mixup-prob 1.0 --mixup-switch-prob 0.5 --mixup-mode batch --model-ema --model-ema-decay 0.99996 --amp -j 10 --pin-mem
--seed 0
"""


def timm_args(**settings):
    """What timm's train.py writes as args.yaml: every option, by its name in Python."""
    settings = {TIMM_FIELDS.get(f"--{name}", name): value for name, value in settings.items()}
    return {name: TIMM_OPTIONS[flag] for flag, name in TIMM_FIELDS.items()} | {"data": None} | settings


def test_an_args_yaml_of_timm_is_accepted(tmp_path):
    config = TrainConfig.load(write(tmp_path, timm_args(**DEIT_SMALL)))
    for name, value in DEIT_SMALL.items():
        if name not in ("data", "color_jitter"):
            assert getattr(config, TIMM_FIELDS.get(f"--{name}", name)) == value, name
    assert (config.data_dir, config.color_jitter) == (Path("/imagenet"), (0.3,))
    # timm writes an empty string for an option that is not set.
    assert (config.resume, config.experiment, config.class_map, config.output) == (None, None, None, Path("output"))
    assert config.amp_dtype == "float16"


def test_an_args_yaml_of_timm_is_refused_with_the_reason_for_each_unsupported_option(tmp_path):
    others = {"resplit": True, "sync_bn": True, "kd_token_distill_type": "hard"}
    with pytest.raises(UsageError) as error:
        TrainConfig.load(write(tmp_path, timm_args(**DEIT_SMALL, **others)))
    for name in others:
        assert f"{name} ({UNSUPPORTED[name].reason})" in str(error.value)
    assert "tta" not in str(error.value)


# The args.yaml that timm 0.4.12 (2021) writes: the options that have gone since, with their defaults then.
OF_2021 = {
    "apex_amp": False,
    "native_amp": False,
    "bn_tf": False,
    "jsd": False,
    "num_gpu": 1,
    "validation_batch_size_multiplier": 1,
    "dist_bn": "broadcast",
    "split_bn": False,
    "start_epoch": None,
    "drop_connect": None,
    "epoch_repeats": 0.0,
    "no_prefetcher": False,
    "remode": "const",
    "train_interpolation": "random",
    "output": "",
    "experiment": "",
}


def test_an_args_yaml_of_2021_is_accepted(tmp_path):
    settings = {name: value for name, value in timm_args().items() if name not in ("kd_loss_type", "model_dtype")}
    settings |= {"data_dir": "/imagenet", "data": None} | OF_2021
    config = TrainConfig.load(write(tmp_path, settings))
    assert (config.remode, config.data_dir, config.output) == ("const", Path("/imagenet"), Path("output"))
    # Without a value nothing is requested, whatever timm's default.
    TrainConfig.load(write(tmp_path, settings | {"dist_bn": "", "patience_epochs": 0, "naflex_max_seq_len": None}))


def test_all_refusals_come_at_once(tmp_path):
    with pytest.raises(UsageError) as error:
        TrainConfig.load(write(tmp_path, OF_2021 | {"apex_amp": True, "split_bn": True, "epoch": 3, "modell": "a"}))
    for words in ("apex_amp (use --amp", "split_bn (", "unknown option 'epoch'", "unknown option 'modell'"):
        assert words in str(error.value)
    with pytest.raises(UsageError) as error:
        TrainConfig.load(write(tmp_path, {"sched": "plateau", "lr": "high", "epochs": 0, "k": "x"}))
    for name in ("sched takes", "lr takes", "epochs takes", "k takes"):
        assert str(error.value).count(name) == 1
    assert str(error.value).count("args.yaml: ") == 1
    found = refusal(["D", "--native-amp", "--tta", "3", "--modle", "x"])
    for words in ("--native-amp: use --amp", "--tta: each image", "unknown option '--modle'"):
        assert words in found


def test_a_command_line_of_timm_is_accepted(tmp_path):
    from_yaml = TrainConfig.load(write(tmp_path, timm_args(**DEIT_SMALL)))
    from_flags = parse(DEIT_SMALL_COMMAND.split())
    # Other options have the default of each program.
    same = {TIMM_FIELDS.get(f"--{name}", name) for name in DEIT_SMALL} - {"data"}
    assert from_flags.model_dump(include=same) == from_yaml.model_dump(include=same)
    assert from_flags.data_dir == from_yaml.data_dir


def test_the_recipe_of_deit_trains(tmp_path):
    data = make_images(tmp_path / "data", train=16)
    path = write(tmp_path, timm_args(**DEIT_SMALL, device="cpu"))
    # As published, except for what would take too long in a test.
    tiny = "--epochs 2 --warmup-epochs 1 --cooldown-epochs 0 -b 16 -j 0 --img-size 32 --no-amp --no-pin-mem"
    size = "embed_dim=32 depth=2 num_heads=2"
    argv = f"{data} -c {path} {tiny} --model-kwargs {size} --output {tmp_path} --experiment run"
    assert train_imagenet.main(argv.split()) == 0
    assert len(read_summary(tmp_path / "run")) == 2


def test_the_short_forms_of_timm():
    config = parse(["D", "-b", "12", "-vb", "24", "-j", "1", "--dr", "0.5", "--torchcompile"])
    assert (config.batch_size, config.validation_batch_size, config.workers) == (12, 24, 1)
    assert (config.decay_rate, config.torchcompile) == (0.5, "inductor")
    assert parse(["D", "--torchcompile", "eager"]).torchcompile == "eager"
