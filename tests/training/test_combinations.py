"""Options that contradict each other or do nothing are refused, under the names that the user wrote."""

from pathlib import Path

import pytest

from linvit.settings.fields import validate
from linvit.settings.flags import UsageError
from linvit.training.config import TrainConfig, parse


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bce_target_thresh": 0.0}, "bce_target_thresh does nothing without bce_loss: set bce_loss or remove"),
        ({"model_ema_warmup": True}, "model_ema_warmup does nothing without model_ema"),
        ({"torchcompile_mode": "default"}, "torchcompile_mode does nothing without torchcompile"),
        ({"val_fraction": 0.2, "val_split": "valid"}, "val_fraction and val_split both select the validation images"),
        ({"no_resume_opt": True}, "no_resume_opt does nothing without resume"),
        ({"layer_decay_min_scale": 0.1}, "layer_decay_min_scale does nothing without layer_decay"),
        ({"clip_mode": "agc"}, "clip_mode agc does nothing without clip_grad"),
        ({"model": "vit_tiny_patch16_224", "k": 8}, "k is for linvit models, not for vit_tiny_patch16_224"),
        ({"share": "kv", "model": "resnet50"}, "share is for linvit models"),
        ({"k": 8, "model_kwargs": {"k": 9}}, "k and k in model_kwargs set the same argument"),
        (
            {"gp": "avg", "model_kwargs": {"global_pool": "max"}},
            "gp and global_pool in model_kwargs set the same argument",
        ),
        ({"initial_checkpoint": "a", "pretrained": True}, "initial_checkpoint and pretrained both"),
        ({"initial_checkpoint": "a", "pretrained_path": "b"}, "initial_checkpoint and pretrained_path both"),
        ({"layer_decay": 0.9, "freeze": ("backbone",)}, "layer_decay does nothing when freeze contains the backbone"),
        ({"resume": "auto"}, "set experiment"),
        ({"epochs": 3, "warmup_epochs": 5}, "warmup_epochs 5 is longer than epochs 3"),
        ({"lr": 1e-6, "min_lr": 1e-5}, "min_lr 1e-05 is above lr 1e-06"),
        ({"lr": 1e-6}, "warmup_lr 1e-05 is above lr 1e-06"),
        ({"decay_milestones": (5, 3)}, "decay_milestones [5, 3] must be in increasing order"),
        ({"lr_noise": (0.1, 0.2, 0.3)}, "lr_noise takes"),
        ({"cutmix_minmax": (0.8, 0.2)}, "cutmix_minmax [0.8, 0.2] must have the smaller side first"),
        ({"mixup_off_epoch": 5}, "mixup_off_epoch has nothing to disable"),
        ({"mixup": 0.2, "batch_size": 5}, "batch_size 5 must be even"),
        ({"aug_repeats": 0.5}, "takes at least 1, or 0 to disable it"),
        ({"aug_repeats": 2.0, "sampler": "balanced"}, "aug_repeats and sampler balanced both"),
        ({"class_weights": "balanced", "sampler": "balanced"}, "both balance the classes"),
        ({"class_weights": "balanced", "bce_loss": True}, "class_weights applies to cross-entropy only"),
        ({"train_img_sizes": ()}, "train_img_sizes needs at least one size"),
        ({"train_img_sizes": (160, 192), "img_size": (224,)}, "set img_size to 192"),
        ({"train_img_sizes": (160, 192), "epochs": 1, "warmup_epochs": 0}, "has 2 sizes, but epochs is 1"),
        ({"kd_model_name": "a", "task_loss_weight": 1.5}, "makes the weight of the teacher's loss negative"),
        ({"distill_loss_weight": 0.2}, "distill_loss_weight does nothing without kd_model_name"),
        ({"kd_model_name": "a", "kd_distill_type": "feature", "patch_drop": 0.5}, "remove patch_drop"),
        ({"kd_model_name": "a", "kd_distill_type": "feature", "kd_temperature": 2.0}, "set kd_distill_type to logit"),
        ({"wandb_project": "a"}, "wandb_project does nothing without log_wandb"),
        ({"aug_file": Path("a.yaml"), "vflip": 0.5}, "aug_file replaces the whole training pipeline"),
    ],
)
def test_contradictions_are_refused_in_one_sentence(settings, message):
    with pytest.raises(ValueError) as error:
        validate(TrainConfig, settings)
    assert message in str(error.value)
    assert "`" not in str(error.value)


def test_options_are_named_as_the_user_wrote_them(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("warmup_epochs: 5\nepochs: 9\nlr: 1e-6\n")
    for argv, message in (
        (["--epochs", "2", "--warmup-epochs", "5"], "--warmup-epochs 5 is longer than --epochs 2: "),
        (["-c", str(path), "--epochs", "2"], f"{path} and the flags: warmup_epochs 5 is longer than --epochs 2: "),
        (["--bce-sum"], "--bce-sum does nothing without --bce-loss: set --bce-loss or remove --bce-sum"),
        (["--model-kwargs", "k=3", "--k", "4"], "--k and k in --model-kwargs set the same argument: keep one"),
    ):
        with pytest.raises(UsageError) as error:
            parse(["D", *argv])
        assert str(error.value).startswith(message)
    with pytest.raises(UsageError, match=f"^{path}: warmup_lr 1e-05 is above lr 1e-06: set it lower, or warmup_epochs"):
        TrainConfig.load(path)


def test_possible_combinations_are_accepted():
    TrainConfig(epochs=3, warmup_prefix=True)
    TrainConfig(lr=1e-6, warmup_epochs=0)
    TrainConfig(bce_loss=True, bce_target_thresh=0.0)
    TrainConfig(aug_repeats=1.0, sampler="balanced")
    TrainConfig(class_weights="weights.yaml", sampler="balanced")
    TrainConfig(train_img_sizes=(160, 192), img_size=(192,))
    TrainConfig(model="local-dir:run/best", k=8)
    TrainConfig(amp=True, amp_dtype="float16", device="cuda")


@pytest.mark.parametrize("name", ["../../x", "/x", "a/b", "..", ".", "a\\b", "a\0b", "a\nb", "caf\udce9"])
def test_an_experiment_is_the_name_of_a_folder_in_output(name):
    with pytest.raises(ValueError, match="experiment takes the name of a folder, not '"):
        validate(TrainConfig, {"experiment": name})


def test_usual_names_of_experiments_are_accepted():
    for name in ("run", "2024-01-01 lr=1e-3", "...", "über", "run.1"):
        assert validate(TrainConfig, {"experiment": name}).experiment == name
