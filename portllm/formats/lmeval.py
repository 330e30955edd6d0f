"""lm-eval's tasks as this tool sees them: lm-eval stays the authority on prompts, targets, metrics and filters.

    locate, definition_digest             where a task is defined, and its identity         (`lmeval_index`)
    members, expand                       what stands behind the name of a group or tag     (`lmeval_groups`)
    build                                 the task object, over local parquet files or a hub data set
    check                                 what a plan must know, and every refusal that can be known before spending
    instances                             evaluation requests as `lm_eval.simple_evaluate` builds them
    training_pairs                        (context, continuation) of the gold choice, zero-shot
    folded_prompts                        rendered prompts, white space folded, to screen for leaks

lm_eval and datasets are imported inside the functions, and torch nowhere. Local parquet is read into memory, past the
cache of `datasets`: changed rows are always seen.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from portllm.errors import ResolveError
from portllm.formats.lmeval_build import FirstDocument, Task, TaskSource, build, data_directory, file_of, quiet
from portllm.formats.lmeval_generation import new_tokens
from portllm.formats.lmeval_groups import Group, expand, members
from portllm.formats.lmeval_index import cache_dir, definition_digest, locate, merged_config
from portllm.formats.lmeval_nulls import null_in_texts
from portllm.formats.lmeval_reading import (
    Reading,
    build_example,
    file_of_examples,
    file_of_split,
    most_shots,
    of_example,
    of_request,
)

__all__ = [
    "Group", "Pair", "TaskFacts", "TaskSource", "build", "cache_dir", "check", "data_directory", "definition_digest",
    "doc_hash", "documents", "expand", "fold", "folded_prompts", "instances", "kind", "locate", "members",
    "merged_config", "primary", "prompt_hash", "prompts", "training_documents", "training_pairs",
]  # fmt: skip


@dataclass(frozen=True)
class TaskFacts:
    """What a plan knows of a task. JSON-able."""

    name: str
    output_type: str
    metric: str
    """Primary metric: the first of the task's list."""
    filter: str
    """Primary filter: `strict-match` where the task has it, else its first."""
    metrics: tuple[str, ...]
    filters: tuple[str, ...]
    split: str
    """The split that is evaluated."""
    documents: int
    """Evaluated documents."""
    training: int
    """Training documents; 0 where there are none."""
    num_fewshot: int
    choices: int
    """Requests of the first document."""
    new_tokens: int
    """Tokens that a generated text may have; 0 where nothing is generated."""
    template: str
    """doc_to_text, or its source where it is a function: tasks that share it may share documents."""


class Pair(NamedTuple):
    """A training document as the request that lm-eval would build for its gold choice."""

    doc_id: int
    prompts: tuple[str, ...]
    """What identifies the document without its label (`prompts`)."""
    context: str
    continuation: str


def fold(text: str) -> str:
    """Text with every run of white space as one blank, none at the ends."""
    return " ".join(text.split())


def prompt_hash(text: str) -> str:
    """sha256 of the folded text, as 64 hex digits."""
    return hashlib.sha256(fold(text).encode()).hexdigest()


def documents(task: Task, limit: int | None = None) -> list[dict[str, Any]]:
    """The evaluated documents, in order; their positions are lm-eval's doc ids."""
    rows = task.task_docs if hasattr(task, "task_docs") else task.eval_docs
    return list(rows)[:limit] if limit else list(rows)


def training_documents(task: Task) -> list[dict[str, Any]]:
    """The training split's documents; empty where the task has none or evaluates the same split."""
    evaluated = task.config.test_split or task.config.validation_split
    if not task.has_training_docs() or task.config.training_split == evaluated:
        return []
    return list(task.training_docs())


def doc_hash(doc: dict[str, Any]) -> str:
    """The hash lm-eval writes for a document in its samples."""
    from lm_eval.utils import handle_non_serializable, hash_string

    return str(hash_string(json.dumps(doc, indent=2, default=handle_non_serializable, ensure_ascii=False)))


def primary(task: Task) -> tuple[str, str]:
    """The metric and the filter a task is judged by: the first of its list of which more is better (LAMBADA's accuracy,
    not its perplexity), else the first; and `strict-match` or its first filter."""
    metrics, filters = list(task.aggregation()), [f.name for f in task._filters]
    metric = next((name for name in metrics if higher_is_better(task, name)), metrics[0])
    return metric, "strict-match" if "strict-match" in filters else filters[0]


def higher_is_better(task: Task, metric: str) -> bool:
    """As the task says; a metric of which it says nothing is taken for one that is better when it is higher."""
    return (task.higher_is_better() or {}).get(metric) is not False


