"""TrainConfig: filled from YAML and flags, refusing mistakes by name, and complete in args.yaml."""

import random
import re
from string import ascii_lowercase

import pytest
import yaml
from pydantic import ValidationError

from linvit.settings.flags import UsageError, flag_of, read_flags
from linvit.training.config import TrainConfig, parse, training_parser
from linvit.training.timm_flags import UNSUPPORTED

FIELDS = TrainConfig.model_fields

# A value for every option that is not its default. Options that exclude others are in EXCLUSIVE.
EVERYTHING = {
    "data_dir": "images",
    "train_split": "training",
    "val_split": "test",
    "class_map": "classes.txt",
    "model": "linvit_tiny_patch16_224",
    "k": [16, 32, None],
    "projection": "avgpool",
    "share": "none",
    "projection_init": "jl",
    "local": 3,
    "stem": "conv",
    "model_kwargs": {"class_token": False, "init_values": 1e-5, "pos_embed": "none", "depth": 3},
    "num_classes": 7,
    "gp": "avg",
    "pretrained": True,
    "pretrained_path": "weights.safetensors",
    "head_init_scale": 0.01,
    "head_init_bias": -6.5,
    "freeze": ["patch_embed", "blocks.[0-5].*"],
    "drop": 0.1,
    "drop_path": 0.2,
    "patch_drop": 0.25,
    "img_size": [192, 256],
    "in_chans": 3,
    "crop_pct": 0.95,
    "crop_mode": "squash",
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.3, 0.25],
    "interpolation": "bilinear",
    "input_range": [0, 4095],
    "batch_size": 48,
    "validation_batch_size": 96,
    "workers": 2,
    "pin_mem": True,
    "aug_repeats": 3.0,
    "on_bad_image": "skip",
    "cache": "disk",
    "cache_dir": "fast/disk",
    "cache_size": 512,
    "device": "cpu",
    "amp": True,
    "amp_dtype": "float16",
    "channels_last": True,
    "grad_checkpointing": "mlp",
    "torchcompile": "inductor",
    "torchcompile_mode": "max-autotune",
    "opt": "lamb",
    "opt_eps": 1e-6,
    "opt_betas": [0.9, 0.95],
    "momentum": 0.8,
    "weight_decay": 0.1,
    "opt_kwargs": {"foreach": False},
    "grad_accum_steps": 2,
    "clip_grad": 1.0,
    "clip_mode": "agc",
    "max_bad_steps": 3,
    "layer_decay": 0.75,
    "layer_decay_min_scale": 0.1,
    "layer_decay_no_opt_scale": 0.05,
    "sched": "wsd",
    "sched_on_updates": True,
    "epochs": 30,
    "stop_epoch": 20,
    "lr": 1e-3,
    "lr_base": 0.01,
    "lr_base_size": 512,
    "lr_base_scale": "linear",
    "warmup_epochs": 3,
    "warmup_lr": 1e-6,
    "warmup_prefix": True,
    "min_lr": 1e-5,
    "cooldown_epochs": 2,
    "decay_epochs": 0.3,
    "decay_milestones": [10, 20],
    "decay_rate": 0.2,
    "lr_noise": [0.5, 0.9],
    "lr_noise_pct": 0.5,
    "lr_noise_std": 0.5,
    "lr_cycle_mul": 2.0,
    "lr_cycle_decay": 0.1,
    "lr_cycle_limit": 3,
    "lr_k_decay": 0.5,
    "no_aug": True,
    "train_crop_mode": "rkrc",
    "scale": [0.5, 1.0],
    "ratio": [0.9, 1.1],
    "hflip": 0.25,
    "vflip": 0.5,
    "transpose": 0.5,
    "color_jitter": [0.1, 0.2, 0.3],
    "color_jitter_prob": 0.8,
    "grayscale_prob": 0.1,
    "gaussian_blur_prob": 0.2,
    "aa": "rand-m9-mstd0.5-inc1",
    "train_interpolation": "bicubic",
    "reprob": 0.25,
    "remode": "const",
    "recount": 2,
    "smoothing": 0.0,
    "mixup": 0.8,
    "cutmix": 1.0,
    "cutmix_minmax": [0.2, 0.8],
    "mixup_prob": 0.9,
    "mixup_switch_prob": 0.4,
    "mixup_mode": "pair",
    "mixup_off_epoch": 25,
    "bce_loss": True,
    "bce_sum": True,
    "bce_target_thresh": 0.2,
    "bce_pos_weight": 2.0,
    "kd_model_name": "deit_base_patch16_224",
    "kd_temperature": 2.0,
    "distill_loss_weight": 0.25,
    "task_loss_weight": 0.75,
    "model_ema": True,
    "model_ema_decay": 0.999,
    "model_ema_warmup": True,
    "model_ema_force_cpu": True,
    "output": "runs",
    "experiment": "everything",
    "resume": "auto",
    "no_resume_opt": True,
    "allow_changed_data": True,
    "seed": 1,
    "deterministic": True,
    "dry_run": True,
    "report": False,
    "eval_metric": "loss",
    "val_interval": 2,
    "log_interval": 10,
    "checkpoint_interval": 500,
    "checkpoint_minutes": 15.5,
    "lora": 4,
    "lora_targets": ["qkv", "blocks.[6-9].mlp.*"],
    "checkpoint_hist": 3,
    "save_epochs": [10, 20],
    "early_stop_patience": 5,
    "log_tensorboard": True,
    "log_wandb": True,
    "wandb_project": "vits",
    "wandb_tags": ["small", "first"],
    "wandb_resume_id": "1a2b3c",
}
EXCLUSIVE = {
    "val_fraction": 0.2,
    "initial_checkpoint": "start.pth",
    "aug_file": "pipeline.yaml",
    "sampler": "balanced",
    "class_weights": "weights.yaml",
    "train_img_sizes": [160, 192, 224],
    "kd_model_name": "output/teacher",
    "kd_distill_type": "feature",
    "fsdp": True,
}
# Float16 on the CPU is refused.
EVERYTHING["device"] = "cuda:1"


