"""`duet evidence`: a run's report, numbers, settings and answers as one zip file with a list of hashes; and its check.

The zip holds what a reader needs to check the report, and neither weights nor logits. The same run gives the same files in the
same order with the same times. SHA256SUMS is in the format of `sha256sum -c`. It guards against damage and slips; whoever can
rewrite the whole zip can rewrite the list, so the zip's own hash, which packing prints, should be kept elsewhere.
"""

from __future__ import annotations

import hashlib
import os
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from duet.cache.errors import UserError
from duet.cache.files import json_bytes, parse_json, publishing, read_json, sha256_file, sha256_json
from duet.cache.manifest import MANIFEST_NAME
from duet.pipeline.commands.report import scored_run
from duet.pipeline.config.run_dir import RunDir
from duet.pipeline.pages.report import rendered
from duet.pipeline.run.provenance import without_places
from duet.pipeline.run.terminal import say
from duet.stages.exam.exam import stem_of
from duet.stages.settings.student import TRAINING_NAME

_RUN = RunDir(Path())  # files of the run have the same names in the zip
CONFIG_NAME, ENVIRONMENT_NAME, RESULTS_NAME, REPORT_NAME, ANSWERS = map(
    str, (_RUN.config, _RUN.environment, _RUN.results, _RUN.report, _RUN.answers)
)
SUMS_NAME, README_NAME = "SHA256SUMS", "README.txt"
MAX_MEMBER_BYTES = 256 * 2**20
EARLIEST = (1980, 1, 1, 0, 0, 0)  # time that a zip can have; all entries have it
SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.IGNORECASE)
README = """Evidence of a run of Duet, which makes a language model forget a topic.

report.html       the report; open it in any browser, it fetches nothing
results.json      every number of the report
config.yaml       the run's settings; of places, only the last names
environment.json  versions and machine
students/         what was recorded of each student's training
stores/           what each store of teacher logits holds, without the logits
answers/          every model's answers, to the questions as they are and under each attack
SHA256SUMS        the hashes of all these: `sha256sum -c SHA256SUMS`

`duet evidence verify FILE.zip` checks the hashes, that nothing is missing or additional, that results, settings, students and
stores fit together, and that report.html is what results.json renders to. Nothing here shows that the topic is gone from the
weights: it is suppressed under these tests, and the report names those that were not made.
"""


def pack(out: str, run: str | None) -> None:
    """Write a run's evidence and print its path and hash; an existing file is not overwritten."""
    path = Path(out)
    if path.suffix != ".zip":
        raise UserError(f"the evidence is a zip file, and {out} does not end in .zip", f"name it {out}.zip")
    if path.exists():
        raise UserError(f"{path} is there already", "choose another name, or remove it")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}", "make it, or choose another place")
    scored = scored_run(run)
    files = evidence_of(scored)
    _refuse_private(files, scored.path)
    files[SUMS_NAME] = sums_of(files)
    with publishing(path) as temporary:
        write_zip(temporary, files)
    say(f"evidence: {path} ({len(files)} files of {scored.path})")
    say(f"sha256: {sha256_file(path)}")


def evidence_of(run: RunDir) -> dict[str, bytes]:
    """All files of the evidence but the list of hashes, by name."""
    results = read_json(run.results)
    page = rendered(results, str(run.results))
    settings = (results.get("provenance") or {}).get("config") or without_places(_run_settings(run) | {"slurm": {}})
    files = {
        README_NAME: README.encode(),
        REPORT_NAME: page.encode(),
        RESULTS_NAME: json_bytes(results),
        CONFIG_NAME: yaml.safe_dump(settings, sort_keys=False, allow_unicode=True).encode(),
        ENVIRONMENT_NAME: _read(run.environment),
    }
    for name in results.get("students") or {}:
        files[_training_name(name)] = _read(run.student(name).training)
    files |= _manifests(run, results)
    for folder in answer_folders(results):
        for path in sorted((run.path / folder).glob("*.json")):
            files[f"{folder}/{path.name}"] = _read(path)
    for name in expected_names(results):
        if name not in files:
            raise UserError(f"{run.path} has no {name}", "run `duet evaluate` for this run again")
    return files


def _run_settings(run: RunDir) -> dict[str, Any]:
    return yaml.safe_load(_read(run.config))


def _manifests(run: RunDir, results: Mapping[str, Any]) -> dict[str, bytes]:
    """The manifests of the run's stores, wherever the run lies now."""
    if not results.get("teacher_stores"):
        return {}
    from duet.pipeline.config.explain import validated
    from duet.pipeline.config.schema import Config
    from duet.pipeline.run.stores import stores_of_run

    here = validated(Config, _run_settings(run), str(run.config)).lying_in(run.path)
    found = {}
    for name, place in stores_of_run(here).items():
        raw = place.read(MANIFEST_NAME)
        if raw is None:
            raise UserError(f"there is no store at {place}", "bring it back, or run `duet teacher-logits` again")
        found[_manifest_name(name)] = raw
    return found


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise UserError(f"there is no {path}", "the run is not complete: run `duet evaluate` with its config again")
    return path.read_bytes()


def _training_name(student: str) -> str:
    return f"students/{student}/{TRAINING_NAME}"


def _manifest_name(teacher: str) -> str:
    return f"stores/{teacher}/{MANIFEST_NAME}"


def expected_names(results: Mapping[str, Any]) -> list[str]:
    """What the evidence of these results must hold, but the list of hashes."""
    return [
        *(README_NAME, REPORT_NAME, RESULTS_NAME, CONFIG_NAME, ENVIRONMENT_NAME),
        *(_training_name(name) for name in results.get("students") or {}),
        *(_manifest_name(name) for name in results.get("teacher_stores") or {}),
        *(f"{ANSWERS}/{stem_of(name)}.json" for name in results["models"]),
    ]