def _context(task: Task, doc: dict[str, Any], num_fewshot: int = 0) -> str | list[str]:
    context: str | list[str] = task.fewshot_context(doc, num_fewshot=num_fewshot, gen_prefix=task.doc_to_prefix(doc))
    return context


def instances(task: Task, limit: int | None = None) -> list[list[Any]]:
    """Per document, the requests of `simple_evaluate`. Once per built task: few-shot sampling goes on where it was."""
    shots = task.config.num_fewshot or 0
    with quiet():
        return [_requests(task, doc, i, _context(task, doc, shots)) for i, doc in enumerate(documents(task, limit))]


def _requests(task: Task, doc: dict[str, Any], doc_id: int, context: str | list[str]) -> list[Any]:
    requests = task.construct_requests(doc=doc, ctx=context, metadata=(task.config.task, doc_id, task.config.repeats))
    return requests if isinstance(requests, list) else [requests]


def kind(name: str, requests: Sequence[Any]) -> str:
    """What the requests of a task ask for: `loglikelihood`, `loglikelihood_rolling` or `generate_until`.

    The requests tell: a task that is a Python class makes them itself, whatever its output type says.
    """
    kinds = sorted({request.request_type for request in requests})
    if len(kinds) > 1:
        raise ResolveError(f"task `{name}` asks for {' and '.join(kinds)} at once: only tasks that ask for one of them "
                           f"are supported")  # fmt: skip
    return str(kinds[0])


def prompts(task: Task, doc: dict[str, Any]) -> tuple[str, ...]:
    """What identifies a document without its label or number: its zero-shot prompt.

    Where the choices fill a gap in the text (WinoGrande), each filled text to its end; where there is no prompt
    (perplexity), the text itself.
    """
    context = _context(task, doc)
    if isinstance(context, list):
        tail = f"{task.config.target_delimiter}{task.doc_to_target(doc)}"
        return tuple(part + tail for part in context)
    return (context if context.strip() else str(task.doc_to_target(doc)),)


def folded_prompts(task: Task) -> list[str]:
    """Every evaluated document's `prompts`, folded."""
    return [fold(prompt) for doc in documents(task) for prompt in prompts(task, doc)]


def training_pairs(task: Task, order: Iterable[int] | None = None) -> Iterator[Pair]:
    """The training documents, in `order` or their own, each as the request lm-eval builds for its gold choice.

    Zero-shot: the prompt has no few-shot header. Raises ResolveError where the task has no training documents.
    """
    rows = training_documents(task)
    if not rows:
        raise ResolveError(f"task `{task.config.task}` has no training documents: add train.parquet to its data, or a "
                           f"training_split of its own to its definition")  # fmt: skip
    for doc_id in range(len(rows)) if order is None else order:
        with quiet():
            context, continuation = _gold_request(task, rows[doc_id], doc_id)
            yield Pair(doc_id, prompts(task, rows[doc_id]), context, continuation)


def _gold_request(task: Task, doc: dict[str, Any], doc_id: int) -> tuple[str, str]:
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        raise ResolveError(f"task `{task.config.task}` measures perplexity and has no answers to train on")
    if task.OUTPUT_TYPE == "generate_until":
        return _answered(task, doc)
    requests = _requests(task, doc, doc_id, _context(task, doc))
    gold = gold_choices(task, doc)[0] if task.OUTPUT_TYPE == "multiple_choice" else 0
    context, continuation = requests[gold].args[:2]
    return context, continuation


def _answered(task: Task, doc: dict[str, Any]) -> tuple[str, str]:
    """A generation task's prompt, and the answer as lm-eval writes it into a few-shot example."""
    turn = functools.partial(
        task.build_qa_turn,
        q=task.doc_to_text(doc),
        c=task.doc_to_choice(doc) if task.config.doc_to_choice else None,
        gen_prefix=task.doc_to_prefix(doc),
        tgt_delim=task.config.target_delimiter,
        few_delim="",
    )
    asked = "".join(message.to_text() for message in turn())
    answered = "".join(message.to_text() for message in turn(a=task.doc_to_target(doc)))
    return str(_context(task, doc)), answered[len(asked) :]


class _Unfit(ResolveError):
    """A document's answer is none of its choices."""


def gold_choices(task: Task, doc: dict[str, Any], read: Reading | None = None) -> list[int]:
    """Positions of a document's right choices. Raises _Unfit where the label is outside them."""
    read = read or of_request(task)
    choices = read.choices(task, doc)
    target = read.asked(task, doc) if task.multiple_input else read.answer(task, doc)
    labels = target if isinstance(target, list) else [target]
    found = [choices.index(x) if isinstance(x, str) and x in choices else x for x in labels]
    if not found or not all(isinstance(x, int) and 0 <= x < len(choices) for x in found):
        raise _Unfit(f"holds {target!r}, which is none of the choices {choices}")
    return found