def write(folder, settings, name="config.yaml"):
    path = folder / name
    path.write_text(settings if isinstance(settings, str) else yaml.safe_dump(settings))
    return path


def refusal(argv):
    with pytest.raises(UsageError) as error:
        parse(argv)
    return str(error.value)


def flags_for(settings):
    """The command line that is equivalent to settings in YAML."""
    argv = []
    for name, value in settings.items():
        if isinstance(value, bool):
            argv.append(flag_of(name) if value else "--no-" + flag_of(name)[2:])
        elif isinstance(value, dict):
            argv += [flag_of(name), *(f"{key}={part}" for key, part in value.items())]
        else:
            parts = value if isinstance(value, list) else [value]
            argv += [flag_of(name), *("none" if part is None else str(part) for part in parts)]
    return argv


def mutations(name, rng):
    """Four typing errors: a missing character, an extra one, a wrong one, and two that are swapped."""
    left_out, replaced = rng.randrange(len(name)), rng.randrange(len(name))
    yield name[:left_out] + name[left_out + 1 :]
    inserted = rng.randrange(len(name) + 1)
    yield name[:inserted] + rng.choice(ascii_lowercase) + name[inserted:]
    others = [letter for letter in ascii_lowercase if letter != name[replaced]]
    yield name[:replaced] + rng.choice(others) + name[replaced + 1 :]
    uneven = [spot for spot in range(len(name) - 1) if name[spot] != name[spot + 1]]
    if uneven:
        swapped = rng.choice(uneven)
        yield name[:swapped] + name[swapped : swapped + 2][::-1] + name[swapped + 2 :]


def test_the_examples_cover_every_option_with_other_values_than_the_defaults():
    assert {*EVERYTHING, *EXCLUSIVE} == set(FIELDS)
    config = TrainConfig._from_settings(EVERYTHING, {}, None)
    for name in EVERYTHING:
        assert getattr(config, name) != FIELDS[name].get_default(call_default_factory=True), name


@pytest.mark.parametrize("settings", [EVERYTHING, {"data_dir": "images", **EXCLUSIVE}], ids=["everything", "exclusive"])
def test_flags_and_yaml_fill_the_same_fields(tmp_path, settings):
    from_yaml = TrainConfig.load(write(tmp_path, settings))
    assert parse(flags_for(settings)) == from_yaml


@pytest.mark.parametrize("settings", [{"data_dir": "D"}, EVERYTHING, {"data_dir": "D", **EXCLUSIVE}])
def test_args_yaml_is_complete_and_gives_the_same_configuration(tmp_path, settings):
    config = TrainConfig.load(write(tmp_path, settings))
    config.save(tmp_path / "args.yaml")
    assert TrainConfig.load(tmp_path / "args.yaml") == config
    assert parse(["--config", str(tmp_path / "args.yaml")]) == config
    assert set(yaml.safe_load((tmp_path / "args.yaml").read_text())) == set(FIELDS)


