"""`check`, `inspect` and `diagnose` as a user meets them: a verdict in words and as JSON, and an exit code."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from portllm.cli import main
from portllm.formats.tensors import ADAPTER
from portllm.work.checking import check
from portllm.work.versions import version_digest
from tests.work.checkpoints import save_adapter, save_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("made")
    save_model(root / "model", "llama", torch.bfloat16)
    save_model(root / "later", "llama", torch.bfloat16, seed=1)
    save_model(root / "other", "gpt2")
    save_adapter(root / "patch", root / "model")
    return root


def changed(made: Path, out: Path, change: Any) -> Path:
    """A copy of the patch with its tensors changed."""
    shutil.copytree(made / "patch", out)
    tensors = load_file(out / ADAPTER)
    save_file({name: change(name, tensor) for name, tensor in tensors.items()}, out / ADAPTER)
    return out


def test_a_patch_fits_the_model_it_was_trained_on(made: Path) -> None:
    verdict = check(made / "model", made / "patch")
    assert (verdict.fits, verdict.findings, verdict.targets, verdict.ranks) == (True, [], 14, [4])
    assert (verdict.patch_dtypes, verdict.model_dtype) == (["F32"], "bfloat16")


def test_another_version_is_a_warning_and_another_architecture_a_mismatch(made: Path) -> None:
    later = check(made / "later", made / "patch")
    assert later.fits and [f.what for f in later.findings] == ["base_model_name_or_path"]
    other = check(made / "other", made / "patch")
    assert not other.fits and sum(f.kind == "mismatch" for f in other.findings) == 14
    assert "another architecture" in other.findings[0].reason


def test_values_are_looked_at(made: Path, tmp_path: Path) -> None:
    zero = changed(made, tmp_path / "zero", lambda name, t: t * 0 if "lora_B" in name else t)
    assert [f.reason for f in check(made / "model", zero).findings] == ["is zero everywhere: the patch changes nothing"]
    half = changed(made, tmp_path / "half", lambda name, t: t * 0 if "0.self_attn.q_proj.lora_B" in name else t)
    assert check(made / "model", half).fits and "zero lora_B" in check(made / "model", half).findings[0].reason
    bad = changed(made, tmp_path / "bad", lambda name, t: t.fill_(torch.nan) if "q_proj.lora_A" in name else t)
    verdict = check(made / "model", bad)
    assert not verdict.fits and "NaN" in verdict.findings[0].reason
    huge = changed(made, tmp_path / "huge", lambda name, t: t * 1e30)
    assert (
        check(made / "model", huge).fits and "may overflow bfloat16" in check(made / "model", huge).findings[0].reason
    )


def test_a_patch_with_other_tokens_is_a_warning_and_one_laid_out_otherwise_is_none(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "model", tmp_path / "model")
    patch = changed(made, tmp_path / "patch", lambda name, t: t)
    (tmp_path / "model" / "tokenizer.json").write_text('{"a": 1}')
    (patch / "tokenizer.json").write_text('{"a": 1}')
    assert check(tmp_path / "model", patch).findings == []
    (patch / "tokenizer.json").write_text('{ "a":1 }')
    assert check(tmp_path / "model", patch).findings == []
    (patch / "tokenizer.json").write_text('{"a": 2}')
    assert [f.what for f in check(tmp_path / "model", patch).findings] == ["tokenizer.json"]


def test_the_commands_speak_in_words_and_in_json(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, patch = made / "model", made / "patch"

    def said(*arguments: object, code: int = 0) -> str:
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in arguments])
        assert ended.value.code == code
        out, error = capsys.readouterr()
        return error if code == 2 else out

    assert "fits" in said("check", "--model", model, "--patch", patch)
    assert "does not fit" in said("check", "--model", made / "other", "--patch", patch, code=1)
    assert json.loads(said("check", "--model", model, "--patch", patch, "--json"))[0]["fits"] is True
    shown = said("inspect", patch)
    assert "q_proj" in shown and "down_proj" in shown and "alpha" in shown and len(shown.splitlines()) < 25
    assert json.loads(said("inspect", patch, "--json"))[0]["about"]["targets"] == 14
    words = said("diagnose", patch, "--model", made / "later", "--base", model)
    assert "‖θₜ − θ₀‖ / ‖θ₀‖" in words and "absorbed" in words
    found = json.loads(said("diagnose", patch, "--other", patch, "--json"))[0]
    assert found["total"]["residual_of_patch"] < 1e-6
    assert "give --model" in said("diagnose", patch, "--base", model, code=2)


def test_where_the_source_version_stands_in_the_lineage_is_said(made: Path, tmp_path: Path) -> None:
    patch, model, later = tmp_path / "patch", made / "model", tmp_path / "later"
    shutil.copytree(made / "patch", patch)
    shutil.copytree(made / "later", later)
    source, target = (version_digest({"root": path}) for path in (model, later))

    def said(trained_on: str, before: list[str], on: Path) -> tuple[str, str]:
        facts = {"source": {"sha256": trained_on, "lineage": before}}
        (patch / "provenance.json").write_text(json.dumps(facts))
        found = [f for f in check(on, patch).findings if f.what == "source version"]
        return found[0].kind, found[0].reason

    assert said(source, [], model) == ("note", "is this very model: the patch was trained on it")
    assert said(source, [], later)[0] == "warning"
    assert said(target, [source], model) == ("warning", "is later than this model: the patch would go back in time")
    (later / "version.json").write_text(json.dumps({"sha256": target, "lineage": [source]}))
    assert said(source, [], later) == ("note", "is 1 update before this one")