class _Rows(NamedTuple):
    """Documents to look at."""

    docs: list[dict[str, Any]]
    file: str
    read: Reading


def check(source: TaskSource, training: bool = False) -> TaskFacts:
    """What a plan must know of a task; every evaluated document is looked at, every one that few-shot examples are
    drawn from, and with `training` every training document.

    Raises ResolveError naming task, file and column: a column the templates miss, a null that a prompt would show, a
    label outside the choices, an empty split, more few-shot examples than documents to draw them from; and for
    generation that is not greedy. A task without training documents has `training` 0.
    """
    task = _built(source)
    evaluated, trained = documents(task), training_documents(task)
    if not evaluated:
        raise ResolveError(f"task `{source.name}`: {file_of(source, False)} holds no documents")
    with quiet():
        for rows in _to_check(task, source, evaluated, trained if training else []):
            _check_rows(task, source.name, rows)
        return _facts(task, source, evaluated, len(trained))


def _built(source: TaskSource) -> Task:
    """The task. Raises ResolveError as `build` does; for a first document as for any other that cannot be read."""
    try:
        return build(source)
    except FirstDocument as error:
        with quiet():
            first = _Rows(documents(error.task, 1), file_of(source, False), of_request(error.task))
            _check_rows(error.task, source.name, first)
        raise


def _to_check(task: Task, source: TaskSource, evaluated: list[Any], trained: list[Any]) -> Iterator[_Rows]:
    asked, shown = of_request(task), of_example(task)
    files = [file_of(source, False)]
    yield _Rows(evaluated, files[0], asked)
    if trained:
        files.append(file_of_split(task, source, task.config.training_split))
        yield _Rows(trained, files[1], asked)
    if not task.config.num_fewshot:
        return
    file = file_of_examples(task, source)
    _check_shots(task, source, file, evaluated)
    alike = shown == asked._replace(description=None) and task.fewshot_cfg.process_docs is task.config.process_docs
    if not (alike and file in files):
        yield _Rows(task.sampler.df, file, shown)


def _check_shots(task: Task, source: TaskSource, file: str, evaluated: list[Any]) -> None:
    shots, held = task.config.num_fewshot, len(task.sampler.df)
    if not held:
        raise ResolveError(f"task `{source.name}`: {file} holds no documents to draw few-shot examples from: add "
                           f"some, or give num_fewshot 0")  # fmt: skip
    if shots > (most := most_shots(task, evaluated)):
        raise ResolveError(f"task `{source.name}`: {shots} few-shot examples are asked for, and {file} holds {held} "
                           f"documents to draw them from: num_fewshot can be {most} at most")  # fmt: skip


def _facts(task: Task, source: TaskSource, evaluated: list[dict[str, Any]], training: int) -> TaskFacts:
    requests = _requests(task, evaluated[0], 0, _context(task, evaluated[0]))
    asked = kind(source.name, requests)
    _check_metrics(task, source.name, evaluated[0], [_UNSAID[asked]] * len(requests))
    metric, filter_name = primary(task)
    generates = asked == "generate_until"
    return TaskFacts(
        name=source.name,
        output_type=str(task.OUTPUT_TYPE),
        metric=metric,
        filter=filter_name,
        metrics=tuple(task.aggregation()),
        filters=tuple(f.name for f in task._filters),
        split=task.config.test_split or task.config.validation_split,
        documents=len(evaluated),
        training=training,
        num_fewshot=task.config.num_fewshot,
        choices=len(requests),
        new_tokens=new_tokens(source.name, requests[0].args[1]) if generates else 0,
        template=_template(task.config.doc_to_text),
    )


_UNSAID = {"loglikelihood": (-1.0, False), "loglikelihood_rolling": -1.0, "generate_until": ""}
"""A response that says nothing, by what is asked for."""


def _check_metrics(task: Task, name: str, doc: dict[str, Any], responses: list[Any]) -> None:
    """Raises ResolveError where lm-eval would compute none of the task's metrics, or not know how to sum one up."""
    from lm_eval.api.task import ConfigurableTask

    named = task.aggregation()
    if not named:
        raise ResolveError(f"task `{name}`: its metric_list names no metric")
    for metric, aggregate in named.items():
        if not callable(aggregate):
            raise ResolveError(f"task `{name}`: metric `{metric}`: lm-eval knows no aggregation of the name it gives")
    if type(task) is not ConfigurableTask or task.config.process_results is not None:
        return  # its own code names the metrics
    try:
        found = task.process_results(doc, responses)
    except Exception:  # a metric that cannot judge an answer that says nothing
        return
    named = task.aggregation()  # with what a metric of several numbers has added
    if not named.keys() & found.keys():
        raise ResolveError(f"task `{name}`: for output_type {task.OUTPUT_TYPE} lm-eval computes none of the metrics "
                           f"that its metric_list names: {', '.join(named)}")  # fmt: skip