def test_flags_override_yaml(tmp_path):
    path = write(tmp_path, {"lr": 0.5, "amp": True, "no_aug": True, "opt_betas": [0.5, 0.5], "clip_grad": 1.0, "k": 4})
    argv = f"-c {path} D --lr 1e-3 --no-amp --aug --opt-betas 0.9 0.95 --clip-grad none --seed 7".split()
    config = parse(argv)
    assert (config.lr, config.amp, config.no_aug, config.opt_betas) == (1e-3, False, False, (0.9, 0.95))
    assert (config.clip_grad, config.seed, config.k) == (None, 7, 4)
    assert parse(["-c", str(path), "D"]).lr == 0.5


def test_every_misspelt_option_is_refused_and_the_right_one_suggested(tmp_path):
    rng = random.Random(0)
    parser = training_parser()
    right, wrong = 0, []
    for name in FIELDS:
        for misspelt in mutations(name, rng):
            if misspelt in FIELDS or misspelt in UNSUPPORTED or not misspelt:
                continue
            with pytest.raises(UsageError) as by_yaml:
                TrainConfig.load(write(tmp_path, {misspelt: 1}))
            refused = [(str(by_yaml.value), name)]
            if flag_of(misspelt) not in parser._option_string_actions:
                with pytest.raises(UsageError) as by_flag:
                    read_flags(parser, TrainConfig, [flag_of(misspelt), "1"], positionals={})
                refused.append((str(by_flag.value), flag_of(name)))
            for message, suggestion in refused:
                assert "unknown option" in message
                if f"did you mean {suggestion!r}?" in message:
                    right += 1
                else:
                    wrong.append(message)
    tried = right + len(wrong)
    print(f"{tried} misspelt options, all refused; {right} ({right / tried:.1%}) with the right suggestion")
    assert tried > 7 * len(FIELDS)
    assert right >= 0.95 * tried, wrong


@pytest.mark.parametrize("name", FIELDS)
def test_a_value_of_the_wrong_type_is_refused_naming_field_and_value(tmp_path, name):
    is_dict = name in ("model_kwargs", "opt_kwargs")
    path = write(tmp_path, {name: 3.25 if is_dict else {"a": 1}})
    with pytest.raises(UsageError) as error:
        TrainConfig.load(path)
    assert re.search(
        rf"config\.yaml: {name} takes .+, not {'3.25' if is_dict else re.escape(repr({'a': 1}))}", str(error.value)
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("epochs: '3'", "epochs takes a whole number of at least 1, not '3'"),
        ("epochs: 3.5", "epochs takes a whole number of at least 1, not 3.5"),
        ("epochs: true", "epochs takes a whole number of at least 1, not true"),
        ("epochs: 0", "epochs takes a whole number of at least 1, not 0"),
        ("amp: 1", "amp takes true or false, not 1"),
        ("lr: .nan", "lr takes a number greater than 0, or none, not nan"),
        ("smoothing: 1.0", "smoothing takes a number of at least 0 and less than 1, not 1.0"),
        ("scale: [0.5]", "scale takes 2 numbers, not [0.5]"),
        (
            "opt_betas: [0.9, x]",
            "opt_betas takes a list of numbers of at least 0 and less than 1, or none, not [0.9, 'x']",
        ),
        ("clip_mode: norms", "clip_mode takes one of 'norm', 'value', 'agc', not 'norms' (did you mean 'norm'?)"),
        ("k: [4, [8, x]]", "k takes a length of at least 1"),
        ("aa: rand-m9-x3", "aa 'rand-m9-x3': cannot read 'x3'"),
        ("color_jitter: [0.1, 0.2]", "color_jitter takes one, three or four numbers, not 2"),
        ("batch-size: 4", "unknown option 'batch-size'; did you mean 'batch_size'?"),
        ("lr: 1\nlr: 2", "line 2: not valid YAML: 'lr' is set twice"),
        ("lr: [", "line 1: not valid YAML"),
        ("- lr", "the file must consist of `name: value` lines"),
        ("3: 4", "the file must consist of `name: value` lines"),
    ],
)
def test_yaml_errors_name_the_file_the_field_and_the_fix(tmp_path, settings, message):
    path = write(tmp_path, settings)
    with pytest.raises(UsageError) as error:
        TrainConfig.load(path)
    assert str(error.value).startswith(f"{path}:")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lr", "abc"], "--lr takes a number greater than 0, or none, not 'abc'"),
        (["--epochs", "3.5"], "--epochs takes a whole number of at least 1, not 3.5"),
        (["--img-size", "1", "2", "3"], "--img-size takes one number or height and width, not 3 numbers"),
        (["--lr"], "argument --lr: expected one argument"),
        (["--model-kwargs", "depth"], "--model-kwargs takes NAME=VALUE pairs, not 'depth'"),
        (["E"], "unexpected argument 'E'"),
        (["--data-dir", "E"], "DATA and --data-dir set the same option: give only one"),
        (["--batch_size", "4"], "unknown option '--batch_size'; did you mean '--batch-size'?"),
        (["-crop-pct", "0.9"], "unknown option '-crop-pct'; did you mean '--crop-pct'?"),
        (["--modle=x"], "unknown option '--modle'; did you mean '--model'?"),
        (["--config", "absent.yaml"], "absent.yaml: file not found"),
        (["--tta", "3"], "linvit does not support timm's option --tta: each image"),
    ],
)
def test_command_line_errors_name_the_flag_and_the_fix(argv, message):
    assert message in refusal(["D", *argv])


