"""Settings of adapters."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from duet.stages.settings.base import Settings


class LoraSettings(Settings):
    """Train low-rank adapters instead of all weights (LoRA, arXiv 2106.09685), through peft."""

    rank: int = Field(ge=1, description="rank of the adapters")
    alpha: float | None = Field(
        default=None, gt=0, description="adapters are scaled by alpha / rank; default: 2 x rank"
    )
    dropout: float = Field(default=0.0, ge=0, lt=1, description="dropout before the adapters")
    targets: tuple[str, ...] | None = Field(
        default=None, description="modules that get an adapter, by the end of their names; default: all linear layers"
    )
    modules_to_save: tuple[str, ...] = Field(
        default=(), description="modules that are trained whole beside the adapters"
    )
    save_adapter: bool = Field(
        default=False, description="write adapter/ for peft too; model/ is always the merged model"
    )
    base_bits: Literal[4] | None = Field(
        default=None,
        description="4 keeps the linear layers under the adapters in 4 bits (NF4, through bitsandbytes), as QLoRA does "
        "(arXiv 2305.14314); model/ is then the rounded base with the adapters; default: in the forward pass's dtype",
    )