def _template(spec: Any) -> str:
    return inspect.getsource(spec) if callable(spec) else str(spec)


def _check_rows(task: Task, name: str, rows: _Rows) -> None:
    if found := null_in_texts(task, rows.docs, rows.read):
        raise ResolveError(f"task `{name}`: {rows.file}, document {found[0]}: column `{found[1]}` is null or NaN, and "
                           f"a prompt, target or choice is made of it: fill it, or leave the row out")  # fmt: skip
    for i, doc in _to_look_at(task, rows):
        where = f"task `{name}`: {rows.file}, document {i}"
        try:
            _check_answer(task, doc, rows.read)
            if i == 0:  # templates read the same columns for all
                _make(task, doc, rows.read)
        except _Unfit as error:
            raise ResolveError(f"{where}: {_columns(task, rows.read)} {error}") from None
        except Exception as error:
            raise ResolveError(f"{where}: {_why(task, doc, rows.read, error)}") from error


def _make(task: Task, doc: dict[str, Any], read: Reading) -> None:
    """The document's text, for the errors it raises."""
    _context(task, doc) if read == of_request(task) else build_example(task, doc, read)


def _why(task: Task, doc: dict[str, Any], read: Reading, error: Exception) -> str:
    undefined = re.match(r"'([^']+)' is undefined", str(error))
    column = undefined[1] if undefined else _read_last(task, doc, read)
    if column is None:
        return f"{type(error).__name__}: {error}, and {_columns(task, read)} needs it"
    if column not in doc:
        return f"there is no column `{column}`, which a template reads; there are {', '.join(map(str, doc))}"
    wrong = "which is none of the choices" if isinstance(error, KeyError) else f"{type(error).__name__}: {error}"
    return f"column `{column}` holds {repr(doc[column])[:200]}, {wrong}"


class _Watched(dict[str, Any]):
    """A document that knows which of its columns a function read last."""

    last: str | None = None

    def __getitem__(self, column: str) -> Any:
        self.last = column
        return super().__getitem__(column)


def _read_last(task: Task, doc: dict[str, Any], read: Reading) -> str | None:
    """The column that a function of the task read before it raised; None where no function did."""
    for what in (read.asked, read.answer, read.choices):
        watched = _Watched(doc)
        try:
            what(task, watched)
        except Exception:
            return watched.last
    return None


def _target(task: Task, read: Reading) -> Any:
    return read.text if task.multiple_input else read.target


def _to_look_at(task: Task, rows: _Rows) -> Iterator[tuple[int, dict[str, Any]]]:
    """Every document; the first of each label where the label is a column and the choices are the same for all."""
    spec = _target(task, rows.read)
    if not (isinstance(spec, str) and spec in task.features and isinstance(rows.read.choice, list)):
        yield from enumerate(rows.docs)
        return
    first: dict[str, int] = {}
    for i, doc in enumerate(rows.docs):
        first.setdefault(repr(doc.get(spec)), i)
    yield from ((i, rows.docs[i]) for i in first.values())


def _check_answer(task: Task, doc: dict[str, Any], read: Reading) -> None:
    read.asked(task, doc)  # first, as lm-eval does: where the text is the answer, a function looks it up there
    own = read.target == task.config.doc_to_target
    if own and task.OUTPUT_TYPE == "multiple_choice":
        gold_choices(task, doc, read)
        return
    target = read.answer(task, doc)
    if target is None or target == []:
        raise _Unfit("holds no answer")
    if isinstance(target, str) and not own:
        return  # an example may answer in words of its own
    if read.choice is not None and task.OUTPUT_TYPE in ("multiple_choice", "generate_until"):
        gold_choices(task, doc, read)


def _columns(task: Task, read: Reading) -> str:
    """The columns the answer is read from, in words."""
    spec = _target(task, read)
    if not isinstance(spec, str):
        return f"the answer (function {spec.__name__})" if callable(spec) else "the answer"
    names = [spec] if spec in task.features else [c for c in task.features if re.search(rf"\b{re.escape(c)}\b", spec)]
    return f"column{'s' * (len(names) > 1)} {', '.join(f'`{n}`' for n in names)}" if names else f"the answer `{spec}`"
