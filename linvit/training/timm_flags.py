"""The options of timm's train.py (1.0.29) that linvit does not take, and why.

An args.yaml written by timm lists every option. Those here pass as long as they stand at timm's default, which asks
for nothing; anything else is refused with the reason. On the command line they are refused whatever the value.
"""

from typing import Any, NamedTuple


class NotTaken(NamedTuple):
    """timm's default for an option, and why linvit has no such option."""

    default: Any
    reason: str


_FOLDERS = "DATA says what is read: folders, tars, a CSV list or hf:NAME (docs/data.md)"
_BATCH_NORM = "Vision Transformers have no batch norm"
_SPLITS = "there are no augmentation splits"
_TORCHSCRIPT = "use --torchcompile"
_SIZES = "--train-img-sizes follow each other, each for its share of the epochs, in batches of one size"
_NAFLEX = "images are trained at one size, not as NaFlex sequences"
_FEATURES = "features are projected to the teacher's width"

NOT_TAKEN: dict[str, NotTaken] = {
    "dataset": NotTaken("", _FOLDERS),
    "dataset_download": NotTaken(False, "nothing is downloaded; give the folder of images"),
    "dataset_trust_remote_code": NotTaken(False, "nothing is downloaded and no foreign code is run"),
    "train_num_samples": NotTaken(None, _FOLDERS),
    "val_num_samples": NotTaken(None, _FOLDERS),
    "input_img_mode": NotTaken(None, "images are read as RGB"),
    "input_key": NotTaken(None, _FOLDERS),
    "target_key": NotTaken(None, _FOLDERS),
    "input_size": NotTaken(None, "use --img-size HEIGHT WIDTH; images are read as RGB"),
    "fuser": NotTaken("", _TORCHSCRIPT),
    "patience_epochs": NotTaken(10, "the plateau schedule cannot be resumed exactly; use cosine or wsd"),
    "fast_norm": NotTaken(False, "PyTorch's own layer norm is used; --amp and --torchcompile make it fast"),
    "torchscript": NotTaken(False, _TORCHSCRIPT),
    "model_dtype": NotTaken(None, "weights are float32; use --amp for lower precision"),
    "no_ddp_bb": NotTaken(False, "the models have no buffers that training changes, so there is nothing to switch off"),
    "synchronize_step": NotTaken(False, "steps are not synchronised, which is what makes them fast"),
    "local_rank": NotTaken(0, "torchrun sets LOCAL_RANK, which is read"),
    "device_modules": NotTaken(None, "import the device's module before calling train_imagenet.main"),
    "epoch_repeats": NotTaken(0.0, "an epoch is one pass over the images; raise --epochs"),
    "start_epoch": NotTaken(None, "--resume continues where the checkpoint stands"),
    "aug_splits": NotTaken(0, _SPLITS),
    "jsd_loss": NotTaken(False, _SPLITS),
    "resplit": NotTaken(False, _SPLITS),
    "drop_connect": NotTaken(None, "deprecated by timm; use --drop-path"),
    "drop_block": NotTaken(None, "Vision Transformers have no feature maps to drop blocks of; use --drop-path"),
    "bn_momentum": NotTaken(None, _BATCH_NORM),
    "bn_eps": NotTaken(None, _BATCH_NORM),
    "sync_bn": NotTaken(False, _BATCH_NORM),
    "dist_bn": NotTaken("reduce", _BATCH_NORM),
    "split_bn": NotTaken(False, _BATCH_NORM),
    "worker_seeding": NotTaken("all", "every image has its own random state from seed, epoch and index"),
    "recovery_interval": NotTaken(0, "use --checkpoint-interval, which counts updates; --resume auto goes on"),
    "save_images": NotTaken(False, "batches are not written out"),
    "no_prefetcher": NotTaken(False, "there is one loader: bytes to the device, normalised there"),
    "tta": NotTaken(0, "every image is evaluated once, as it will be used"),
    "use_multi_epochs_loader": NotTaken(False, "workers always persist between epochs"),
    "train_batch_sizes": NotTaken(None, _SIZES),
    "train_size_probs": NotTaken(None, _SIZES),
    "train_size_schedule": NotTaken("constant", _SIZES),
    "train_size_schedule_spread": NotTaken(0.65, _SIZES),
    "train_size_random_mix": NotTaken(0.1, _SIZES),
    "train_batches_per_epoch": NotTaken(None, "an epoch is one pass over the images"),
    "train_steps_per_epoch": NotTaken(None, "an epoch is one pass over the images"),
    "variable_batch_loss_scale": NotTaken("none", _SIZES),
    "naflex_loader": NotTaken(False, _NAFLEX),
    "naflex_train_seq_lens": NotTaken([128, 256, 576, 784, 1024], _NAFLEX),
    "naflex_max_seq_len": NotTaken(576, _NAFLEX),
    "naflex_patch_sizes": NotTaken(None, _NAFLEX),
    "naflex_patch_size_probs": NotTaken(None, _NAFLEX),
    "naflex_loss_scale": NotTaken("linear", _NAFLEX),
    "naflex_patchify_channels_first": NotTaken(False, _NAFLEX),
    "kd_loss_type": NotTaken("kl", "logits are compared by Kullback-Leibler divergence, features by cosine"),
    "kd_student_feature_dim": NotTaken(None, _FEATURES),
    "kd_teacher_feature_dim": NotTaken(None, _FEATURES),
    "kd_token_distill_type": NotTaken("soft", "models have no distillation token; use --kd-distill-type"),
}


def review(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Split settings as timm writes them into those that linvit may take and, by name, why the others are refused.

    Options at timm's default are in neither: they ask for nothing.
    """
    taken = {name: value for name, value in settings.items() if name not in NOT_TAKEN}
    refused = {
        name: NOT_TAKEN[name].reason
        for name, value in settings.items()
        if name in NOT_TAKEN and value != NOT_TAKEN[name].default
    }
    # timm's positional argument, kept beside data_dir in its args.yaml.
    if "data" in taken and taken.get("data_dir") in (None, ""):
        taken["data_dir"] = taken.pop("data")
    elif taken.get("data", "") is None:
        del taken["data"]
    return taken, refused
