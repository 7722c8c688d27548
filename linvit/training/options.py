"""The options of the training part, under timm's names: what `--help` shows, YAML holds and the loop reads.

Imports nothing heavy, so that a command line can be checked before torch is loaded.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from linvit.settings.fields import Count, LayerLengths, Length, Probability, Rate, nearest


class _Options(BaseModel):
    # A name may begin with model_; validators are built when first needed, which --help never does.
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)


class ModelOptions(_Options):
    """The model, its Linformer projection and the weights it starts from."""

    model: str = Field(
        "linvit_small_patch16_224",
        description="name of a linvit or timm model, or local-dir:FOLDER (default: the one in pretrained_path, if that "
        "is a folder with a model)",
    )
    k: Length | LayerLengths | None = Field(
        None,
        title="a length of at least 1, a list with a length, a list of lengths or none for each layer, or none",
        description="projected length: one number, or one per layer ('none' is ordinary attention there); in YAML "
        "also a list per layer, of a length per head (default: the model's own)",
    )
    projection: str | None = Field(
        None,
        description="kind of projection: linear, separable, conv, avgpool, maxpool, dct, random, identity (default: "
        "the model's own)",
    )
    share: Literal["none", "headwise", "kv", "layerwise"] | None = Field(
        None, description="what shares one projection: nothing, the heads, also keys and values, or all layers"
    )
    projection_init: Literal["pool", "average", "jl"] | None = Field(
        None,
        description="rows start as local averages, with a little noise (pool) or without (average), or as the paper's "
        "random matrix (jl)",
    )
    model_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of the model, as class_token=false init_values=1e-5"
    )
    num_classes: Length | None = Field(
        None, description="number of classes, as a check (default: as many as the data has)"
    )
    gp: Literal["token", "avg", "avgmax", "max", "map"] | None = Field(
        None, description="global pooling (default: the model's own)"
    )
    pretrained: bool = Field(False, description="start from the model's published weights")
    pretrained_path: Path | None = Field(
        None, description="start from this file as from published weights: head, size and grid are adapted"
    )
    initial_checkpoint: Path | None = Field(
        None, description="start from this checkpoint of the same model; every weight must fit"
    )
    head_init_scale: float | None = Field(None, description="scale the fresh classifier's weights by this")
    head_init_bias: float | None = Field(None, description="set the fresh classifier's bias to this")
    freeze: tuple[str, ...] = Field(
        (),
        description="parameters that stay as they are: names or patterns such as patch_embed 'blocks.[0-5].*', or "
        "backbone for all but the classifier",
    )
    drop: Rate = Field(0.0, description="dropout rate before the classifier")
    drop_path: Rate | None = Field(None, description="stochastic depth rate of the last block, rising linearly")
    patch_drop: Rate | None = Field(None, description="share of the patches left out of every training image")


# The arguments of timm's VisionTransformer that have a flag of their own.
MODEL_ARGUMENTS = {
    "k": "k",
    "projection": "projection",
    "share": "share",
    "projection_init": "projection_init",
    "img_size": "img_size",
    "gp": "global_pool",
    "drop": "drop_rate",
    "drop_path": "drop_path_rate",
    "patch_drop": "patch_drop_rate",
}


class DeviceOptions(_Options):
    """Where the arithmetic happens and in which precision."""

    device: str = Field("auto", description="cpu, cuda, cuda:1, ...; auto takes a GPU where there is one")
    amp: bool = Field(False, description="train under automatic mixed precision")
    amp_dtype: Literal["bfloat16", "float16"] = Field(
        "bfloat16", description="precision under --amp; float16 runs with a loss scaler"
    )
    channels_last: bool = Field(False, description="keep images and convolutions in channels-last order")
    grad_checkpointing: bool | Literal["mlp", "full"] = Field(
        False,
        description="save memory by recomputing activations: full (alone: full) for whole blocks, mlp for the hidden "
        "activations of MLPs, which costs little (linvit models only)",
    )
    torchcompile: str | None = Field(
        None, description="compile the model, with this torch.compile backend (alone: inductor)"
    )
    torchcompile_mode: str | None = Field(None, description="torch.compile mode, such as max-autotune")
    fsdp: bool = Field(
        False,
        description="divide weights, gradients and the optimizer's state among the processes (FSDP2), for models too "
        "large for one",
    )


class OptimizerOptions(_Options):
    """The optimizer (timm's create_optimizer_v2) and what is done to gradients before its step."""

    opt: str = Field("adamw", description="optimizer, by timm's names: adamw, lamb, sgd, lion, muon, ...")
    opt_eps: float | None = Field(None, gt=0.0, description="epsilon (default: the optimizer's own)")
    opt_betas: tuple[Rate, ...] | None = Field(None, description="betas (default: the optimizer's own)")
    momentum: float = Field(0.9, ge=0.0, description="momentum, where the optimizer has one")
    weight_decay: float = Field(0.05, ge=0.0, description="weight decay; biases and norms have none")
    opt_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of the optimizer, as foreach=false"
    )
    grad_accum_steps: int = Field(1, ge=1, description="batches whose gradients are added before a step")
    max_bad_steps: int = Field(
        10, ge=1, description="end the run after so many steps in a row whose loss or gradients are not finite"
    )
    clip_grad: float | None = Field(None, gt=0.0, description="clip gradients at this value (default: never)")
    clip_mode: Literal["norm", "value", "agc"] = Field(
        "norm", description="clip the norm of all gradients, each value, or adaptively by the weights' norm"
    )
    layer_decay: float | None = Field(
        None,
        gt=0.0,
        le=1.0,
        description="factor on the learning rate from each layer to the one below it; E and F have the head's rate",
    )
    layer_decay_min_scale: float = Field(0.0, ge=0.0, le=1.0, description="lower bound of the layer-wise factor")
    layer_decay_no_opt_scale: float | None = Field(
        None, ge=0.0, le=1.0, description="layers whose factor is below this are not trained at all"
    )

    @field_validator("opt")
    @classmethod
    def _is_timms(cls, value: str) -> str:
        if value == cls.model_fields["opt"].default:
            return value
        # Loaded for other names alone: it takes seconds.
        from timm.optim import get_optimizer_info, list_optimizers

        # timm's prefix lookahead_ wraps any of them.
        name = value.lower().removeprefix("lookahead_")
        if name not in list_optimizers():
            suggestion = nearest(name, list_optimizers())
            perhaps = f"; did you mean {suggestion!r}?" if suggestion else ""
            raise ValueError(f"{value!r} is no optimizer of timm's{perhaps}")
        if get_optimizer_info(name).second_order:
            raise ValueError(f"{value} needs second derivatives, which attention does not have; choose adamw")
        return value

    @field_validator("opt_betas")
    @classmethod
    def _as_many_as_needed(cls, value: tuple[float, ...] | None, info: ValidationInfo) -> tuple[float, ...] | None:
        if value is None or "opt" not in info.data:
            return value
        from timm.optim import get_optimizer_info

        optimizer = get_optimizer_info(info.data["opt"].lower().removeprefix("lookahead_"))
        if not optimizer.has_betas:
            raise ValueError(f"is for optimizers with betas, not for {info.data['opt']}: remove it")
        if len(value) != optimizer.num_betas:
            raise ValueError(f"takes {optimizer.num_betas} numbers for {info.data['opt']}, not {len(value)}")
        return value


