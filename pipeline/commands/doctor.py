"""What `duet doctor` looks at: this machine, this environment, and what a config names. The verdicts are `checks.py`'s."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from duet.cache.errors import EXIT_DONE, EXIT_USER, UserError
from duet.pipeline.commands import checks
from duet.pipeline.commands.checks import FAILED, MISSING, OK, Check
from duet.pipeline.config.load import load_config
from duet.pipeline.config.schema import Config
from duet.pipeline.pages.pdf import BROWSERS
from duet.pipeline.run.named_models import is_here, start_model
from duet.pipeline.run.preflight import checks_of
from duet.pipeline.run.terminal import say, say_json
from duet.stages.settings.teacher import AdaptedModel, Model

PACKAGE = "duet-unlearn"
HUB_TIMEOUT_S, SINFO_TIMEOUT_S = 4, 10


def examine(config_path: str | None, overrides: tuple[str, ...]) -> list[Check]:
    """All checks, of a config too where one is named; one that cannot be read is a failed check."""
    if config_path is None:
        return [*_checks(None)]
    try:
        config = load_config(config_path, overrides)
    except UserError as error:
        return [*_checks(None), Check("config", FAILED, error.what, error.hint)]
    return [*_checks(config), Check("config", OK, f"{config_path}: run {config.run_dir}"), *config_checks(config)]


def _checks(config: Config | None) -> Iterator[Check]:
    try:
        metadata = importlib.metadata.metadata(PACKAGE)
    except importlib.metadata.PackageNotFoundError:
        yield Check("packages", FAILED, f"{PACKAGE} is not installed here", "run `make setup`, or pip install -e .")
        return
    requirements = importlib.metadata.requires(PACKAGE) or []
    yield checks.python_check(platform.python_version(), metadata["Requires-Python"])
    yield checks.packages_check(requirements, version_of)
    yield from _torch_checks(needed=config is not None and config.device == "cuda")
    yield _vllm_check(config)
    yield from _disk_checks(config)
    yield checks.memory_check(available_memory())
    yield checks.cores_check(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    yield _hub_check()
    commands = {name: shutil.which(name) is not None for name in ("sbatch", "squeue", "sinfo")}
    yield checks.slurm_check(commands, _sinfo() if all(commands.values()) else None)
    yield checks.browser_check(next(filter(None, map(shutil.which, BROWSERS)), None))
    needed = checks.needed_extras(config) if config else {}
    yield from checks.extra_checks(metadata.get_all("Provides-Extra") or [], requirements, version_of, needed)


def version_of(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _torch_checks(needed: bool) -> Iterator[Check]:
    try:
        import torch
    except (ImportError, OSError) as error:  # a library that it needs may be missing or broken
        yield checks.torch_check(None, str(error).splitlines()[0] if version_of("torch") else "")
        return
    yield checks.torch_check(torch.__version__)
    found = []
    for number in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(number)
        found.append(checks.Gpu(properties.name, properties.total_memory, properties.major >= 8))
    yield checks.gpu_check(found, shutil.which("nvidia-smi") is not None, needed)


def _vllm_check(config: Config | None) -> Check:
    from duet.stages.engines.choose import engine_version, vllm_fault

    return checks.vllm_check(vllm_fault(), engine_version("vllm"), checks.engine_needed(config) if config else "")


def _disk_checks(config: Config | None) -> Iterator[Check]:
    """Of the run's folder and, where it is another one, of the stores'."""
    from duet.cache.location import is_url

    needed = checks.MIN_DISK_BYTES if config is None else max(checks.MIN_DISK_BYTES, _bytes_of_students(config))
    runs = Path(config.runs_dir) if config else Path()
    yield checks.disk_check("runs_dir", str(runs), shutil.disk_usage(_existing(runs)).free, needed)
    if config and config.store.dir and not is_url(config.store.dir):
        store = Path(config.store.dir)
        yield checks.disk_check("store.dir", str(store), shutil.disk_usage(_existing(store)).free)


def _existing(path: Path) -> Path:
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _bytes_of_students(config: Config) -> int:
    """At most: of each student the weights in float32, and of one a checkpoint (weights and AdamW's two states)."""
    from duet.stages.models.directory import resolve_model
    from duet.stages.models.loading import num_parameters

    sizes = []
    for student in config.students:
        model = start_model(config, student)
        try:
            sizes.append(num_parameters(resolve_model(model, "")) if is_here(model) else 0)
        except UserError:
            sizes.append(0)  # the check of that model says what is wrong with it
    return sum(4 * size for size in sizes) + 12 * max(sizes)


def available_memory() -> int | None:
    """Bytes that programs could still take, as Linux counts them."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _hub_check() -> Check:
    from huggingface_hub import constants, get_token, is_offline_mode

    host = (
        urllib.parse.urlsplit(constants.ENDPOINT).hostname or "the hub"
    )  # no more of the address: it may hold a secret
    fault = None if is_offline_mode() else _unreachable(constants.ENDPOINT)
    return checks.hub_check(host, is_offline_mode(), fault, get_token() is not None)


def _unreachable(url: str) -> str | None:
    """Why an address does not answer, or None. An answer of any kind will do."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=HUB_TIMEOUT_S):
            return None
    except urllib.error.HTTPError as error:
        return None if error.code < 500 else f"it answers {error.code}"
    except urllib.error.URLError as error:
        return str(error.reason)
    except OSError as error:
        return str(error)


def _sinfo() -> tuple[int, str]:
    try:
        done = subprocess.run(
            ["sinfo", "--noheader", "--format=%R"], capture_output=True, text=True, check=False, timeout=SINFO_TIMEOUT_S
        )
    except subprocess.TimeoutExpired:
        return 1, f"no answer within {SINFO_TIMEOUT_S} s"
    lines = (done.stderr if done.returncode else done.stdout).split("\n")
    return done.returncode, " ".join(filter(None, lines[:1] if done.returncode else lines))


def config_checks(config: Config) -> Iterator[Check]:
    """Models found, questions readable, what each stage would refuse of them, and which engine stage one will take."""
    from duet.stages.engines.choose import engine_order

    found = [*_file_checks(config)]
    yield from found
    if all(check.state == OK for check in found):  # else each stage would refuse the same
        yield from _stage_checks(config)
    for name, settings in config.teacher_settings().items():
        order = engine_order(settings.usable_engine)
        otherwise = f"; if it does not start, {order[1]}" if len(order) > 1 else ""
        yield Check(f"engine of {name}", OK, f"{order[0]}, teacher.engine is {settings.engine}{otherwise}")


def _file_checks(config: Config) -> Iterator[Check]:
    from duet.stages.questions.queries import load_queries

    for key, model in checks.models_of(config).items():
        yield model_check(key, model, config.teacher.trust_remote_code)
    yield from _start_checks(config)
    for key, settings in checks.data_of(config).items():
        try:
            scored = not key.startswith("data.broad.")
            queries = load_queries(settings, key, need_answers=scored)
            yield Check(key, OK, f"{settings.path}: {len(queries)} questions")
        except UserError as error:
            yield _failed(key, error)


def _stage_checks(config: Config) -> Iterator[Check]:
    for what, check in checks_of(config):
        try:
            yield Check(what, OK, check())
        except UserError as error:
            yield Check(what, FAILED, error.what, error.hint)


def _start_checks(config: Config) -> Iterator[Check]:
    """Of students that cannot start from their models, though these are whole."""
    from duet.stages.models.directory import check_trainable_start, small_files

    for student in config.students:
        key, model = f"students.{student.name}.model", start_model(config, student)
        if is_here(model) and model_check(key, model).state == OK:
            try:
                check_trainable_start(small_files(model, key), key)
            except UserError as error:
                yield _failed(key, error)


def _failed(key: str, error: UserError) -> Check:
    return Check(key, FAILED, error.what.removeprefix(f"{key}: "), error.hint)


def model_check(key: str, model: Model, trust_remote_code: bool = False) -> Check:
    """A directory must be whole; of the hub, a model must be there or in the cache: nothing large is fetched."""
    from duet.stages.models.directory import check_quantisation, described, resolve_model
    from duet.stages.models.tokenizers import load_tokenizer

    if isinstance(model, AdaptedModel) and not is_here(model):
        parts = [model_check(key, part, trust_remote_code) for part in (model.model, model.adapter)]
        return next((part for part in parts if part.state != OK), Check(key, OK, "; ".join(p.found for p in parts)))
    if not isinstance(model, AdaptedModel) and (on_hub := _hub_model_check(key, model)):
        return on_hub
    try:
        folder = resolve_model(model, key)
        check_quantisation(folder, f"{key}: {model}", trust_remote_code)
        load_tokenizer(folder, trust_remote_code)
    except UserError as error:
        return _failed(key, error)
    files = described(folder)
    notes = [
        f", an adapter for {files.folder}" if files.adapter else f", {_place(str(model), files.folder)}",
        f", quantised with {files.quantised}" if files.quantised else "",
        f"; not read: {', '.join(files.unread)}" if files.unread else "",
    ]
    return Check(key, OK, f"{model}{''.join(notes)}")


def _place(model: str, folder: Path) -> str:
    return "a directory" if Path(model).resolve() == folder.resolve() else f"dequantised in {folder}"


def _hub_model_check(key: str, model: str) -> Check | None:
    """Of a model on the hub; None for anything else."""
    from huggingface_hub import HfApi, snapshot_download

    from duet.stages.models.locations import is_hub_id

    if Path(model).exists() or not is_hub_id(model):
        return None
    try:
        snapshot_download(model, local_files_only=True)
        return Check(key, OK, f"{model}, in the hub's cache on this machine")
    except (OSError, ValueError):
        pass  # not in the cache
    try:
        info: Any = HfApi().model_info(model, timeout=HUB_TIMEOUT_S)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        return Check(
            key, FAILED, f"{model} is not here, and the hub: {why}", "check the name, the network and your token"
        )
    return Check(key, OK, f"{info.id}, on the hub; it is fetched when a stage needs it")


def doctor(config_path: str | None, overrides: tuple[str, ...], as_json: bool) -> int:
    """Run all checks, tell them, and return 0 if everything that is needed works, else 2."""
    found = examine(config_path, overrides)
    failed = [check.name for check in found if check.state == FAILED]
    missing = [check.name for check in found if check.state == MISSING]
    if as_json:
        say_json({"ok": not failed, "checks": [asdict(check) for check in found]})
    for check in found:
        state = "missing (optional)" if check.state == MISSING else check.state
        say(f"{state:<19} {check.name}: {check.found}")
        if check.hint:
            say(f"{'':<19} hint: {check.hint}")
    optional = f"; optional and missing: {', '.join(missing)}" if missing else ""
    what = f"FAILED: {', '.join(failed)}" if failed else "everything that is needed works"
    say(f"{what} ({len(found)} checks{optional})")
    return EXIT_USER if failed else EXIT_DONE