def test_the_images_are_required():
    assert "DATA" in refusal(["--lr", "0.1"])
    assert parse(["--data-dir", "D"]) == parse(["D"])


def test_errors_name_the_source_of_a_wrong_value(tmp_path):
    path = write(tmp_path, {"epochs": 2, "warmup_epochs": 5, "lr": "x"})
    assert refusal(["D", "-c", str(path), "--lr", "1"]).startswith(f"{path} and the flags: warmup_epochs 5 is longer")
    assert refusal(["D", "-c", str(path), "--warmup-epochs", "1"]).startswith(f"{path}: lr takes")
    assert refusal(["D", "-c", str(path), "--lr", "-1"]).startswith("--lr takes")


def test_a_configuration_is_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        TrainConfig().lr = 1.0


def test_yaml_has_numbers_with_exponents(tmp_path):
    text = "lr: 1e-3\nmin_lr: 1E-6\nwarmup_lr: 1.5e-6\nweight_decay: 0\nmodel_kwargs: {init_values: 1e-5}"
    config = TrainConfig.load(write(tmp_path, text))
    assert (config.lr, config.min_lr, config.warmup_lr, config.weight_decay) == (1e-3, 1e-6, 1.5e-6, 0.0)
    assert config.model_kwargs == {"init_values": 1e-5}
    # Text stays text on the command line even if it looks like a number.
    assert parse(["D", "--experiment", "007"]).experiment == "007"


def test_projected_lengths(tmp_path):
    assert parse(["D", "--k", "64"]).k == 64
    assert parse(["D", "--k", "32", "32", "64", "none"]).k == (32, 32, 64, None)
    assert TrainConfig.load(write(tmp_path, "k: 64")).k == 64
    assert TrainConfig.load(write(tmp_path, "k: [32, null, none]")).k == (32, None, None)
    assert TrainConfig.load(write(tmp_path, "k: [[4, 8], [8, 16], null]")).k == ((4, 8), (8, 16), None)


def test_model_arguments_include_only_options_that_are_set():
    assert TrainConfig().model_arguments() == {"drop_rate": 0.0}
    config = TrainConfig(k=16, share="none", gp="avg", drop_path=0.0, img_size=64, model_kwargs={"class_token": False})
    assert config.model_arguments() == {
        "k": 16,
        "share": "none",
        "img_size": (64, 64),
        "global_pool": "avg",
        "drop_rate": 0.0,
        "drop_path_rate": 0.0,
        "class_token": False,
    }


def test_model_kwargs_on_the_command_line_are_typed():
    config = parse(["D", "--model-kwargs", "a=1", "b=1e-3", "c=true", "d=None", "e=[1, 2]", "f=text", "g=True", "h="])
    assert config.model_kwargs == {
        "a": 1, "b": 1e-3, "c": True, "d": None, "e": [1, 2], "f": "text", "g": True, "h": None,
    }  # fmt: skip
