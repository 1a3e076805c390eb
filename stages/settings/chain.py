"""Settings of a chain: forget requests that come one after another."""

from __future__ import annotations

from pydantic import Field

from duet.stages.settings.base import Name, Settings
from duet.stages.settings.data import DataSettings
from duet.stages.settings.evaluate import EvaluationSet

FIRST = "first"  # what later requests call that of the config's own topic and data


class ChainedRequest(Settings):
    """A forget request that comes after those before it: a run of its own, on the student of the last one."""

    name: Name = Field(description="the request's folder under <run>/chain, and what later requests call it")
    topic: str = Field(min_length=1, description="the topic to forget; fills {topic} in the prefix and in attacks")
    prefix: str | None = Field(
        default=None, description="the teacher's prefix for this request; default: teacher.prefix"
    )
    forget: DataSettings = Field(description="queries about the request's topic")
    retain: DataSettings | None = Field(default=None, description="queries about anything else; default: data.retain")
    sets: dict[Name, EvaluationSet] = Field(
        default={}, description="query sets asked after this request and after all later ones, beside evaluate.sets"
    )
