"""lm-eval's tasks, found, built and checked: real definitions over real and made-up data."""

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from portllm.errors import ResolveError
from portllm.formats import lmeval
from portllm.formats.lmeval import TaskSource
from tests.toys import write_parquet, write_tasks

SENTENCES = [{"sentence": "it was good", "label": 1}, {"sentence": "it was  bad", "label": 0}]


@pytest.fixture
def sst2(tmp_path):
    """Data of the task sst2, two rows each."""
    return data(tmp_path / "sst2", SENTENCES, SENTENCES)


def data(path: Path, train: list[dict] | None, validation: list[dict]) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    if train is not None:
        write_parquet(path / "train.parquet", train)
    write_parquet(path / "validation.parquet", validation)
    return path


def pairs(source: TaskSource) -> list[lmeval.Pair]:
    return list(lmeval.training_pairs(lmeval.build(source)))


# --------------------------------------------------------------------------------------------------------- definitions


def test_built_in_tasks_are_found_where_lm_eval_defines_them():
    files = {"sst2": "glue/sst2/default.yaml", "gsm8k": "gsm8k/gsm8k.yaml", "mmlu": "mmlu/default/_mmlu.yaml"}
    for name, file in files.items():
        assert lmeval.locate(name).as_posix().endswith(f"lm_eval/tasks/{file}")


