"""Which of several processes this one is, as torchrun and `accelerate launch` say in the environment."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from duet.cache.errors import UserError
from duet.cache.reader import Rank

_OFF = ("", "0", "no", "false")
# What accelerate's launcher can be told and Duet reads from its own settings: variable -> the setting that does it.
_OWN_SETTINGS = {
    "ACCELERATE_USE_FSDP": "train.parallel: fsdp",
    "ACCELERATE_USE_DEEPSPEED": "train.parallel: fsdp",
    "ACCELERATE_USE_MEGATRON_LM": "train.parallel: fsdp",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "train.parallel: fsdp",
    "ACCELERATE_USE_CPU": "device: cpu",
    "ACCELERATE_MIXED_PRECISION": "train.dtype: bfloat16",
    "ACCELERATE_DYNAMO_BACKEND": "train.compile: true",
}
_WITHOUT_TORCHRUN = {
    "teacher-logits": "start it as often as you like without torchrun: its workers share the store's shards",
    "audit-prefix": "call it once, without torchrun",
    "sample": "call it once, without torchrun",
    "evaluate": "call it once, without torchrun",
    "compare": "call it once, without torchrun",
    "run": "call the stages one by one, and only `duet distill` through torchrun",
}


@dataclass(frozen=True)
class Launch:
    """This process among those of one launch."""

    rank: Rank
    local: int  # number on this machine, and of its GPU

    @property
    def first(self) -> bool:
        return self.rank.number == 0

    def device(self, kind: str) -> str:
        """The device of this process: `cpu`, or the GPU of its number."""
        return kind if kind == "cpu" else f"{kind}:{self.local}"


def launched(environment: Mapping[str, str]) -> Launch:
    """Who this process is; alone where no launcher says otherwise."""
    if "WORLD_SIZE" not in environment:
        return Launch(Rank(), 0)
    numbers = []
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        text = environment.get(name, "")
        if not text.isdigit():
            raise UserError(
                f"{name} is {text!r} in the environment, expected a number", "use torchrun, or unset WORLD_SIZE"
            )
        numbers.append(int(text))
    number, world, local = numbers
    return Launch(Rank(number, world), local)


def check_launcher(environment: Mapping[str, str], kind: str) -> None:
    """Refuse what accelerate's launcher was told to do and nobody would do. `kind` is the device's: cpu or cuda."""
    for name, setting in _OWN_SETTINGS.items():
        value = environment.get(name, "")
        if value.lower() not in _OFF and setting != f"device: {kind}":
            raise UserError(
                f"accelerate was told {name}={value}, which Duet does not read",
                f"set {setting} in the config, and leave it out of accelerate's options and its config file",
            )


def check_alone(command: str, environment: Mapping[str, str]) -> None:
    """Refuse a command other than `distill` in several processes of one launch."""
    world = launched(environment).rank.world
    if world > 1:
        raise UserError(f"`duet {command}` was started as {world} processes of one launch", _WITHOUT_TORCHRUN[command])
