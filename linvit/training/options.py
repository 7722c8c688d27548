"""Options of a training run under timm's names: flags on the command line, keys in YAML.

This module imports nothing heavy, so that a command line is checked before torch is loaded.
"""

import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from linvit.settings.fields import Count, LayerLengths, Length, ModelKeywords, Probability, Rate, Seed, nearest


class _Options(BaseModel):
    # Fields may start with model_. Validators are built at first use, which --help does not need.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)


class ModelOptions(_Options):
    """The model, its Linformer projections and its initial weights."""

    model: str = Field(
        "linvit_small_patch16_224",
        description="linvit or timm model name, or local-dir:FOLDER (default: the model in --pretrained-path if that "
        "is a folder with a model, else linvit_small_patch16_224)",
    )
    k: Length | LayerLengths | None = Field(
        None,
        title="a length of at least 1, or a list with a length, a list of lengths or none per layer, or none",
        description="projected length: one for all layers, or one per layer ('none': ordinary attention); in YAML "
        "also a list of lengths, one per head, for each layer (default: the model's own)",
    )
    projection: str | None = Field(
        None,
        description="kind of projection: 'linear', 'separable', 'conv', 'avgpool', 'maxpool', 'dct', 'random' or "
        "'identity' (default: the model's own)",
    )
    share: Literal["none", "headwise", "kv", "layerwise"] | None = Field(
        None,
        description="what shares a projection: nothing ('none'), the heads of a layer ('headwise'), also its keys and "
        "values ('kv'), or all layers ('layerwise') (default: the model's own)",
    )
    projection_init: Literal["pool", "average", "jl"] | None = Field(
        None,
        description="initial projections: local averages with a little noise ('pool') or without ('average'), or the "
        "paper's random matrix ('jl') (default: the model's own)",
    )
    local: int | None = Field(
        None,
        ge=3,
        description="size in patches of a depth-wise convolution beside attention, such as 3 (default: the model's "
        "own; the named models have none)",
    )
    stem: Literal["patch", "conv"] | None = Field(
        None,
        description="patch embedding: one matrix ('patch'), or convolutions with stride 2 ('conv'), which learn "
        "faster from scratch (default: the model's own; the named models have 'patch')",
    )
    model_kwargs: ModelKeywords = Field(
        default_factory=dict,
        description="extra keyword arguments of the model, such as class_token=false init_values=1e-5",
    )
    num_classes: Length | None = Field(
        None, description="expected number of classes, checked against the data (default: no check)"
    )
    gp: Literal["token", "avg", "avgmax", "max", "map"] | None = Field(
        None, description="global pooling (default: the model's own)"
    )
    pretrained: bool = Field(False, description="start from the published weights of the model")
    pretrained_path: Path | None = Field(
        None,
        description="start from the weights in this file or folder; classifier, image size and grid are adapted",
    )
    initial_checkpoint: Path | None = Field(
        None, description="start from this checkpoint of the same model; every weight must match"
    )
    head_init_scale: float | None = Field(
        None, description="multiply the initial weights of the classifier by this (default: no scaling)"
    )
    head_init_bias: float | None = Field(None, description="initial bias of the classifier (default: the model's own)")
    freeze: tuple[str, ...] = Field(
        (),
        description="parameters to freeze: names, modules or patterns, such as patch_embed 'blocks.[0-5].*', or "
        "'backbone' for all but the classifier",
    )
    drop: Rate = Field(0.0, description="dropout rate before the classifier")
    drop_path: Rate | None = Field(
        None, description="stochastic depth rate of the last block, rising linearly from 0 in the first"
    )
    patch_drop: Rate | None = Field(None, description="fraction of the patches dropped from each training image")


# Fields that set an argument of timm's VisionTransformer, and the name of that argument.
MODEL_ARGUMENTS = {
    "k": "k",
    "projection": "projection",
    "share": "share",
    "projection_init": "projection_init",
    "local": "local",
    "stem": "stem",
    "img_size": "img_size",
    "gp": "global_pool",
    "drop": "drop_rate",
    "drop_path": "drop_path_rate",
    "patch_drop": "patch_drop_rate",
}


