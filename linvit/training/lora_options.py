"""Options of low-rank adapters (LoRA); imports nothing heavy."""

from pydantic import BaseModel, ConfigDict, Field

# Attention and MLP of a ViT, and of rotary models: queries, keys and values apart, gated MLPs.
DEFAULT_TARGETS = ("qkv", "proj", "fc1", "fc2", "q_proj", "k_proj", "v_proj", "fc1_g", "fc1_x")


class LoraOptions(BaseModel):
    """Low-rank adapters (LoRA): train a few weights beside the given ones, which stay as they are."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), defer_build=True)

    lora: int | None = Field(
        None,
        ge=1,
        description="rank of adapters beside linear layers; only these, the classifier, E, F and local are trained; "
        "best/ and last/ hold merged weights (needs the package peft; default: no adapters)",
    )
    lora_targets: tuple[str, ...] = Field(
        DEFAULT_TARGETS,
        description="linear layers with adapters: last parts of their names, or patterns such as 'blocks.[6-9].mlp.*'",
    )