class ScheduleOptions(_Options):
    """The learning rate over time (timm's create_scheduler_v2)."""

    sched: Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none"] = Field(
        "cosine", description="schedule of the learning rate"
    )
    sched_on_updates: bool = Field(False, description="move along the schedule every step, not every epoch")
    epochs: int = Field(300, ge=1, description="epochs of the schedule")
    stop_epoch: int | None = Field(None, ge=1, description="stop after this many epochs of the same schedule")
    lr: float | None = Field(None, gt=0.0, description="learning rate (default: from lr_base and the batch size)")
    lr_base: float = Field(5e-4, gt=0.0, description="learning rate at a global batch of lr_base_size")
    lr_base_size: int = Field(256, ge=1, description="global batch that lr_base is meant for")
    lr_base_scale: Literal["linear", "sqrt"] | None = Field(
        None, description="how lr_base grows with the batch (default: sqrt for Adam's kin and LAMB, else linear)"
    )
    train_img_sizes: tuple[Length, ...] | None = Field(
        None,
        description="image sizes through training, such as 160 192 224: the epochs are divided among them, the last is "
        "the model's own",
    )
    warmup_epochs: Count = Field(
        5,
        description="epochs of linear warm-up (default: 5; out of 5 epochs or fewer, half of them, rounded down)",
    )
    warmup_lr: float = Field(1e-5, ge=0.0, description="learning rate that the warm-up starts from")
    warmup_prefix: bool = Field(False, description="the warm-up comes before the epochs, not out of them")
    min_lr: float = Field(0.0, ge=0.0, description="lower bound of the learning rate")
    cooldown_epochs: Count = Field(0, description="epochs at min_lr after the schedule")
    decay_epochs: float | None = Field(
        None, gt=0.0, description="epochs between decays (step; default 90) or of the decay (wsd, rsqrt; 0.2 of all)"
    )
    decay_milestones: tuple[Count, ...] = Field((90, 180, 270), description="epochs of the decays (multistep)")
    decay_rate: float = Field(0.1, gt=0.0, description="factor of each decay (step, multistep), power (poly)")
    lr_noise: tuple[float, ...] | None = Field(
        None, description="shares of the schedule where noise on the learning rate starts and stops"
    )
    lr_noise_pct: float = Field(0.67, description="limit of the noise, as a share of the learning rate")
    lr_noise_std: float = Field(1.0, description="standard deviation of the noise")
    lr_cycle_mul: float = Field(1.0, gt=0.0, description="factor from the length of one cycle to the next")
    lr_cycle_decay: float = Field(0.5, gt=0.0, description="factor from the height of one cycle to the next")
    lr_cycle_limit: int = Field(1, ge=1, description="number of cycles")
    lr_k_decay: float = Field(1.0, gt=0.0, description="power on the elapsed share (cosine, poly)")

    @model_validator(mode="before")
    @classmethod
    def _short_warmup_of_a_short_run(cls, settings: Any) -> Any:
        if not isinstance(settings, dict) or "warmup_epochs" in settings or settings.get("warmup_prefix") is True:
            return settings
        epochs = settings.get("epochs")
        if not isinstance(epochs, int) or epochs > cls.model_fields["warmup_epochs"].default:
            return settings
        return {**settings, "warmup_epochs": max(epochs, 0) // 2}


class LossOptions(_Options):
    """The loss, and the mixing of images and labels within a batch."""

    smoothing: Rate = Field(0.1, description="label smoothing")
    mixup: float = Field(0.0, ge=0.0, description="mixup alpha; 0 is off")
    cutmix: float = Field(0.0, ge=0.0, description="cutmix alpha; 0 is off")
    cutmix_minmax: tuple[Probability, Probability] | None = Field(
        None, description="smallest and largest side of the cutmix box, as shares; turns cutmix on"
    )
    mixup_prob: Probability = Field(1.0, description="probability of mixing a batch at all")
    mixup_switch_prob: Probability = Field(0.5, description="probability of cutmix where both are on")
    mixup_mode: Literal["batch", "pair", "elem"] = Field("batch", description="what shares one mixing draw")
    mixup_off_epoch: Count = Field(0, description="train without mixing from this epoch on; 0 is never")
    bce_loss: bool = Field(False, description="binary cross-entropy, a sigmoid per class")
    bce_sum: bool = Field(False, description="sum the binary losses over classes instead of averaging")
    bce_target_thresh: Probability | None = Field(None, description="soft targets above this count as 1, others as 0")
    bce_pos_weight: float | None = Field(None, gt=0.0, description="weight of the positive targets")
    class_weights: str | None = Field(
        None,
        description="weights of the classes in cross-entropy: balanced (by the inverse of their number of images), or "
        "a YAML or JSON file with a weight for every class name (default: all alike)",
    )


class DistillOptions(_Options):
    """A trained model whose answers, or tokens, the model learns to give beside the labels (knowledge distillation)."""

    kd_model_name: str | None = Field(
        None, description="the teacher: a timm model with its published weights, a run's folder or local-dir:FOLDER"
    )
    kd_distill_type: Literal["logit", "feature"] = Field(
        "logit", description="learn the teacher's logits, or its last tokens through a learned projection"
    )
    kd_temperature: float = Field(4.0, gt=0.0, description="softens both distributions of the logits")
    distill_loss_weight: float | None = Field(
        None,
        gt=0.0,
        description="weight of the teacher's part of the loss (default: 1, or what the task's leaves of 1)",
    )
    task_loss_weight: float | None = Field(
        None, ge=0.0, description="weight of the labels' part of the loss (default: 1)"
    )


class TrackerOptions(_Options):
    """Where else the run's numbers go."""

    log_tensorboard: bool = Field(False, description="write TensorBoard events into the run's folder")
    log_wandb: bool = Field(False, description="log to Weights & Biases (WANDB_MODE=offline needs no network)")
    wandb_project: str | None = Field(None, description="project there (default: wandb's own)")
    wandb_tags: tuple[str, ...] = Field((), description="tags there")
    wandb_resume_id: str | None = Field(None, description="go on with the run of this ID there")


class EmaOptions(_Options):
    """A moving average of the weights, evaluated and kept beside the raw ones."""

    model_ema: bool = Field(False, description="keep a moving average of the weights")
    model_ema_decay: Rate = Field(0.9998, description="its decay per step")
    model_ema_warmup: bool = Field(False, description="begin with a smaller decay")
    model_ema_force_cpu: bool = Field(False, description="keep it in the CPU's memory")


class RunOptions(_Options):
    """The run: its folder, its seed, what is written and when it ends."""

    output: Path = Field(Path("output"), description="folder that run folders are made in")
    experiment: str | None = Field(None, description="name of the run's folder (default: date, model and size)")
    resume: str | None = Field(
        None, description="go on from this run folder or checkpoint; auto: from the experiment's own, if there"
    )
    no_resume_opt: bool = Field(False, description="resume the weights alone, with a fresh optimizer")
    seed: Count = Field(42, description="seed of weights, order and augmentation")
    deterministic: bool = Field(False, description="use deterministic algorithms only, at a price")
    dry_run: bool = Field(
        False, description="show configuration, model, cost and one batch (dry-run.png in output); train nothing"
    )
    eval_metric: Literal["top1", "top5", "loss"] = Field("top1", description="what makes weights the best")
    val_interval: int = Field(1, ge=1, description="epochs from one evaluation to the next")
    log_interval: int = Field(50, ge=1, description="batches from one line of progress to the next")
    checkpoint_interval: int | None = Field(
        None, ge=1, description="updates from one training state to the next within an epoch (default: one an epoch)"
    )
    checkpoint_minutes: float | None = Field(
        None, gt=0.0, description="minutes from one training state to the next within an epoch (default: one an epoch)"
    )
    checkpoint_hist: int = Field(10, ge=1, description="training states to keep")
    save_epochs: tuple[Count, ...] = Field((), description="epochs whose training state is kept for good")
    early_stop_patience: int | None = Field(
        None, ge=1, description="stop after so many evaluations without a better eval_metric (default: never)"
    )
