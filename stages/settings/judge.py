"""Settings of the judge: a language model elsewhere that is asked whether answers are right."""

from __future__ import annotations

from urllib.parse import urlsplit

from pydantic import Field, field_validator

from duet.stages.settings.base import Settings


class JudgeSettings(Settings):
    """A server that judges answers, beside the metrics that count words."""

    url: str = Field(
        description="address of an OpenAI-compatible server, up to its version: http://localhost:8000/v1; a key is read from "
        "the environment variable DUET_JUDGE_KEY and written nowhere"
    )
    model: str = Field(min_length=1, description="which of the server's models")
    prompt: str | None = Field(
        default=None, description="YAML file of the prompt, of the form of stages/exam/judge.yaml; default: that one"
    )

    @field_validator("url")
    @classmethod
    def _an_address_without_secrets(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not an address: expected http://HOST/v1 or https://HOST/v1")
        if parts.username or parts.password or parts.query:
            raise ValueError("it holds a name, a password or a query: put a key into DUET_JUDGE_KEY instead")
        return url.rstrip("/")
