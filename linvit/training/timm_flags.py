"""Options of timm's train.py (1.0.29, and earlier ones) that linvit does not support, each with the reason.

An args.yaml written by timm contains every option. These are ignored there at timm's default or without a value (false,
null, 0, ''), which has no effect, and refused with any other value. On the command line they are always refused.
"""

from typing import Any, NamedTuple


class Unsupported(NamedTuple):
    """An option of timm that linvit does not support: timm's default, and why."""

    default: Any
    reason: str


_FOLDERS = "DATA selects the images: folders, tars, a CSV list or hf:NAME (docs/data.md)"
_BATCH_NORM = "Vision Transformers have no batch norm"
_SPLITS = "augmentation splits are not supported"
_TORCHSCRIPT = "use --torchcompile"
_SIZES = "use --train-img-sizes: one size after another, each for an equal share of the epochs"
_NAFLEX = "NaFlex sequences are not supported; a batch has images of one size"
_FEATURES = "features are projected to the teacher's width"

UNSUPPORTED: dict[str, Unsupported] = {
    "dataset": Unsupported("", _FOLDERS),
    "dataset_download": Unsupported(False, "nothing is downloaded; give a folder of images"),
    "dataset_trust_remote_code": Unsupported(False, "nothing is downloaded, and no code of others is run"),
    "train_num_samples": Unsupported(None, _FOLDERS),
    "val_num_samples": Unsupported(None, _FOLDERS),
    "input_img_mode": Unsupported(None, "images are read as RGB"),
    "input_key": Unsupported(None, _FOLDERS),
    "target_key": Unsupported(None, _FOLDERS),
    "input_size": Unsupported(None, "use --img-size HEIGHT WIDTH; images are read as RGB"),
    "fuser": Unsupported("", _TORCHSCRIPT),
    "patience_epochs": Unsupported(10, "the plateau schedule cannot be resumed exactly; use cosine or wsd"),
    "fast_norm": Unsupported(False, "PyTorch's own layer norm is used; --amp and --torchcompile make it fast"),
    "torchscript": Unsupported(False, _TORCHSCRIPT),
    "model_dtype": Unsupported(None, "weights are float32; use --amp for lower precision"),
    "no_ddp_bb": Unsupported(False, "training changes no buffers, so none are broadcast"),
    "synchronize_step": Unsupported(False, "steps are never synchronised, for speed"),
    "local_rank": Unsupported(0, "the rank is read from LOCAL_RANK, which torchrun sets"),
    "device_modules": Unsupported(None, "import the module of the device before calling train_imagenet.main"),
    "epoch_repeats": Unsupported(0.0, "an epoch is one pass over the images; raise --epochs"),
    "start_epoch": Unsupported(None, "--resume continues from the epoch of the checkpoint"),
    "aug_splits": Unsupported(0, _SPLITS),
    "jsd_loss": Unsupported(False, _SPLITS),
    "resplit": Unsupported(False, _SPLITS),
    "drop_connect": Unsupported(None, "deprecated by timm; use --drop-path"),
    "drop_block": Unsupported(None, "Vision Transformers have no convolutional feature maps; use --drop-path"),
    "bn_momentum": Unsupported(None, _BATCH_NORM),
    "bn_eps": Unsupported(None, _BATCH_NORM),
    "sync_bn": Unsupported(False, _BATCH_NORM),
    "dist_bn": Unsupported("reduce", _BATCH_NORM),
    "split_bn": Unsupported(False, _BATCH_NORM),
    "worker_seeding": Unsupported("all", "each image has its own random state, from seed, epoch and index"),
    "recovery_interval": Unsupported(0, "use --checkpoint-interval, which counts updates, and --resume auto"),
    "save_images": Unsupported(False, "batches are not saved"),
    "no_prefetcher": Unsupported(False, "there is only one loader, which normalises images on the device"),
    "tta": Unsupported(0, "each image is evaluated once, without augmentation"),
    "use_multi_epochs_loader": Unsupported(False, "workers always persist between epochs"),
    "train_batch_sizes": Unsupported(None, _SIZES),
    "train_size_probs": Unsupported(None, _SIZES),
    "train_size_schedule": Unsupported("constant", _SIZES),
    "train_size_schedule_spread": Unsupported(0.65, _SIZES),
    "train_size_random_mix": Unsupported(0.1, _SIZES),
    "train_batches_per_epoch": Unsupported(None, "an epoch is one pass over the images"),
    "train_steps_per_epoch": Unsupported(None, "an epoch is one pass over the images"),
    "variable_batch_loss_scale": Unsupported("none", _SIZES),
    "naflex_loader": Unsupported(False, _NAFLEX),
    "naflex_train_seq_lens": Unsupported([128, 256, 576, 784, 1024], _NAFLEX),
    "naflex_max_seq_len": Unsupported(576, _NAFLEX),
    "naflex_patch_sizes": Unsupported(None, _NAFLEX),
    "naflex_patch_size_probs": Unsupported(None, _NAFLEX),
    "naflex_loss_scale": Unsupported("linear", _NAFLEX),
    "naflex_patchify_channels_first": Unsupported(False, _NAFLEX),
    "kd_loss_type": Unsupported("kl", "logits are compared by Kullback-Leibler divergence, features by cosine"),
    "kd_student_feature_dim": Unsupported(None, _FEATURES),
    "kd_teacher_feature_dim": Unsupported(None, _FEATURES),
    "kd_token_distill_type": Unsupported("soft", "models have no distillation token; use --kd-distill-type"),
}


_AMP = "use --amp, and --amp-dtype float16 for what timm did"

# Options that timm has removed or renamed since 2020.
EARLIER: dict[str, Unsupported] = {
    "apex_amp": Unsupported(False, _AMP),
    "native_amp": Unsupported(False, _AMP),
    "bn_tf": Unsupported(False, _BATCH_NORM),
    "jsd": Unsupported(False, _SPLITS),
    "num_gpu": Unsupported(1, "torchrun starts a process for each GPU"),
    "prefetcher": Unsupported(True, "there is only one loader, which normalises images on the device"),
    "validation_batch_size_multiplier": Unsupported(1, "use --validation-batch-size"),
    "dynamo": Unsupported(False, _TORCHSCRIPT),
    "dynamo_backend": Unsupported(None, _TORCHSCRIPT),
    "aot_autograd": Unsupported(False, _TORCHSCRIPT),
}
# timm's defaults of earlier years that differ from today's.
_EARLIER_DEFAULTS = {"dist_bn": "broadcast"}


def _has_effect(name: str, value: Any) -> bool:
    """Whether the value of an unsupported option requests something."""
    option = UNSUPPORTED.get(name) or EARLIER[name]
    return bool(value) and value != option.default and value != _EARLIER_DEFAULTS.get(name)


def split_timm_settings(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Split settings as timm writes them into supported ones, and the reason by name for those that are refused.

    Unsupported options without effect are in neither.
    """
    unsupported = UNSUPPORTED | EARLIER
    supported = {name: value for name, value in settings.items() if name not in unsupported}
    refused = {
        name: unsupported[name].reason
        for name, value in settings.items()
        if name in unsupported and _has_effect(name, value)
    }
    # timm's args.yaml contains its positional argument as `data`, next to `data_dir`.
    if "data" in supported and supported.get("data_dir") in (None, ""):
        supported["data_dir"] = supported.pop("data")
    elif supported.get("data", "") is None:
        del supported["data"]
    return supported, refused