def answer_folders(results: Mapping[str, Any]) -> list[str]:
    """Where answers lie that these results rest on: to the questions as they are, and under each attack."""
    return [ANSWERS, *(f"{ANSWERS}/{attack}" for attack in results.get("attack_costs") or {})]


def _refuse_private(files: Mapping[str, bytes], run_dir: Path) -> None:
    """Refuse to pack files that contain private paths or secrets of this machine."""
    private = {
        f"{place}{os.sep}": "the private path " + str(place) for place in (Path.home(), run_dir.resolve().parent)
    }
    private |= {
        value: f"the value of the environment variable {name}"
        for name, value in os.environ.items()
        if SECRET.search(name) and len(value) >= 8
    }
    for name, data in files.items():
        for text, what in private.items():
            if text.strip(os.sep) and text.encode() in data:
                raise UserError(f"{name} holds {what}", "take it out of the settings or texts of the run")


def sums_of(files: Mapping[str, bytes]) -> bytes:
    """The list of hashes, in the format of `sha256sum`."""
    return "".join(f"{_sha256(files[name])}  {name}\n" for name in sorted(files)).encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    """The same bytes for the same files (and the same zlib): sorted, without times or owners."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name, EARLIEST)
            entry.create_system, entry.external_attr = 3, 0o644 << 16
            archive.writestr(entry, files[name], zipfile.ZIP_DEFLATED, 9)


def verify(out: str) -> None:
    """Check a zip file of evidence; the first fault is a UserError."""
    path = Path(out)
    if not path.is_file():
        raise UserError(f"no such file: {path}", "name a file that `duet evidence` wrote")
    files = _read_zip(path)
    _check_sums(path, files)
    results = parse_json(_member(path, files, RESULTS_NAME), f"{path}: {RESULTS_NAME}")
    page = rendered(results, f"{path}: {RESULTS_NAME}")
    expected = expected_names(results)
    for name in expected:
        _member(path, files, name)
    for name in sorted({*files} - {*expected, SUMS_NAME}):
        folder, _, file = name.rpartition("/")
        if folder not in answer_folders(results) or not re.fullmatch(r"[\w.-]+\.json", file):
            raise _fault(path, f"{name} does not belong to the evidence")
    if files[REPORT_NAME] != page.encode():
        made_by = (results.get("environment") or {}).get("git_revision")
        raise _fault(
            path,
            f"{REPORT_NAME} is not what {RESULTS_NAME} renders to",
            f"it was changed, or made by another version of Duet: the results are of revision {made_by}",
        )
    _check_fit(path, files, results)
    say(f"verified: {path} ({len(files)} files; nothing missing, additional or changed)")
    say(f"sha256: {sha256_file(path)}")


def _fault(
    path: Path, what: str, hint: str = "the file is damaged or was changed: get it again from where it was made"
) -> UserError:
    return UserError(f"{path}: {what}", hint)


def _read_zip(path: Path) -> dict[str, bytes]:
    files: dict[str, bytes] = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                if entry.filename in files:
                    raise _fault(path, f"{entry.filename} occurs twice")
                if entry.file_size > MAX_MEMBER_BYTES:
                    raise _fault(path, f"{entry.filename} is larger than {MAX_MEMBER_BYTES} bytes")
                files[entry.filename] = archive.read(entry)
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, NotImplementedError, ValueError) as error:
        raise _fault(path, f"not a zip file that can be read: {error}") from None
    return files


def _member(path: Path, files: Mapping[str, bytes], name: str) -> bytes:
    if name not in files:
        raise _fault(path, f"{name} is missing")
    return files[name]


def _check_sums(path: Path, files: Mapping[str, bytes]) -> None:
    listed: dict[str, str] = {}
    for line in _member(path, files, SUMS_NAME).decode("utf-8", "replace").splitlines():
        found = re.fullmatch(r"([0-9a-f]{64})  (.+)", line)
        if not found:
            raise _fault(path, f"{SUMS_NAME} has a line that is not a hash and a name: {line!r}")
        listed[found[2]] = found[1]
    for name in sorted({*listed} | {*files} - {SUMS_NAME}):
        if name not in files:
            raise _fault(path, f"{name} is listed in {SUMS_NAME} and missing")
        if name not in listed:
            raise _fault(path, f"{name} is not listed in {SUMS_NAME}")
        if (found := _sha256(files[name])) != listed[name]:
            raise _fault(path, f"the sha256 of {name} is {found}, {SUMS_NAME} says {listed[name]}")


def _check_fit(path: Path, files: Mapping[str, bytes], results: Mapping[str, Any]) -> None:
    """Results, settings, students and stores are of one run."""
    told = results.get("provenance") or {}
    try:
        settings = yaml.safe_load(files[CONFIG_NAME])
    except yaml.YAMLError:
        raise _fault(path, f"{CONFIG_NAME} is not valid YAML") from None
    if told and sha256_json(settings) != told.get("config_sha256"):
        raise _fault(path, f"{CONFIG_NAME} is not the settings that {RESULTS_NAME} names by their hash")
    for name, facts in (results.get("students") or {}).items():
        training = parse_json(files[_training_name(name)], f"{path}: {_training_name(name)}")
        if training != {key: value for key, value in facts.items() if key in training}:
            raise _fault(path, f"{_training_name(name)} says otherwise than {RESULTS_NAME}")
    for name, facts in (results.get("teacher_stores") or {}).items():
        manifest = parse_json(files[_manifest_name(name)], f"{path}: {_manifest_name(name)}")
        if not manifest["fingerprint"] == facts["fingerprint"] == sha256_json(manifest["provenance"]):
            raise _fault(path, f"{_manifest_name(name)} is of another store than {RESULTS_NAME} names")
