"""Settings of query sets and of prompts."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from duet.stages.settings.base import Name, Settings


class DataSettings(Settings):
    """Where a query set comes from and which of its rows are taken."""

    path: str = Field(
        description="a .jsonl, .json, .parquet, .csv or .tsv file, or hf://OWNER/NAME for a Hugging Face data set"
    )
    name: str | None = Field(default=None, description="configuration of the Hugging Face data set")
    split: str = Field(default="train", description="split of the Hugging Face data set")
    question_field: str = Field(
        default="question",
        description="field with the query's text, or with a conversation, a list of messages; a row without a question may "
        "have one in messages",
    )
    answer_field: str = Field(
        default="answer",
        description="field with the reference answer, where no conversation ends in it; only the evaluation needs it",
    )
    turns: Literal["last", "all"] = Field(
        default="last",
        description="answers of a conversation that are asked for: the last, or all, each as a query of its own; the weight 1 "
        "or 0 of an assistant's message goes before it",
    )
    choices_field: str | None = Field(
        default=None, description="field with a list of choices; the answer field then holds the index of the right one"
    )
    paraphrased_field: str | None = Field(
        default=None, description="field with the reference answer in other words; only the evaluation needs it"
    )
    perturbed_field: str | None = Field(
        default=None, description="field with a list of wrong answers; only the evaluation needs it"
    )
    id_field: str | None = Field(
        default=None, description="field with a unique id; without it the row's number in the file is the id"
    )
    rows: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] | None = Field(
        default=None, description="take rows FIRST to STOP-1 of the file, before sampling"
    )
    sample: int | None = Field(
        default=None, ge=1, description="draw this many rows without replacement, kept in file order"
    )
    sample_seed: int = Field(default=0, ge=0, description="seed of the sample")


class EvaluationSet(DataSettings):
    """A query set that is only evaluated."""

    expect: Literal["forgotten", "kept"] = Field(description="the result expected of a good student")
    shots: DataSettings | None = Field(
        default=None, description="questions with answers that are shown first, for MUSE's KnowMem of this set"
    )
    num_shots: int = Field(default=10, ge=1, description="number of shots shown, the first of the file; MUSE: 10")
    translates: str | None = Field(
        default=None,
        description="the set to be forgotten whose questions these are in another language, row by row with the same ids; the "
        "attack translation asks them",
    )
    distance: int | None = Field(
        default=None,
        ge=0,
        description="how far from the topic a set to be kept lies, 0 nearest; the report lists what is kept by distance",
    )

    @model_validator(mode="after")
    def _what_is_forgotten_has_no_distance(self) -> EvaluationSet:
        if self.distance is not None and self.expect == "forgotten":
            raise ValueError("distance is of sets to be kept: leave it out of a set to be forgotten")
        return self


class DocumentSettings(Settings):
    """Plain texts, which teacher and student read as they are; every position is learned."""

    documents: str = Field(
        description=".txt (a document ends at a blank line) or JSON (field text); each is read from its beginning, "
        "and never with others"
    )
    max_tokens: int | None = Field(
        default=None,
        ge=2,
        description="most tokens of a document that are read together; default: what the teacher can read behind its prefix",
    )
    longer: Literal["cut", "split"] = Field(
        default="cut",
        description="of a longer document, cut reads the beginning, and split reads all of it, in parts of like length that "
        "are rows of their own",
    )


def _kind_of(source: Any) -> str:
    """The class that a source of broad rows is read as, by what it names."""
    given = source if isinstance(source, dict) else getattr(source, "model_fields_set", ())
    return "DocumentSettings" if "documents" in given else "DataSettings"


BroadSettings = Annotated[
    Annotated[DataSettings, Tag("DataSettings")] | Annotated[DocumentSettings, Tag("DocumentSettings")],
    Discriminator(_kind_of),
]


class TrainingData(Settings):
    """The queries that the teacher is asked and the student learns from."""

    forget: DataSettings = Field(description="queries about the topic")
    retain: DataSettings = Field(
        description="queries about anything else; asked without the prefix, unless teacher.prefix_on is all"
    )
    broad: dict[Name, BroadSettings] = Field(
        default={},
        description="further rows for all that the student should go on knowing, by the name of their source: questions, which "
        "need no answers (the teacher answers them), or documents",
    )


class PromptSettings(Settings):
    """How a question becomes token ids, with and without a prefix in front."""

    format: Literal["chat", "plain"] = Field(default="chat", description="the tokenizer's chat template, or plain text")
    template: str = Field(default="{question}", description="text around the question; must contain {question}")
    prefix_placement: Literal["system", "text"] = Field(
        default="system", description="prefix as the chat's system message, or as text before the templated question"
    )
    separator: str = Field(
        default="\n",
        description="text between the prefix and the question, or between the prefix and the system message of both prompts",
    )
    system: str | None = Field(
        default=None,
        description="system message of both prompts, the teacher's behind the prefix; default: what the chat template puts in",
    )
    template_name: str | None = Field(
        default=None,
        description="which of the tokenizer's chat templates; default: its only one, or the one named default",
    )
    template_args: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of the chat template, such as enable_thinking: false or reasoning_effort: low",
    )
    date: datetime.date | None = Field(
        default=None,
        description="the date that a chat template gets for today; default: the day of the run's first stage",
    )
    special_tokens_in_text: bool = Field(
        default=False,
        description="accept questions and answers with the text of special tokens, which the tokenizer then reads as such",
    )
    bos: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="beginning-of-sequence token of plain prompts: as the tokenizer does it, always, or never",
    )
    answer: str | None = Field(
        default=None,
        description="text of a given response, with {answer}; default: {answer}, after a space where prompts are plain and do "
        "not end in a line break; white space around an answer of the data is not part of it",
    )


class RequestData(Settings):
    """The queries of a further forget request."""

    forget: DataSettings = Field(description="queries about the request's topic")
    retain: DataSettings | None = Field(
        default=None,
        description="queries about anything else; behind the request's prefix where teacher.prefix_on is all; default: none",
    )


class ForgetRequest(Settings):
    """A further forget request: trained in the same run, each of its queries asked behind its own prefix."""

    name: Name = Field(description="stands in row ids and in the names of its evaluation sets")
    topic: str = Field(min_length=1, description="the topic to forget; fills {topic} in the prefix and in attacks")
    prefix: str | None = Field(default=None, description="the request's prefix; default: each teacher's own")
    data: RequestData = Field(description="the queries of both subsets")
