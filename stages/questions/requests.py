"""The queries of a config: forget and retain set, broad rows, further forget requests, and the prefix of each."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from duet.cache.errors import UserError, did_you_mean
from duet.cache.record import MAIN_SUBSETS
from duet.stages.questions.documents import load_documents
from duet.stages.questions.queries import Query, load_queries
from duet.stages.settings.data import DocumentSettings, ForgetRequest, RequestData, TrainingData

MAIN = ""  # the request of `topic`, `data` and the teacher's prefix, which has no name
BROAD = "broad"


@dataclass(frozen=True)
class AskedAbout:
    """A row's query and the topic of its request."""

    query: Query
    topic: str


def fill_prefix(prefix: str, topic: str) -> str:
    """The prefix with the topic in place. One that names it in its own words is fine, a mistyped {topic} is not."""
    for name in re.findall(r"\{\s*(\w+)\s*\}", prefix.replace("{topic}", "")):
        if did_you_mean(name.lower(), ["topic"]):
            raise UserError(
                f"the prefix {prefix!r} has {{{name}}}, which is not replaced by anything", "write it {topic}"
            )
    return prefix.replace("{topic}", topic)


def prefixes_of(prefix: str, topic: str, requests: Sequence[ForgetRequest]) -> dict[str, str]:
    """What stands before the queries of each request, by its name, of a teacher with this prefix."""
    further = {request.name: fill_prefix(request.prefix or prefix, request.topic) for request in requests}
    return {MAIN: fill_prefix(prefix, topic), **further}


def queries_of(
    data: TrainingData, requests: Sequence[ForgetRequest], need_answers: bool = False
) -> dict[str, dict[str, list[Query]]]:
    """The forget and retain queries of each request, by its name; a request without a retain set has none there."""
    further = {
        request.name: _queries(request.data, f"requests.{number}.data", need_answers)
        for number, request in enumerate(requests)
    }
    return {MAIN: _queries(data, "data", need_answers), **further}


def broad_of(data: TrainingData) -> dict[str, list[Query]]:
    """The broad rows of each source, by its name. A document is a query whose question is its text."""
    found = {}
    for name, source in data.broad.items():
        where = f"data.broad.{name}"
        if isinstance(source, DocumentSettings):
            texts = load_documents(source.documents, f"{where}.documents")
            found[name] = [Query(str(number), text, None) for number, text in enumerate(texts)]
        else:
            found[name] = load_queries(source, where)
    return found


def subset_of(subset: str, request: str) -> str:
    """A subset of a request, as row ids and errors call it; a row's id is this, a slash, and its query's."""
    return subset if request == MAIN else f"{subset}/{request}"


def asked_about(data: TrainingData, topic: str, requests: Sequence[ForgetRequest]) -> dict[str, AskedAbout]:
    """The query and the topic of each row that a store of these data has, but for documents, by its id, in plan order."""
    topics = {MAIN: topic, **{request.name: request.topic for request in requests}}
    queries = queries_of(data, requests)
    found = {
        f"{subset_of(subset, request)}/{query.row_id}": AskedAbout(query, topics[request])
        for subset in MAIN_SUBSETS
        for request in topics
        for query in queries[request][subset]
    }
    return found | {
        f"{BROAD}/{source}/{query.row_id}": AskedAbout(query, topic)
        for source, of_source in broad_of(data).items()
        if not isinstance(data.broad[source], DocumentSettings)
        for query in of_source
    }


def _queries(data: TrainingData | RequestData, key: str, need_answers: bool) -> dict[str, list[Query]]:
    found = {subset: getattr(data, subset) for subset in MAIN_SUBSETS}
    return {
        subset: load_queries(settings, f"{key}.{subset}", need_answers) if settings else []
        for subset, settings in found.items()
    }
