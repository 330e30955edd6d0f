"""Keys of a study, and a study whose task names its data itself."""

from portllm.resolve.resolver import open_study
from portllm.study.plan import make_plan


def keys(file, *overrides):
    return set(make_plan(*open_study(file, list(overrides))).steps)


def steps_of(file, task):
    """Keys of the steps that a task plays a part in."""
    return {key for key, step in make_plan(*open_study(file)).steps.items() if task in step.label}


def own_data(copy, kwargs):
    """The study with `mood` alone, whose definition names its data itself."""
    definition = copy.parent / "tasks" / "own.yaml"
    text = (copy.parent / "tasks" / "mood.yaml").read_text().replace("task: mood", "task: own")
    definition.write_text(text + f"dataset_kwargs: {kwargs}\n".replace("{d}", str(copy.parent / "data" / "mood")))
    copy.write_text(
        "name: own\nmodels: {m: {path: model}}\nlineages: {a: {model: m, updates: [{path: model}]}}\n"
        "tasks: [{task: own, include_path: tasks}]\narms: [none]\n"
    )
    return copy
