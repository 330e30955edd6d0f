"""The plan: one step per key, cells for every coordinate."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from portllm.cli import main
from portllm.errors import SpecError
from portllm.study.facts import CorpusFacts, from_json, to_json
from portllm.study.plan import make_plan
from portllm.study.recipes import Slice
from tests.study.worlds import TEXT, facts, given, plan, study


def cells(found, **at):
    return [c for c in found.cells if all(getattr(c, k) == v for k, v in at.items())]


def test_every_input_is_given_or_an_earlier_step():
    found = plan()
    seen = set(found.givens)
    for step in found.steps.values():
        assert set(step.inputs.values()) <= seen
        seen.add(step.key)


def test_generated_text_must_leave_room_for_a_prompt():
    found = facts()
    tasks = {name: replace(task, new_tokens=511) for name, task in found.tasks.items()}
    make_plan(study(), replace(found, tasks=tasks))
    tasks["hard"] = replace(tasks["hard"], new_tokens=512)
    with pytest.raises(SpecError, match=r"task `hard`: .*up to 512 new tokens \(max_gen_toks\), .*reads 512 in all"):
        make_plan(study(), replace(found, tasks=tasks))


def test_port_at_zero_is_refit_at_zero():
    found = plan()
    port = {c.key for c in cells(found, arm="port", t=0)}
    assert port == {c.key for c in cells(found, arm="refit", t=0)} and len(port) == 4


def test_none_has_neither_rank_nor_seed_and_is_scored_once():
    found = plan("finetune.rank=[4, 8]")
    none = cells(found, arm="none")
    assert {(c.rank, c.seed, c.source_t) for c in none} == {(None, None, None)}
    assert len(none) == 2 * 2 * 3 and len({c.key for c in none}) == 2 * (1 + 2 + 2)


def test_theta_zero_is_shared_by_the_lineages_of_a_model():
    found = plan()
    counts = Counter(s.stage for s in found.steps.values())
    per_task = {"finetune": (1 + 2 + 2) * 2, "evaluate": (1 + 2) + 4 * (1 + 2 + 2), "requests": 2}
    assert counts == {"corpus": 1, "update": 4} | {stage: 2 * n for stage, n in per_task.items()}


def test_a_lora_update_is_a_delta_and_a_full_one_a_new_root():
    found = plan()
    last = {s.label: s for s in found.steps.values() if s.stage == "update"}
    assert sorted(last["update soft t=2"].inputs) == ["corpus", "delta1", "root"]
    assert sorted(last["update hard t=2"].inputs) == ["corpus", "root"]
    assert last["update hard t=2"].inputs["root"] == last["update hard t=1"].key
    assert [last[f"update soft t={t}"].recipe.start for t in (1, 2)] == [0, 1000]


def test_a_diagnosis_pairs_port_with_the_refit_of_the_same_rank_and_seed():
    found = plan("diagnose=true", "finetune.rank=[4, 8]")
    assert len(found.diagnoses) == len({d.key for d in found.diagnoses}) == 4 * 2 * 2 * 2, (
        "versions, tasks, ranks, seeds"
    )
    one = next(d for d in found.diagnoses if (d.lineage, d.t, d.task, d.rank, d.seed) == ("soft", 2, "easy", 8, 1))
    at = {"lineage": "soft", "task": "easy", "rank": 8, "seed": 1}
    ported, refit = (cells(found, arm=arm, t=2, **at)[0].patches[0] for arm in ("port", "refit"))
    inputs = found.steps[one.key].inputs
    assert (inputs["patch1"], inputs["other"]) == (ported, refit)
    assert inputs["zero"] == inputs["root"] and inputs["delta2"]
    assert not plan().diagnoses
    alone = plan("diagnose=true", "arms=[none, port]")
    assert all("other" not in alone.steps[d.key].inputs for d in alone.diagnoses)


def test_arm_warm_goes_on_from_the_old_patch_with_a_share_of_the_steps():
    found = plan("arms=[none, port, warm, refit]", "finetune.warm=0.5")
    at = {"lineage": "soft", "task": "easy", "rank": 8, "seed": 1}
    ported, warm, refit = (cells(found, arm=arm, t=2, **at)[0].patches[0] for arm in ("port", "warm", "refit"))
    step = found.steps[warm]
    assert step.inputs == found.steps[refit].inputs | {"patch1": ported}
    assert step.recipe == replace(found.steps[refit].recipe, share=0.5)
    assert (step.label, step.coordinates["arm"]) == ("warm soft t=2 easy r8 s1", "warm")
    first = {arm: cells(found, arm=arm, t=0, **at)[0].key for arm in ("port", "warm", "refit")}
    assert len(set(first.values())) == 1
    assert plan().steps.keys() < found.steps.keys()


def test_a_given_patch_is_warmed_up_by_the_study_s_fine_tuning():
    found = plan("arms=[none, port, warm]", "patches={easy: p}")
    (warm, other) = cells(found, arm="warm", t=1, lineage="soft", task="easy")
    assert (warm.seed, other.seed, warm.rank) == (1, 2, 8)
    assert found.steps[warm.patches[0]].inputs["patch1"].startswith("patch-p")
    assert cells(found, arm="warm", t=0, lineage="soft", task="easy")[0].seed is None


def test_replay_takes_its_share_from_older_corpora_and_chained_updates_go_on_in_each():
    corpora = {"c": CorpusFacts(given("corpus", "c"), format="parquet", rows=10),
               "old": CorpusFacts(given("corpus", "old"), format="parquet", rows=10)}  # fmt: skip
    lineage = (
        "lineages={l: {model: m, updates: [{corpus: c, method: full, tokens: 2000, steps: 2, replay: {old: 0.25}}]}}"
    )
    found = plan(
        lineage, "corpora={c: {path: c.parquet, text: text}, old: {path: o.parquet, text: text}}", corpora=corpora
    )
    first, second = (step for step in found.steps.values() if step.stage == "update")
    assert (first.recipe.start, first.recipe.tokens, first.recipe.replay) == (0, 1500, (Slice(0, 500),))
    assert (second.recipe.start, second.recipe.tokens, second.recipe.replay) == (1500, 1500, (Slice(500, 500),))
    assert {"corpus", "replay1"} <= first.inputs.keys()


@pytest.mark.parametrize(
    "replay, message",
    [("{c: 0.5}", "which is the corpus itself"), ("{old: 0.6, older: 0.5}", "must be below 1"),
     ("{old: 0.9}", "200 tokens do not fill one sequence of 256"),
     ("{old: 0.01}", "do not fill one sequence"), ("{nowhere: 0.5}", "`nowhere` is not defined")],
)  # fmt: skip
def test_a_replay_that_cannot_be_is_refused(replay, message):
    lineage = f"lineages={{l: {{model: m, updates: [{{corpus: c, method: full, tokens: 2000, replay: {replay}}}]}}}}"
    with pytest.raises(SpecError, match=message):
        plan(lineage)


def test_adding_a_task_adds_only_its_own_steps():
    before, after = plan("tasks=[easy]"), plan("tasks=[easy, hard]")
    assert before.steps.keys() < after.steps.keys()
    assert {s.stage for k, s in after.steps.items() if k not in before.steps} == {"requests", "finetune", "evaluate"}


def test_a_limit_changes_no_training():
    trained = [
        {k for k, s in p.steps.items() if s.stage in ("update", "finetune")}
        for p in (plan(), plan("tasks=[{task: easy, limit: 5}, hard]"))
    ]
    assert trained[0] == trained[1]


@pytest.mark.parametrize(
    "override",
    [
        "resources.finetune={workers: 2, zero: 2, micro_tokens: 64}",
        "store=elsewhere",
        "resources.evaluate.threads=2",
        "tracking.enabled=false",
        "name=other",
    ],
)
def test_resources_and_places_do_not_change_a_key(override):
    assert plan(override).steps.keys() == plan().steps.keys()


@pytest.mark.parametrize(
    "override, stages",
    [
        ("evaluate.score_tokens=64", {"evaluate"}),
        ("evaluate.dtype=bfloat16", {"evaluate"}),
        ("finetune.seeds=[3, 4]", {"finetune", "evaluate"}),
        ("finetune.examples=9", {"requests", "finetune", "evaluate"}),
    ],
)
def test_a_recipe_changes_its_own_stage_and_what_follows(override, stages):
    old, new = plan(), plan(override)
    assert {s.stage for k, s in new.steps.items() if k not in old.steps} == stages


def test_a_given_patch_of_another_rank_than_its_refits_is_said():
    arms = "arms=[none, port, refit]"
    assert plan(arms, "patches={easy: p}").notes == ()
    (note,) = plan(arms, "patches={easy: p}", "finetune.rank=[2, 4]").notes
    assert note == "task easy: a given patch of rank 8 is compared with refits of rank 2 and 4 (finetune.rank)"


def test_float16_without_zero_is_refused_before_anything_is_spent():
    with pytest.raises(SpecError, match="float16 needs a ZeRO stage of at least 1"):
        plan("finetune.dtype=float16", "resources.finetune.zero=0")
    assert plan("finetune.dtype=float16")


def test_exports_have_their_size_and_refits_the_seed_of_their_update():
    found = plan("lineages.soft.seeds=[0, 7]", "export=[{arm: port, t: 1, task: easy}]")
    exports = [step for step in found.steps.values() if step.stage == "export"]
    full = [step for step in found.steps.values() if step.label == "update hard t=1"]
    assert len(exports) == 6 and {step.cost.disk for step in exports} == {full[0].cost.disk}
    tuned = [step for step in found.steps.values() if step.stage == "finetune"]
    assert {(s.coordinates["lineage"], s.coordinates["t"] > 0, s.coordinates.get("update_seed")) for s in tuned} == {
        ("soft", False, None), ("soft", True, 0), ("soft", True, 7), ("hard", True, 0)}  # fmt: skip


def test_given_versions_and_patches_train_nothing():
    text = (
        TEXT.replace("{corpus: c, method: lora, rank: 4, tokens: 1000, steps: 2}", "{path: v1}")
        .replace(
            "finetune: {rank: 8, learning_rate: 1e-3, examples: 10, seeds: [1, 2]}",
            "patches: {easy: p}\narms: [none, port]",
        )
        .replace("tasks: [easy, hard]", "tasks: [easy]")
        .replace("  hard: {model: m, updates: [{corpus: c, method: full, tokens: 1000, steps: 2}]}\n", "")
    )
    asked, known = study(text), facts(("easy",))
    version = type(known.models["m"])(given("model", "v1"), given("tokenizer", "m"))
    found = make_plan(asked, facts(("easy",), versions={("soft", 0): version}))
    assert {s.stage for s in found.steps.values()} == {"requests", "evaluate"}
    assert [(c.arm, c.t, c.update) for c in found.cells] == [
        ("none", 0, None),
        ("port", 0, None),
        ("none", 1, "given"),
        ("port", 1, "given"),
    ]


def test_update_seeds_make_lineages_of_their_own():
    found = plan("lineages.soft.seeds=[0, 7]")
    assert {c.update_seed for c in cells(found, lineage="soft", t=1)} == {0, 7}
    assert {c.update_seed for c in cells(found, lineage="soft", t=0)} == {None}
    assert len(cells(found, lineage="soft", t=0, arm="none", task="easy")) == 1


def test_a_given_version_is_one_replicate_whatever_update_seeds_train_what_follows():
    asked = study(TEXT, "lineages.soft.seeds=[0, 7]", "lineages.soft.updates[0].steps=1", "diagnose=true")
    line = asked.lineages["soft"]
    first = line.updates[0].model_validate({"path": "v1"})
    asked = asked.model_copy(update={"lineages": {"soft": line.model_copy(update={"updates": [first, *line.updates]})}})
    version = replace(facts().models["m"], root=given("model", "v1"))
    found = make_plan(asked, facts(versions={("soft", 0): version}))
    for t, seeds in ((0, {None}), (1, {None}), (2, {0, 7})):
        assert {c.update_seed for c in cells(found, t=t)} == seeds
        assert {d.update_seed for d in found.diagnoses if d.t == t} == (seeds if t else set())
        kinds = Counter((c.task, c.arm, c.seed) for c in cells(found, t=t))
        assert set(kinds.values()) == {len(seeds)}
    at = cells(found, t=1)
    assert len({c.key for c in at}) == len(at)
    assert not any(" u0 " in found.steps[c.key].label for c in at)
    assert len(set(found.diagnoses)) == len(found.diagnoses) == (1 + 2) * 4


def test_a_version_without_a_patch_is_scored_once_for_all_apply_modes():
    found = plan("evaluate.apply=[merged, adapter]")
    assert Counter((c.arm, c.apply) for c in cells(found, lineage="soft", t=1, task="easy")) == {
        ("none", "merged"): 1, **{(arm, mode): 2 for arm in ("port", "refit") for mode in ("merged", "adapter")}
    }  # fmt: skip


def test_excluded_documents_are_part_of_the_corpus():
    corpus = CorpusFacts(given("corpus", "c"), format="parquet", rows=10, excluded=(3,))
    old, new = plan(), plan(corpora={"c": corpus})
    assert {s.stage for k, s in new.steps.items() if k not in old.steps} == {"corpus", "update", "finetune", "evaluate"}


def test_a_corpus_is_tokenised_with_its_own_threads_and_keeps_its_key():
    old, new = plan(), plan("resources.corpus.threads=4")
    assert old.steps.keys() == new.steps.keys()
    assert {step.layout.threads for step in new.steps.values() if step.stage == "corpus"} == {4}


def test_more_tokens_than_a_corpus_can_hold_are_refused_and_chained_updates_count_together():
    def corpus(most):
        return {"c": CorpusFacts(given("corpus", "c"), format="parquet", rows=10, most_tokens=most)}

    assert plan(corpora=corpus(2000)).steps
    with pytest.raises(SpecError, match=r"updates\[0\]\.tokens: 2,000 tokens of corpus `c` .* at most 1,999"):
        plan(corpora=corpus(1999))


@pytest.mark.parametrize(
    "override, message",
    [
        ("finetune.rank=32", "larger than the model's width of 16"),
        ("lineages.soft.updates[0].sequence_length=1000", "reads at most 512"),
        ("lineages.soft.updates[0].rank=32", r"updates\[0\]: rank 32 is larger than the model's width of 16"),
        ("finetune.targets=[q_proj, w_prj]", r"finetune \(task easy\): LoRA target `w_prj` matches no module; did you"),
    ],
)
def test_what_the_shape_forbids_is_refused(override, message):
    with pytest.raises(SpecError, match=message):
        plan(override)


@pytest.mark.parametrize(
    "override, message",
    [
        ("sequence_length=1000", "sequence_length: 1000 tokens, but the model reads at most 128"),
        ("tokens=10000000000", "hold"),
    ],
)
def test_what_a_pretraining_cannot_have_is_refused(override, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PORTLLM_CACHE", str(tmp_path))
    quickstart = Path(__file__).parents[2] / "jobs" / "quickstart.yaml"
    with pytest.raises(SystemExit):
        main(["plan", str(quickstart), "--store", str(tmp_path / "s"), "-o", f"models.toy.init.{override}"])
    assert message in capsys.readouterr().err


def dropping(**dropout):
    return {"m": replace(facts().models["m"], dropout=dropout)}


@pytest.mark.parametrize(
    "override, place",
    [
        ("arms=[none]", r"lineages\.soft\.updates\[0\]"),
        ("lineages={l: {model: m, updates: [{corpus: c, method: full, tokens: 1000}]}}", r"lineages\.l\.updates\[0\]"),
        ("lineages={l: {model: m}}", r"finetune \(task easy\)"),
    ],
)
def test_a_model_with_dropout_is_not_trained_and_the_file_to_mend_is_named(override, place):
    message = rf"^{place}: /given/m/config.json says `attention_dropout`: 0.1, and .* no dropout, .*: write 0 there"
    with pytest.raises(SpecError, match=message):
        plan(override, models=dropping(attention_dropout=0.1))


def test_a_model_with_dropout_is_evaluated_and_ported_to():
    nothing_trained = ("lineages={l: {model: m}}", "patches={easy: p, hard: p}", "arms=[none, port]")
    both = {(task, 0): facts().patches["easy", 0] for task in ("easy", "hard")}
    found = plan(*nothing_trained, models=dropping(resid_pdrop=0.1), patches=both)
    assert {step.stage for step in found.steps.values()} == {"requests", "evaluate"}


def test_a_patch_with_dropout_is_ported_but_not_trained_further():
    dropped = {("easy", 0): replace(facts().patches["easy", 0], dropout=0.05)}
    assert plan("arms=[none, port]", "patches={easy: p}", patches=dropped).cells
    with pytest.raises(
        SpecError, match=r"^patches\.easy: .*p/adapter_config.json says `lora_dropout`: 0.05, .*: write 0"
    ):
        plan("arms=[none, port, warm]", "patches={easy: p}", patches=dropped)


def test_twin_tasks_screen_each_other():
    known = facts()
    same = {n: type(t)(**(vars(t) | {"template": "same"})) for n, t in known.tasks.items()}
    found = plan(tasks=same)
    examples = [s for s in found.steps.values() if s.label.startswith("examples")]
    assert all("screen1" in s.inputs for s in examples)


def test_facts_survive_json():
    known = facts()
    assert from_json(to_json(known)) == known


def test_ten_thousand_cells_plan_in_seconds():
    import time

    tasks = tuple(f"task{i}" for i in range(40))
    asked = study(
        TEXT,
        f"tasks=[{', '.join(tasks)}]",
        "lineages.soft.updates[0].steps=20",
        "lineages.hard.updates[0].steps=20",
        "finetune.seeds=[1, 2, 3]",
    )
    begin = time.process_time()
    found = make_plan(asked, facts(tasks))
    assert len(found.cells) > 10_000
    assert time.process_time() - begin < 5, "a plan is a second's work; five leaves room for a slow machine"


def test_a_deepspeed_configuration_of_the_user_s_own_is_in_the_layout_and_in_no_key():
    own = {"finetune": {"zero_optimization": {"stage": 2, "overlap_comm": True}}}
    found = plan("resources.finetune.deepspeed=ds.json", deepspeed=own)
    assert {s.layout.zero for s in found.steps.values() if s.stage == "finetune"} == {2}
    assert found.steps.keys() == plan().steps.keys()
    with pytest.raises(SpecError, match=r"deepspeed: ds.json: ZeRO-3 with LoRA"):
        plan("resources.finetune.deepspeed=ds.json", deepspeed={"finetune": {"zero_optimization": {"stage": 3}}})


@pytest.mark.parametrize("stage", ["finetune", "update"])
def test_zero_3_with_lora_is_refused(stage):
    with pytest.raises(SpecError, match=rf"^resources\.{stage}\.zero: ZeRO-3 with LoRA can save empty adapters"):
        plan(f"resources.{stage}.zero=3")


def test_an_estimate_counts_as_many_logits_as_a_training_makes():
    from portllm.study import estimate
    from portllm.work import head

    assert estimate.LOGITS == head.LOGITS
