"""What is added to a model besides patches: the deltas of its version, a head untied first; and what is said of it."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from portllm.cli import main
from portllm.errors import ResolveError
from portllm.formats.tensors import INDEX, content_digest
from portllm.work.apply import apply, atomic_apply
from portllm.work.hub import model_directory
from portllm.work.source import Terms
from portllm.work.versions import materialise, version_digest
from tests.work.checkpoints import bits, load, same_bits, save_adapter, save_model


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tied and an untied model in bf16, two updates and a patch of the untied one."""
    root = tmp_path_factory.mktemp("made")
    save_model(root / "model", "llama", torch.bfloat16)
    save_model(root / "tied", "mistral", torch.bfloat16)
    for seed, name in enumerate(("d1", "d2", "p")):
        save_adapter(root / name, root / "model", seed + 1)
    return root


@pytest.mark.parametrize("dtype", [None, "float16"])
def test_root_and_deltas_get_a_patch_as_the_version_they_are_would(made: Path, tmp_path: Path, dtype: str) -> None:
    deltas = (made / "d1", made / "d2")
    version = materialise(made / "model", deltas, tmp_path)
    apply(version, [(made / "p", 0.5)], tmp_path / "twice", dtype)
    apply(made / "model", [(made / "p", 0.5)], tmp_path / "once", dtype, terms=Terms(deltas))
    assert version_digest({"root": tmp_path / "once"}) == version_digest({"root": tmp_path / "twice"})


def test_a_command_takes_the_deltas_of_a_version(made: Path, tmp_path: Path) -> None:
    places = {"--model": made / "model", "--patch": made / "p", "--delta": made / "d1", "--out": tmp_path / "out"}
    with pytest.raises(SystemExit) as ended:
        main(["apply", *(str(word) for pair in places.items() for word in pair)])
    assert ended.value.code == 0
    version = materialise(made / "model", [made / "d1"], tmp_path)
    apply(version, [(made / "p", 1.0)], tmp_path / "twice")
    assert version_digest({"root": tmp_path / "out"}) == version_digest({"root": tmp_path / "twice"})


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_an_untied_head_is_patched_as_peft_patches_it(made: Path, tmp_path: Path, target: str, sharded: bool) -> None:
    loose = AutoModelForCausalLM.from_pretrained(made / "tied")
    embedding = loose.get_input_embeddings().weight.detach().clone()
    loose.config.tie_word_embeddings = False
    loose.lm_head.weight = torch.nn.Parameter(embedding.clone())
    loose.save_pretrained(tmp_path / "loose")
    patch = save_adapter(tmp_path / "p", tmp_path / "loose", target_modules=[target, "q_proj"])
    for file in patch.glob("*.safetensors"):
        kept = {name: t for name, t in load_file(file).items() if "base_layer" not in name}
        from safetensors.torch import save_file

        save_file(kept, file)
    tied = tmp_path / "tied"
    load(made / "tied", torch.bfloat16).save_pretrained(tied, **({"max_shard_size": "20KB"} if sharded else {}))
    assert (tied / INDEX).exists() == sharded

    with pytest.raises(ResolveError, match="--untie"):
        apply(tied, [(patch, 1.0)], tmp_path / "refused")
    apply(tied, [(patch, 1.0)], tmp_path / "out", terms=Terms(untie=True))
    ours = load(tmp_path / "out", torch.bfloat16)
    assert ours.config.tie_word_embeddings is False
    theirs = PeftModel.from_pretrained(load(tmp_path / "loose", torch.bfloat16), patch).merge_and_unload().state_dict()
    if target == "embed_tokens":  # PEFT rounds an embedding's factors to the model's dtype when it loads them
        del theirs["model.embed_tokens.weight"]
    found = {name: tensor for name, tensor in ours.state_dict().items() if name in theirs}
    assert same_bits(found, theirs)
    other = ours.lm_head if target == "embed_tokens" else ours.get_input_embeddings()
    assert torch.equal(bits(other.weight.detach()), bits(embedding))


def test_a_head_of_its_own_is_not_untied(made: Path, tmp_path: Path) -> None:
    with pytest.raises(ResolveError, match="nothing to untie"):
        apply(made / "model", [(made / "p", 1.0)], tmp_path / "out", terms=Terms(untie=True))
    assert not (tmp_path / "out").exists()


def test_an_applied_model_says_what_it_was_made_of(made: Path, tmp_path: Path) -> None:
    atomic_apply(made / "model", [(made / "p", 0.5)], tmp_path / "out", terms=Terms((made / "d1",)))
    facts = json.loads((tmp_path / "out" / "provenance.json").read_text())
    assert [part["content"] for part in facts["deltas"]] == [content_digest(made / "d1")]
    assert [(p["content"], p["scale"]) for p in facts["patches"]] == [(content_digest(made / "p"), 0.5)]
    assert str(made) not in json.dumps(facts)


def test_a_hub_id_is_taken_from_the_hubs_cache_and_its_absence_is_one_error(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    repository = tmp_path / "models--owner--tiny"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    (repository / "snapshots" / ("a" * 40)).symlink_to(made / "model")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert model_directory("owner/tiny").resolve() == made / "model"
    assert model_directory(str(made / "model")) == made / "model"
    with pytest.raises(ResolveError, match="HF_HUB_OFFLINE"):
        model_directory("owner/absent@main")
    assert model_directory("no_such_directory") == Path("no_such_directory")


TIED = {
    "biogpt": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "mamba": {"hidden_size": 16, "num_hidden_layers": 1, "tie_word_embeddings": True},
    "ctrl": {"n_embd": 16, "n_layer": 1, "n_head": 2, "dff": 16},
    "openai-gpt": {"n_embd": 16, "n_layer": 1, "n_head": 2},
}


@pytest.mark.parametrize(
    ("kind", "embedding"), [("mamba", "embeddings"), ("ctrl", "w"), ("openai-gpt", "tokens_embed")]
)
def test_a_tied_embedding_of_any_name_is_refused(kind: str, embedding: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, vocab_size=40, **TIED[kind]))
    model.save_pretrained(tmp_path / "model")
    save_adapter(tmp_path / "p", tmp_path / "model", target_modules=[embedding])
    with pytest.raises(ResolveError, match=f"{embedding}`, the version ties head and embeddings"):
        apply(tmp_path / "model", [(tmp_path / "p", 1.0)], tmp_path / "out")


def test_a_head_of_another_name_is_untied_under_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("biogpt", vocab_size=40, **TIED["biogpt"])).eval()
    model.save_pretrained(tmp_path / "model")
    apply(tmp_path / "model", [], tmp_path / "out", terms=Terms(untie=True))
    with pytest.raises(ResolveError, match="nothing to untie"):
        apply(tmp_path / "out", [], tmp_path / "again", terms=Terms(untie=True))
    untied = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert untied.output_projection.weight is not untied.biogpt.embed_tokens.weight
    torch.testing.assert_close(untied(torch.arange(9)[None]).logits, model(torch.arange(9)[None]).logits)