class DeviceOptions(_Options):
    """The device, the numerical precision, and what trades time for memory."""

    device: str = Field(
        "auto", description="device: 'cpu', 'cuda', 'cuda:1', ..., or 'auto' for a GPU if there is one, else the CPU"
    )
    amp: bool = Field(False, description="train with automatic mixed precision")
    amp_dtype: Literal["bfloat16", "float16"] = Field(
        "bfloat16", description="data type of --amp; 'float16' uses a loss scaler"
    )
    channels_last: bool = Field(False, description="store images and weights in channels-last memory format")
    grad_checkpointing: bool | Literal["mlp", "full"] = Field(
        False,
        description="recompute activations to save memory: 'full' (or no value) recomputes whole blocks, 'mlp' only "
        "the hidden activations of MLPs, which costs little time (linvit models only)",
    )
    torchcompile: str | None = Field(
        None, description="compile the model with this torch.compile backend (no value: inductor)"
    )
    torchcompile_mode: str | None = Field(None, description="mode of torch.compile, such as max-autotune")
    fsdp: bool = Field(
        False,
        description="shard weights, gradients and optimizer state over the processes (FSDP2), for models too large "
        "for one device",
    )


class OptimizerOptions(_Options):
    """The optimizer (timm's create_optimizer_v2), gradient accumulation and gradient clipping."""

    opt: str = Field("adamw", description="timm's name of the optimizer: adamw, lamb, sgd, lion, muon, ...")
    opt_eps: float | None = Field(None, gt=0.0, description="epsilon of the optimizer (default: the optimizer's own)")
    opt_betas: tuple[Rate, ...] | None = Field(
        None, description="betas of the optimizer (default: the optimizer's own)"
    )
    momentum: float = Field(0.9, ge=0.0, description="momentum, for optimizers that have one")
    weight_decay: float = Field(0.05, ge=0.0, description="weight decay; biases and norm layers are exempt")
    opt_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="extra keyword arguments of the optimizer, such as foreach=false"
    )
    grad_accum_steps: int = Field(
        1, ge=1, description="number of batches whose gradients are accumulated for each update"
    )
    max_bad_steps: int = Field(
        10, ge=1, description="end the run after this many consecutive steps with a non-finite loss or gradient"
    )
    clip_grad: float | None = Field(None, gt=0.0, description="clip gradients at this value (default: no clipping)")
    clip_mode: Literal["norm", "value", "agc"] = Field(
        "norm",
        description="what --clip-grad limits: the norm of all gradients ('norm'), each element ('value'), or the norm "
        "of a gradient relative to that of its weights ('agc', adaptive)",
    )
    layer_decay: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="factor on the learning rate from each layer to the one below it; E and F train at the rate of "
        "the classifier",
    )
    layer_decay_min_scale: float = Field(
        0.0, ge=0.0, le=1.0, description="lower bound on the factor that --layer-decay gives a layer"
    )
    layer_decay_no_opt_scale: float | None = Field(
        None, ge=0.0, le=1.0, description="freeze the layers whose factor from --layer-decay is below this"
    )

    @field_validator("opt")
    @classmethod
    def _is_known(cls, value: str) -> str:
        if value == cls.model_fields["opt"].default:
            return value
        # The default skips this import, which takes seconds.
        from timm.optim import get_optimizer_info, list_optimizers

        # timm wraps any optimizer whose name has this prefix.
        name = value.lower().removeprefix("lookahead_")
        if name not in list_optimizers():
            suggestion = nearest(name, list_optimizers())
            question = f"; did you mean {suggestion!r}?" if suggestion else ""
            raise ValueError(f"{value!r} is not an optimizer of timm{question}")
        if get_optimizer_info(name).second_order:
            raise ValueError(f"{value} needs second derivatives, which attention does not provide; choose adamw")
        return value

    @field_validator("opt_betas")
    @classmethod
    def _fit_the_optimizer(cls, value: tuple[float, ...] | None, info: ValidationInfo) -> tuple[float, ...] | None:
        if value is None or "opt" not in info.data:
            return value
        from timm.optim import get_optimizer_info

        optimizer = get_optimizer_info(info.data["opt"].lower().removeprefix("lookahead_"))
        if not optimizer.has_betas:
            raise ValueError(f"does not apply to {info.data['opt']}, which has no betas: remove it")
        if len(value) != optimizer.num_betas:
            raise ValueError(f"takes {optimizer.num_betas} numbers for {info.data['opt']}, not {len(value)}")
        return value


