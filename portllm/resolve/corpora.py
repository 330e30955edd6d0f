"""Corpora: the file, its columns, that it is not empty, and which documents hold an evaluated prompt."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from string import Formatter

from portllm.errors import ResolveError, SpecError
from portllm.formats import text as texts
from portllm.resolve.screen import hits
from portllm.resolve.source import Sources
from portllm.study.conversion import text_recipe
from portllm.study.facts import CorpusFacts
from portllm.study.spec import Corpus

Prompts = Callable[[], Iterable[str]]
"""Prompts of every evaluated document of the study; a call builds the tasks, so it is made only when needed."""


def corpus_facts(name: str, corpus: Corpus, sources: Sources) -> CorpusFacts:
    """A corpus, its columns checked; not yet screened."""
    field = f"corpora.{name}"
    if corpus.hub:
        return CorpusFacts(None, screened=False)
    if corpus.generator:
        _try_generator(field, corpus)
        return CorpusFacts(None, rows=corpus.documents)
    assert corpus.path is not None
    file = sources.file(corpus.path, f"{field}.path")
    format = texts.FORMATS.get(file.suffix)
    if format is None:
        raise ResolveError(f"{field}.path: {file.name} is none of {', '.join(texts.FORMATS)}")
    columns, rows = _columns(field, file, format)
    _require_columns(field, corpus, columns, file)
    if rows == 0:
        raise ResolveError(f"{field}.path: {file} is empty")
    return CorpusFacts(sources.given("corpus", file, [file]), format=format, rows=rows)


def screened(name: str, corpus: Corpus, facts: CorpusFacts, prompts: Prompts) -> CorpusFacts:
    """The facts with the rows that hold an evaluated prompt, and how many tokens there can be at most."""
    source = Path(facts.source.path) if facts.source else None
    try:
        counted = _Counted(texts.documents(text_recipe(corpus, facts.format), source))
        excluded = hits(counted, prompts())
        if not counted.text:
            raise ResolveError("no document holds any text; look at `text` or `template`")
        return replace(facts, excluded=excluded, most_tokens=counted.tokens)
    except ResolveError as error:
        raise ResolveError(f"corpora.{name}: {error}") from None


class _Counted:
    """Documents, whether any of them held text, and what they can be in tokens."""

    def __init__(self, documents: Iterable[str]) -> None:
        self.documents = documents
        self.text = False
        self.tokens = 0

    def __iter__(self) -> Iterator[str]:
        for document in self.documents:
            self.text = self.text or bool(document and not document.isspace())
            self.tokens += len(document.encode(errors="surrogatepass")) + 3  # BOS and a blank before it, EOS after it
            yield document


def _try_generator(field: str, corpus: Corpus) -> None:
    try:
        next(iter(texts.documents(text_recipe(corpus, None), None)), None)
    except SpecError as error:
        raise SpecError(f"{field}: {error}") from None


def _columns(field: str, file: Path, format: str) -> tuple[list[str], int | None]:
    """Columns and rows of a file, without reading its content where the format allows."""
    if format == "parquet":
        import pyarrow
        import pyarrow.parquet

        try:
            parquet = pyarrow.parquet.ParquetFile(file)
        except (pyarrow.ArrowInvalid, OSError) as error:
            raise ResolveError(f"{field}.path: {file} is not parquet: {error}") from None
        return parquet.schema_arrow.names, parquet.metadata.num_rows
    first = next((line for line in _lines(file) if line.strip()), None)
    if format == "text":
        return ["text"], None if first is not None else 0
    if first is None:
        return [], 0
    try:
        row = json.loads(first)
    except ValueError as error:
        raise ResolveError(f"{field}.path: {file}: the first line is not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ResolveError(f"{field}.path: {file}: a line is not a JSON object")
    return list(row), None


def _lines(file: Path) -> Iterable[str]:
    with file.open(encoding="utf-8", errors="replace") as stream:
        yield from stream


def _require_columns(field: str, corpus: Corpus, columns: list[str], file: Path) -> None:
    try:
        named = [n for _, n, _, _ in Formatter().parse(corpus.template or "") if n is not None]
    except ValueError as error:
        raise SpecError(f"{field}.template: {error}; write {{{{ and }}}} for braces") from None
    if corpus.template and not named:
        raise SpecError(f"{field}.template: names no column; write {{column}}")
    wanted = named if corpus.template else [corpus.text or "text"]
    for column in wanted:
        if columns and column.split(".")[0].split("[")[0] not in columns:
            kind = "template" if corpus.template else "text"
            raise ResolveError(f"{field}.{kind}: {file} has no column `{column}`; its columns: {', '.join(columns)}")