def test_the_users_own_definition_comes_before_lm_evals(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: sst2\n")
    assert lmeval.locate("sst2", tmp_path) == tmp_path / "mine.yaml"
    assert lmeval.locate("rte", tmp_path) == lmeval.locate("rte")


def test_a_byte_order_mark_hides_no_definition(tmp_path):
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbftask: marked\n")
    assert lmeval.expand("marked", tmp_path) == ["marked"]


def test_an_unknown_task_names_the_nearest_ones():
    with pytest.raises(ResolveError, match=r"no task `winogrand`: did you mean `winogrande`"):
        lmeval.locate("winogrand")


def test_an_include_path_that_is_no_directory_is_refused(tmp_path):
    with pytest.raises(ResolveError, match="is not a directory"):
        lmeval.locate("sst2", tmp_path / "nowhere")


def test_groups_and_tags_expand_to_tasks_but_not_where_they_change_them():
    assert lmeval.expand("sst2") == ["sst2"]
    assert lmeval.expand("ai2_arc") == ["arc_challenge", "arc_easy"]  # a tag
    assert "sst2" in lmeval.expand("glue") and len(lmeval.expand("mmlu")) == 57
    with pytest.raises(ResolveError, match="group `openllm` changes its members"):
        lmeval.expand("openllm")
    with pytest.raises(ResolveError, match="is a group: name its tasks: mmlu_"):
        lmeval.build(TaskSource("mmlu"))


def test_definition_digest_follows_includes_and_functions_and_nothing_else(tmp_path):
    (tmp_path / "base.yml").write_text("output_type: multiple_choice\n")
    (tmp_path / "mine.yaml").write_text("include: base.yml\ntask: mine\ndoc_to_text: !function words.text\n")
    (tmp_path / "words.py").write_text("import helper\ndef text(doc): return helper.x\n")
    (tmp_path / "helper.py").write_text("x = 'a'\n")
    digests = [lmeval.definition_digest(tmp_path / "mine.yaml")]
    for name in ("base.yml", "words.py", "helper.py", "mine.yaml"):
        with (tmp_path / name).open("a") as file:
            file.write("# changed\n")
        digests.append(lmeval.definition_digest(tmp_path / "mine.yaml"))
    assert len(set(digests)) == 5
    (tmp_path / "stranger.py").write_text("")
    assert lmeval.definition_digest(tmp_path / "mine.yaml") == digests[-1]


def test_definition_digest_follows_functions_of_an_installed_module_wherever_it_lies(tmp_path, monkeypatch):
    (tmp_path / "mine.yaml").write_text("task: mine\ndoc_to_text: !function words_of_mine.texts.text\n")
    digests = []
    for place, text in (("here", "x"), ("there", "x"), ("there", "y")):
        package = tmp_path / place / "words_of_mine"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("")
        (package / "texts.py").write_text(f"def text(doc): return '{text}'\n")
        with monkeypatch.context() as patched:
            patched.syspath_prepend(str(tmp_path / place))
            for name in [name for name in sys.modules if name.startswith("words_of_mine")]:
                patched.delitem(sys.modules, name)
            digests.append(lmeval.definition_digest(tmp_path / "mine.yaml"))
            for name in [name for name in sys.modules if name.startswith("words_of_mine")]:
                del sys.modules[name]
    assert digests[0] == digests[1] != digests[2]


def test_a_word_as_target_is_taken_from_lm_evals_own_definitions_and_data_only(tmp_path, monkeypatch):
    from portllm.formats import lmeval_index

    rows = data(tmp_path / "data", None, [{"text": "a"}, {"text": "b"}]) / "validation.parquet"
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tasks / "all.yaml").write_text(
        "task: every\ndataset_path: parquet\noutput_type: generate_until\nvalidation_split: validation\n"
        f"doc_to_text: text\ndoc_to_target: all\ndataset_kwargs: {{data_files: {{validation: {rows}}}}}\n"
    )
    with pytest.raises(ResolveError, match=r"no column `all`.*if the word itself is meant, write \{\{'all'\}\}"):
        lmeval.build(TaskSource("every", tasks))
    monkeypatch.setenv("PORTLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lmeval_index, "_scanned", {})
    monkeypatch.setattr(lmeval_index, "_tasks_root", lambda: tasks)
    assert lmeval.check(TaskSource("every")).documents == 2
    with pytest.raises(ResolveError, match="no column `all`"):
        lmeval.build(TaskSource("every", data=tmp_path / "data"))


def test_an_index_kept_for_another_tree_is_made_anew(monkeypatch, tmp_path):
    from portllm.formats import lmeval_index

    monkeypatch.setenv("PORTLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lmeval_index, "_scanned", {})
    monkeypatch.setattr(lmeval_index, "_tasks_root", lambda: tmp_path / "tasks")
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "one.yaml").write_text('"task": "one"  # quoted\ntag:\n  - all\n')
    assert lmeval.locate("one") == tmp_path / "tasks" / "one.yaml"
    (tmp_path / "tasks" / "two.yaml").write_text("task: two\ntag: [all]\n")
    lmeval_index._scanned.clear()  # another process
    assert lmeval.locate("two") == tmp_path / "tasks" / "two.yaml"
    assert lmeval.expand("all") == ["one", "two"]


def test_neither_finding_nor_checking_a_task_loads_torch(sst2):
    script = f"""
import sys
from pathlib import Path
from portllm.formats import lmeval
lmeval.locate("sst2"), lmeval.definition_digest(lmeval.locate("winogrande"))
assert not {{"lm_eval", "datasets", "torch"}} & set(sys.modules)
lmeval.check(lmeval.TaskSource("sst2", data=Path({str(sst2)!r})), training=True)
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


# ----------------------------------------------------------------------------------------------------------------- data


def test_facts_of_a_task_are_json(sst2):
    facts = lmeval.check(TaskSource("sst2", data=sst2), training=True)
    assert json.loads(json.dumps(asdict(facts)))["metrics"] == ["acc"]
    assert (facts.output_type, facts.metric, facts.filter) == ("multiple_choice", "acc", "none")
    assert facts.split == "validation"
    assert (facts.documents, facts.training, facts.num_fewshot, facts.choices) == (2, 2, 0, 2)
    assert facts.template.startswith("{{sentence}}")


def test_validation_rows_serve_whichever_split_the_task_evaluates(tmp_path):
    rows = [{"question": f"{i}+1?", "answer": f"so {i + 1}\n#### {i + 1}"} for i in range(8)]
    task = lmeval.build(TaskSource("gsm8k", data=data(tmp_path, rows[:6], rows[6:])))
    assert lmeval.documents(task) == rows[6:] and lmeval.training_documents(task) == rows[:6]
    assert lmeval.primary(task) == ("exact_match", "strict-match")
    assert task.config.num_fewshot == 5
    assert lmeval.build(TaskSource("gsm8k", data=tmp_path, num_fewshot=0)).config.num_fewshot == 0


def test_changed_rows_are_seen_at_once(sst2):
    lmeval.build(TaskSource("sst2", data=sst2))
    data(sst2, SENTENCES, [{"sentence": "quite another one", "label": 1}])
    task = lmeval.build(TaskSource("sst2", data=sst2))
    assert [doc["sentence"] for doc in lmeval.documents(task)] == ["quite another one"]


def test_rows_are_those_of_a_plain_data_set(sst2):
    import datasets

    task = lmeval.build(TaskSource("sst2", data=sst2))
    plain = datasets.Dataset(pq.read_table(sst2 / "validation.parquet"))
    assert lmeval.documents(task) == list(plain)
    assert list(task.task_docs.shuffle(seed=3)) == list(plain.shuffle(seed=3))
    assert next(iter(task.task_docs.with_format("numpy")))["label"] == 1


def test_a_task_without_train_parquet_can_be_evaluated_and_not_trained_on(tmp_path):
    source = TaskSource("sst2", data=data(tmp_path, None, SENTENCES))
    assert lmeval.check(source, training=True).training == 0
    with pytest.raises(ResolveError, match=r"no training documents: add train\.parquet"):
        pairs(source)


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ([], r"validation.parquet holds no rows"),
        (
            [{"text": "a", "label": 1}],
            r"validation.parquet, document 0: there is no column `sentence`.*there are text, label",
        ),
        ([{"sentence": "a", "class": 1}], r"validation.parquet has no column `label`, which doc_to_target reads"),
        ([{"sentence": "a", "label": 0}, {"sentence": "b", "label": 2}], "document 1: column `label` holds 2"),
        ([{"sentence": "a", "label": -1}], r"document 0: column `label` holds -1"),
        ([{"sentence": "a", "label": "maybe"}], r"column `label` holds 'maybe', which is none of the choices \['neg"),
        ([{"sentence": "a", "label": 2}], r"document 0: column `label` holds 2, which is none of the choices \['neg"),
    ],
)
def test_malformed_data_name_task_file_and_column(tmp_path, validation, message):
    schema = None if validation else pa.schema([("sentence", pa.string()), ("label", pa.int64())])
    data(tmp_path, SENTENCES, SENTENCES)
    pq.write_table(pa.Table.from_pylist(validation, schema=schema), tmp_path / "validation.parquet")
    with pytest.raises(ResolveError, match="`sst2`.*" + message):
        lmeval.check(TaskSource("sst2", data=tmp_path))


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"answer": "3"}, r"column `answer` holds '3', which is none of the choices"),
        ({"answer": ""}, r"column `answer` holds '', which is none of the choices"),
        ({"sentence": "no gap"}, r"column `sentence` holds 'no gap', ValueError: substring not found"),
    ],
)
def test_what_a_function_cannot_take_names_its_column(tmp_path, row, wrong, message):
    fine = {"sentence": "Ann saw Eve because _ was near.", "option1": "Ann", "option2": "Eve", "answer": "1"}
    rows = [fine, fine]
    rows[row] = fine | wrong
    with pytest.raises(ResolveError, match=rf"`winogrande`: .*validation\.parquet, document {row}: {message}"):
        lmeval.check(TaskSource("winogrande", data=data(tmp_path, None, rows)))


@pytest.mark.parametrize(
    ("null", "texts", "column"),
    [
        ({"hint": None}, {"doc_to_text": "{{word}}{% if hint %} ({{hint}}){% endif %}"}, None),
        ({"hint": None}, {"doc_to_text": "{{word}} None"}, None),
        ({"hint": None}, {"doc_to_text": "{{word}} ({{hint or 'none'}})"}, None),
        ({"hint": None}, {"doc_to_text": "{{word}} ({{hint}})"}, "hint"),
        ({"hint": None}, {"doc_to_text": "{{word}} {{hint.strip()}}"}, "hint"),
        ({"hint": None}, {"doc_to_text": "hint"}, "hint"),
        ({"hint": None}, {"doc_to_text": "{{word}}", "description": "{{hint}} "}, "hint"),
        ({"hint": None}, {"doc_to_text": "{{word}} {{hint|lower}}"}, "hint"),
        ({"hint": None}, {"doc_to_text": "{{word ~ hint}}"}, "hint"),
        ({"hint": None}, {"doc_to_text": "{{word}} {{hint|upper}}"}, "hint"),
        ({"hint": None}, {"doc_to_text": "{{word}} {{hint|string|trim}}"}, "hint"),
        ({"hint": None}, {"doc_to_text": "{{word}} {{hint|tojson}}"}, "hint"),
        ({"hint": None}, {"doc_to_text": "{{word}} {{hint}}{% if hint %}!{% endif %}"}, "hint"),
        ({"hint": None}, {"doc_to_text": "{% if hint is none %}None given{% else %}{{hint}}{% endif %}"}, None),
        ({"hint": None}, {"doc_to_text": "{% if not hint %}None given{% else %}{{hint}}{% endif %}"}, None),
        ({"hint": None, "word": "null and None"}, {"doc_to_text": "{{word}}{% if hint %}{{hint}}{% endif %}"}, None),
        ({"many": ["a", None]}, {"doc_to_text": "{{word}} {{many}}"}, "many"),
        ({"many": ["a", None]}, {"doc_to_text": "{{word}} {{many|tojson}}"}, "many"),
        ({"share": float("nan")}, {"doc_to_text": "{{word}} {{share}}"}, "share"),
        ({"share": float("nan")}, {"doc_to_text": "{{word}} {{(100 * share)|round(1)}}%"}, "share"),
        ({"share": float("nan")}, {"doc_to_text": "{{word}}{% if share > 0 %} {{share}}{% endif %}"}, None),
        ({"share": float("nan"), "word": "nan"}, {"doc_to_text": "{{word}}"}, None),
        ({"hint": None}, {"doc_to_text": "{{word}}", "gen_prefix": "{{hint}}"}, "hint"),
        ({"other": None}, {"doc_to_text": "word", "doc_to_choice": "{{[right, other]}}"}, "other"),
        ({"right": None}, {"doc_to_text": "word", "doc_to_target": "right"}, "right"),
        ({"many": ["a", None]}, {"doc_to_text": "{{word}} {{many[1]}}"}, "many"),
        ({"many": ["a", None]}, {"doc_to_text": "{{word}} {{many[0]}}"}, None),
    ],
)
def test_a_null_is_refused_where_a_prompt_target_or_choice_would_show_it(tmp_path, null, texts, column):
    row = {"word": "w", "hint": "h", "right": "yes", "other": "no", "many": ["a", "b"], "share": 0.5}
    kind = "multiple_choice" if "doc_to_choice" in texts else "generate_until"
    settings = {"doc_to_target": "{{right}}"} | texts
    lines = [f"task: mine\ndataset_path: parquet\nvalidation_split: validation\noutput_type: {kind}"]
    (tmp_path / "mine.yaml").write_text("\n".join([*lines, *(f"{k}: {json.dumps(v)}" for k, v in settings.items())]))
    source = TaskSource("mine", tmp_path, data(tmp_path / "data", None, [row, row, row | null]))
    if column is None:
        assert lmeval.check(source).documents == 3
        return
    with pytest.raises(ResolveError, match=rf"`mine`: .*validation\.parquet, document 2: column `{column}` is null"):
        lmeval.check(source)


def test_a_null_in_training_rows_and_before_a_function_is_refused(tmp_path, sst2):
    data(sst2, [*SENTENCES, {"sentence": None, "label": 1}], SENTENCES)
    with pytest.raises(ResolveError, match=r"`sst2`: .*train\.parquet, document 2: column `sentence` is null"):
        lmeval.check(TaskSource("sst2", data=sst2), training=True)
    row = {"sentence": "Ann saw Eve because _ was near.", "option1": "Ann", "option2": "Eve", "answer": "1"}
    source = TaskSource("winogrande", data=data(tmp_path / "w", None, [row, row | {"sentence": None}]))
    with pytest.raises(ResolveError, match=r"document 1: column `sentence` is null"):
        lmeval.check(source)
    data(tmp_path / "w", None, [row, row | {"option2": None}])
    with pytest.raises(ResolveError, match=r"document 1: column `option2` is null"):
        lmeval.check(source)


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"do_sample": True, "temperature": 0.7}, "generation_kwargs ask for do_sample: True, temperature: 0.7, and"),
        ({"temperature": 0.7}, "generation_kwargs ask for temperature: 0.7, and only greedy"),
        ({"num_beams": 4, "length_penalty": 2.0}, "ask for num_beams: 4, and only greedy"),
        ({"repetition_penalty": 1.1}, "ask for repetition_penalty: 1.1, and only greedy"),
        ({"guidance_scale": 1.5}, "ask for guidance_scale: 1.5, and only greedy"),
        ({"max_gen_toks": 0}, "max_gen_toks is 0: give 1 or more"),
        ({"max_gen_toks": "many"}, "cannot be read"),
        ({}, 256),
        ({"max_new_tokens": 9}, 9),
        ({"do_sample": False, "temperature": 1.0, "max_gen_toks": 7}, 7),
        ({"num_beams": 1, "length_penalty": 2.0, "early_stopping": True, "repetition_penalty": 1}, 256),
        ({"bad_words_ids": None, "min_length": 0, "no_repeat_ngram_size": 0, "num_return_sequences": 1}, 256),
    ],
)
def test_only_greedy_generation_passes(tmp_path, asked, found):
    settings = json.dumps({"until": ["x"]} | asked)
    (tmp_path / "mine.yaml").write_text(
        "task: mine\ndataset_path: parquet\nvalidation_split: validation\noutput_type: generate_until\n"
        f"doc_to_text: sentence\ndoc_to_target: label\ngeneration_kwargs: {settings}\n"
    )
    source = TaskSource("mine", tmp_path, data(tmp_path / "data", None, SENTENCES))
    if isinstance(found, int):
        assert lmeval.check(source).new_tokens == found
        return
    with pytest.raises(ResolveError, match=f"task `mine`: .*{found}"):
        lmeval.check(source)


def shown(tmp_path: Path, examples: list[dict] | None, shots: int = 2, **settings) -> TaskSource:
    """A task laid out as mmlu is: `test` evaluated, few-shot examples from `dev`, here dev.parquet."""
    written = {"task": "mine", "dataset_path": "parquet", "output_type": "multiple_choice", "test_split": "test",
               "fewshot_split": "dev", "doc_to_text": "{{sentence}} ?", "doc_to_target": "label",
               "doc_to_choice": ["bad", "good"]} | settings  # fmt: skip
    (tmp_path / "mine.yaml").write_text("\n".join(f"{k}: {json.dumps(v)}" for k, v in written.items() if v is not None))
    where = data(tmp_path / "data", None, SENTENCES)
    if examples is not None:
        write_parquet(where / "dev.parquet", examples)
    return TaskSource("mine", tmp_path, where, num_fewshot=shots)


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ([*SENTENCES, {"sentence": "c", "label": 7}], r"dev\.parquet, document 2: column `label` holds 7"),
        ([*SENTENCES, {"sentence": None, "label": 0}], r"dev\.parquet, document 2: column `sentence` is null"),
        (
            [{"words": "c", "label": 0}] * 3,
            r"dev\.parquet, document 0: there is no column `sentence`.*; there are words, label",
        ),
        ([{"sentence": "c", "class": 0}] * 3, r"dev\.parquet, document 0: there is no column `label`"),
        (None, r"train\.parquet holds no documents to draw few-shot examples from"),
        (SENTENCES[:1], r"2 few-shot examples are asked for, and .*dev\.parquet holds 1 documents.* can be 1 at most"),
    ],
)
def test_rows_that_few_shot_examples_are_drawn_from_are_looked_at(tmp_path, examples, message):
    with pytest.raises(ResolveError, match=f"`mine`: .*{message}"):
        lmeval.check(shown(tmp_path, examples))
    if examples is not None:
        assert lmeval.check(shown(tmp_path, examples, shots=0)).num_fewshot == 0


def test_good_few_shot_examples_pass_and_are_shown(tmp_path):
    source = shown(tmp_path, SENTENCES)
    assert lmeval.check(source).num_fewshot == 2
    assert "it was good ? good" in lmeval.instances(lmeval.build(source))[0][0].args[0]


def test_few_shot_examples_are_read_as_their_own_templates_read_them(tmp_path):
    rows = [row | {"why": "so"} for row in SENTENCES]
    own = {"doc_to_text": "{{sentence}}, {{why}}:", "doc_to_target": "{{why}} it is"}
    assert lmeval.check(shown(tmp_path, rows, fewshot_config=own))
    with pytest.raises(ResolveError, match=r"dev\.parquet, document 1: column `why` is null"):
        lmeval.check(shown(tmp_path, [rows[0], rows[1] | {"why": None}], fewshot_config=own))
    with pytest.raises(ResolveError, match=r"dev\.parquet, document 0: there is no column `why`"):
        lmeval.check(shown(tmp_path, SENTENCES, fewshot_config=own))


def test_a_list_of_few_shot_examples_is_looked_at(tmp_path):
    listed = {"fewshot_split": None, "fewshot_config": {"sampler": "first_n", "samples": SENTENCES}}
    assert lmeval.check(shown(tmp_path, None, **listed | {"test_split": "test"})).num_fewshot == 2
    listed["fewshot_config"] = {"sampler": "first_n", "samples": [SENTENCES[0], {"sentence": "c", "label": 7}]}
    with pytest.raises(ResolveError, match=r"its fewshot_config\.samples, document 1: column `label` holds 7"):
        lmeval.check(shown(tmp_path, None, **listed))


@pytest.mark.parametrize("sampler", ["default", "first_n"])
@pytest.mark.parametrize("evaluated", ["test", "dev"])
def test_the_most_few_shot_examples_are_as_many_as_lm_eval_can_draw(tmp_path, sampler, evaluated):
    rows = [{"sentence": f"{n}", "label": n % 2} for n in range(4)]
    split = {"fewshot_split": evaluated, "fewshot_config": {"sampler": sampler}}
    most = 3 if evaluated == "test" else 4
    for shots in (most, most + 1):
        source = shown(tmp_path, rows, shots, **split)
        write_parquet(source.data / "validation.parquet", rows)
        if shots == most:
            assert lmeval.check(source).num_fewshot == most
            assert len(lmeval.instances(lmeval.build(source))) == 4
            continue
        with pytest.raises(ResolveError, match=rf"holds 4 documents .* num_fewshot can be {most} at most"):
            lmeval.check(source)
        with pytest.raises((ValueError, AssertionError)):
            lmeval.instances(lmeval.build(source))


def test_no_row_is_looked_at_twice(monkeypatch, sst2):
    seen = []
    monkeypatch.setattr(lmeval, "null_in_texts", lambda task, rows, read: seen.append(len(rows)))
    data(sst2, SENTENCES * 3, SENTENCES)
    for shots, training in ((0, False), (0, True), (2, False), (2, True)):
        lmeval.check(TaskSource("sst2", data=sst2, num_fewshot=shots), training)
    assert seen == [2, 2, 6, 2, 6, 2, 6]


def test_training_rows_are_looked_at_too(tmp_path):
    source = TaskSource("sst2", data=data(tmp_path, [*SENTENCES, {"sentence": "c", "label": 7}], SENTENCES))
    lmeval.check(source)
    with pytest.raises(ResolveError, match=r"train.parquet, document 2: column `label` holds 7"):
        lmeval.check(source, training=True)
    data(tmp_path, [{"words": "c", "label": 1}], SENTENCES)
    with pytest.raises(ResolveError, match=r"train.parquet, document 0: .*sentence"):
        lmeval.check(source, training=True)


def test_missing_and_unreadable_files_are_named(tmp_path):
    with pytest.raises(ResolveError, match=r"there is no .*validation\.parquet"):
        lmeval.build(TaskSource("sst2", data=tmp_path))
    (tmp_path / "validation.parquet").write_text("not parquet")
    with pytest.raises(ResolveError, match=r"validation\.parquet cannot be read as parquet"):
        lmeval.build(TaskSource("sst2", data=tmp_path))


def test_hub_data_out_of_reach_say_what_to_do(monkeypatch, tmp_path):
    import datasets

    def offline(*_, **__):
        raise ConnectionError("Couldn't reach 'nyu-mll/glue' on the Hub (offline)")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(ResolveError, match=r"`sst2`: its data set cannot be read from the hub.*data_root/sst2"):
        lmeval.build(TaskSource("sst2", revision="0" * 40))


@pytest.mark.parametrize(("name", "message"), [("humaneval", "runs the code"), ("mmmu_val_art", "images")])
def test_tasks_that_are_not_text_alone_are_refused_before_their_code_is_imported(name, message):
    with pytest.raises(ResolveError, match=message):
        lmeval.build(TaskSource(name))


def test_labels_a_function_looks_up_are_named_by_their_column(tmp_path):
    row = {"sentence": "Ann saw Eve because _ was near.", "option1": "Ann", "option2": "Eve"}
    rows = [row | {"answer": answer} for answer in "13"]
    with pytest.raises(ResolveError, match=r"document 1: column `answer` holds '3', which is none of the choices"):
        lmeval.check(TaskSource("winogrande", data=data(tmp_path, rows[:1], rows)))


# --------------------------------------------------------------------------------------------------------------- pairs


def test_multiple_choice_trains_on_the_gold_choice(sst2):
    first = pairs(TaskSource("sst2", data=sst2))[0]
    assert first.context == "it was good\nQuestion: Is this sentence positive or negative?\nAnswer:"
    assert (first.doc_id, first.continuation, first.prompts) == (0, " positive", (first.context,))


def test_choices_that_fill_a_gap_train_on_the_gold_context(tmp_path):
    rows = [{"sentence": "Ann saw Eve because _ was near.", "option1": "Ann", "option2": "Eve", "answer": "2"}]
    pair = pairs(TaskSource("winogrande", data=data(tmp_path, rows, rows)))[0]
    assert (pair.context, pair.continuation) == ("Ann saw Eve because Eve", " was near.")
    assert pair.prompts == ("Ann saw Eve because Ann was near.", "Ann saw Eve because Eve was near.")


def test_generation_trains_on_the_answer_without_a_few_shot_header(tmp_path):
    rows = [{"question": f"{i}+1?", "answer": f"#### {i + 1}"} for i in range(7)]
    pair = pairs(TaskSource("gsm8k", data=data(tmp_path, rows, rows)))[3]
    assert (pair.context, pair.continuation) == ("Question: 3+1?\nAnswer:", " #### 4")


def test_log_likelihood_and_answers_of_several_kinds_train_as_lm_eval_writes_them(tmp_path):
    shared = "dataset_path: parquet\ntraining_split: train\nvalidation_split: validation\n"
    rows = [{"a": "one", "b": ["two", "deux"]}]
    data(tmp_path / "data", rows, rows)
    tasks = {
        "say": "output_type: loglikelihood\ndoc_to_text: a\ndoc_to_target: '{{b[0]}}'\n",
        "gen": "output_type: generate_until\ndoc_to_text: a\ndoc_to_target: '{{b}}'\ngen_prefix: 'In French:'\n",
        "pick": "output_type: multiple_choice\ndoc_to_text: a\ndoc_to_choice: b\ndoc_to_target: deux\n",
    }
    found = {}
    for name, text in tasks.items():
        (tmp_path / f"{name}.yaml").write_text(f"task: {name}\n{shared}{text}")
        found[name] = pairs(TaskSource(name, definition=tmp_path, data=tmp_path / "data"))[0][2:]
    assert found == {"say": ("one", "two"), "gen": ("one In French:", " two"), "pick": ("one", " deux")}


def test_prompts_fold_and_hash_past_white_space():
    assert lmeval.fold(" a\n\n b\tc ") == "a b c"
    assert lmeval.prompt_hash("a  b\n") == lmeval.prompt_hash("a b") != lmeval.prompt_hash("ab")


def test_folded_prompts_hold_no_label_and_no_number(sst2):
    before = lmeval.folded_prompts(lmeval.build(TaskSource("sst2", data=sst2)))
    data(sst2, SENTENCES, [row | {"label": 1 - row["label"], "idx": 9} for row in SENTENCES])
    assert lmeval.folded_prompts(lmeval.build(TaskSource("sst2", data=sst2))) == before
    assert before[1].startswith("it was bad Question:")


def test_few_shot_prompts_are_lm_evals_own(tmp_path):
    from lm_eval.tasks import TaskManager

    write_tasks(tmp_path, ("mood",))
    files = {s: str(tmp_path / "data" / "mood" / f"{s}.parquet") for s in ("train", "validation")}
    text = (tmp_path / "tasks" / "mood.yaml").read_text()
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "mood.yaml").write_text(text + f"dataset_kwargs: {{data_files: {json.dumps(files)}}}\n")
    theirs = TaskManager(include_path=str(tmp_path / "hub"), include_defaults=False).load("mood")["tasks"]["mood"]
    theirs.set_config("num_fewshot", 3)
    theirs.set_fewshot_seed(1234)
    theirs.build_all_requests(limit=10)
    task = lmeval.build(TaskSource("mood", tmp_path / "tasks", tmp_path / "data" / "mood", num_fewshot=3))
    ours = [request for document in lmeval.instances(task, 10) for request in document]
    assert [r.args for r in ours] == [r.args for r in theirs.instances]
    assert [(r.doc_id, r.idx) for r in ours] == [(r.doc_id, r.idx) for r in theirs.instances]


@pytest.mark.parametrize("name", ["sst2", "rte", "mrpc", "wnli", "boolq", "winogrande", "gsm8k"])
def test_the_papers_tasks_pass_on_real_data(shared_data, name):
    facts = lmeval.check(TaskSource(name, data=shared_data / "tasks" / name), training=True)
    assert facts.documents >= 71 and facts.training >= 635