class ScheduleOptions(_Options):
    """The learning rate over time (timm's create_scheduler_v2), and image sizes that change during training."""

    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none"] = Field(
        "cosine", description="learning rate schedule"
    )
    sched_on_updates: bool = Field(False, description="advance the schedule with every update instead of every epoch")
    epochs: int = Field(300, ge=1, description="length of the schedule in epochs")
    stop_epoch: int | None = Field(
        None, ge=1, description="stop after this many epochs without shortening the schedule"
    )
    lr: float | None = Field(
        None, gt=0.0, description="learning rate (default: from --lr-base and the global batch size)"
    )
    lr_base: float = Field(5e-4, gt=0.0, description="learning rate for a global batch of --lr-base-size images")
    lr_base_size: int = Field(256, ge=1, description="global batch size that --lr-base refers to")
    lr_base_scale: Literal["linear", "sqrt"] | None = Field(
        None,
        description="how --lr-base scales with the global batch size (default: 'sqrt' for LAMB and optimizers of the "
        "Adam family, else 'linear')",
    )
    train_img_sizes: tuple[Length, ...] | None = Field(
        None,
        description="image sizes in pixels that training uses one after another, such as 160 192 224, each for an "
        "equal share of the epochs; the last is the model's own",
    )
    warmup_epochs: Count = Field(
        5,
        description="epochs of linear warm-up (default: 5; half of --epochs, rounded down, if that is 5 or less)",
    )
    warmup_lr: float = Field(1e-5, ge=0.0, description="learning rate at the start of the warm-up")
    warmup_prefix: bool = Field(False, description="add the warm-up before --epochs instead of counting it among them")
    min_lr: float = Field(0.0, ge=0.0, description="lower bound on the learning rate")
    cooldown_epochs: Count = Field(0, description="epochs at --min-lr after the schedule")
    decay_epochs: float | None = Field(
        None,
        gt=0.0,
        description="epochs between decays ('step'; default 90), or epochs of the decay ('wsd', 'rsqrt'; default 0.2 "
        "of the schedule)",
    )
    decay_milestones: tuple[Count, ...] = Field((90, 180, 270), description="epochs of the decays ('multistep')")
    decay_rate: float = Field(
        0.1, gt=0.0, description="factor of each decay ('step', 'multistep') or exponent ('poly')"
    )
    lr_noise: tuple[float, ...] | None = Field(
        None, description="where noise on the learning rate starts, and optionally stops, as fractions of the schedule"
    )
    lr_noise_pct: float = Field(0.67, description="limit of the noise as a fraction of the learning rate")
    lr_noise_std: float = Field(1.0, description="standard deviation of the noise")
    lr_cycle_mul: float = Field(1.0, gt=0.0, description="factor on the length of a cycle from one to the next")
    lr_cycle_decay: float = Field(0.5, gt=0.0, description="factor on the learning rate from one cycle to the next")
    lr_cycle_limit: int = Field(1, ge=1, description="number of cycles")
    lr_k_decay: float = Field(
        1.0, gt=0.0, description="exponent on the elapsed fraction of the schedule ('cosine', 'poly')"
    )

    @model_validator(mode="before")
    @classmethod
    def _shorten_the_default_warmup(cls, settings: Any) -> Any:
        if not isinstance(settings, dict) or "warmup_epochs" in settings or settings.get("warmup_prefix") is True:
            return settings
        epochs = settings.get("epochs")
        if not isinstance(epochs, int) or epochs > cls.model_fields["warmup_epochs"].default:
            return settings
        return {**settings, "warmup_epochs": max(epochs, 0) // 2}


class LossOptions(_Options):
    """The loss, and the mixing of images and labels within a batch."""

    smoothing: Rate = Field(0.1, description="label smoothing")
    mixup: float = Field(0.0, ge=0.0, description="alpha of mixup; 0 disables mixup")
    cutmix: float = Field(0.0, ge=0.0, description="alpha of cutmix; 0 disables cutmix")
    cutmix_minmax: tuple[Probability, Probability] | None = Field(
        None,
        description="smallest and largest side of the cutmix box, as fractions of the image side; enables cutmix",
    )
    mixup_prob: Probability = Field(1.0, description="probability that a batch is mixed at all")
    mixup_switch_prob: Probability = Field(
        0.5, description="probability of cutmix instead of mixup when both are enabled"
    )
    mixup_mode: Literal["batch", "pair", "elem"] = Field(
        "batch", description="draw the mixing once per batch, per pair of images or per image ('elem')"
    )
    mixup_off_epoch: Count = Field(0, description="train without mixing from this epoch on; 0 mixes until the end")
    bce_loss: bool = Field(False, description="use binary cross-entropy, with a sigmoid per class")
    bce_sum: bool = Field(False, description="sum the binary losses over the classes instead of averaging them")
    bce_target_thresh: Probability | None = Field(
        None, description="round soft targets above this to 1 and all others to 0 (default: keep them)"
    )
    bce_pos_weight: float | None = Field(
        None, gt=0.0, description="weight of positive targets in binary cross-entropy (default: 1)"
    )
    class_weights: str | None = Field(
        None,
        description="class weights in cross-entropy: 'balanced' (inverse of the number of images), or a YAML or JSON "
        "file with a weight for every class name (default: equal weights)",
    )

    @property
    def uses_mixing(self) -> bool:
        """Whether mixup or cutmix is enabled."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


class DistillOptions(_Options):
    """Knowledge distillation: a teacher whose logits or tokens the model learns to match, along with the labels."""

    kd_model_name: str | None = Field(
        None, description="teacher: a timm model with its published weights, a run folder or local-dir:FOLDER"
    )
    kd_distill_type: Literal["logit", "feature"] = Field(
        "logit",
        description="match the teacher's logits ('logit'), or its last tokens through a learned projection ('feature')",
    )
    kd_temperature: float = Field(4.0, gt=0.0, description="temperature that softens the logits of both models")
    distill_loss_weight: float | None = Field(
        None,
        gt=0.0,
        description="weight of the teacher's loss (default: 1, or 1 minus --task-loss-weight where that is set)",
    )
    task_loss_weight: float | None = Field(None, ge=0.0, description="weight of the labels' loss (default: 1)")


class TrackerOptions(_Options):
    """Experiment trackers that also receive the metrics of the run."""

    log_tensorboard: bool = Field(False, description="write TensorBoard events into the run folder")
    log_wandb: bool = Field(False, description="log to Weights & Biases (WANDB_MODE=offline needs no network)")
    wandb_project: str | None = Field(None, description="project in Weights & Biases (default: wandb's own)")
    wandb_tags: tuple[str, ...] = Field((), description="tags in Weights & Biases")
    wandb_resume_id: str | None = Field(None, description="ID of the Weights & Biases run to resume")


class EmaOptions(_Options):
    """An exponential moving average of the weights (EMA), evaluated and saved in addition to the raw weights."""

    model_ema: bool = Field(False, description="keep and evaluate an exponential moving average of the weights (EMA)")
    model_ema_decay: Rate = Field(0.9998, description="decay of the EMA per update")
    model_ema_warmup: bool = Field(False, description="start the EMA with a smaller decay")
    model_ema_force_cpu: bool = Field(False, description="keep the EMA in CPU memory")


class RunOptions(_Options):
    """The run: its folder, its seed, what it writes and when it ends."""

    output: Path = Field(Path("output"), description="folder that contains the run folders")
    experiment: str | None = Field(None, description="name of the run folder (default: date, model and image size)")

    @field_validator("experiment")
    @classmethod
    def _is_a_name(cls, value: str | None) -> str | None:
        if value is not None and (value in (".", "..") or re.search(r"[/\\]", value) or not value.isprintable()):
            raise ValueError(f"takes the name of a folder, not {value!r}: set `output` to the folder that contains it")
        return value

    resume: str | None = Field(
        None,
        description="resume from this run folder or checkpoint; 'auto' resumes the run --experiment if it exists",
    )
    no_resume_opt: bool = Field(False, description="resume only the weights, with a new optimizer")
    allow_changed_data: bool = Field(
        False, description="resume although images or labels changed since the training state was saved"
    )
    seed: Seed = Field(42, description="random seed of the weights, the order of the images and their augmentation")
    deterministic: bool = Field(False, description="use only deterministic algorithms, which may be slower")
    dry_run: bool = Field(
        False,
        description="print configuration, model and cost, save one batch as dry-run.png in --output, and exit "
        "without training",
    )
    report: bool = Field(
        True, description="write report.html into the run folder at the end: curves, confusions, worst images"
    )
    eval_metric: Literal["top1", "top5", "loss"] = Field("top1", description="metric that selects the best weights")
    val_interval: int = Field(1, ge=1, description="epochs between evaluations")
    log_interval: int = Field(50, ge=1, description="batches between progress lines")
    checkpoint_interval: int | None = Field(
        None,
        ge=1,
        description="also save the training state every N updates within an epoch (default: only after each epoch)",
    )
    checkpoint_minutes: float | None = Field(
        None,
        gt=0.0,
        description="also save the training state every X minutes within an epoch (default: only after each epoch)",
    )
    checkpoint_hist: int = Field(10, ge=1, description="number of training states to keep")
    save_epochs: tuple[Count, ...] = Field((), description="epochs whose training state is never deleted")
    early_stop_patience: int | None = Field(
        None, ge=1, description="stop after this many evaluations without a better --eval-metric (default: never)"
    )
