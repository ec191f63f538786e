"""What is known of models that are not on this machine, and what the target's recipe gets from it."""

from pathlib import Path

import pytest

from fusion.architecture import dense_shapes
from fusion.checkpoint import Checkpoint
from fusion.errors import UserError
from fusion.plan.configs import usable
from fusion.plan.models import Described, describe, known, known_models
from fusion.plan.preflight import check
from fusion.recipe_file import load_recipe
from tests.families import write_model
from tests.fusion.plan.planning import errors, findings

FIVE = Path(__file__).parents[3] / "configs" / "qwen2.5-7b-five-experts.yaml"


def test_what_is_recorded_is_complete_and_usable() -> None:
    for name, facts in known_models().items():
        if facts.config:
            assert usable(Described(name, facts.config, None)) == [], name
            assert facts.config["max_position_embeddings"] and facts.config["rope_theta"], name
        assert facts.license, name
        assert bool(facts.instead) == bool(facts.because)
        assert facts.instead is None or facts.instead in known_models()


@pytest.mark.parametrize(
    ("model", "billions"),  # as the models' cards state them
    [
        ("Qwen/Qwen2.5-0.5B-Instruct", 0.49),
        ("Qwen/Qwen2.5-1.5B-Instruct", 1.54),
        ("Qwen/Qwen2.5-3B-Instruct", 3.09),
        ("Qwen/Qwen2.5-7B-Instruct", 7.61),
        ("Qwen/Qwen2.5-14B-Instruct", 14.7),
        ("Qwen/Qwen2.5-32B-Instruct", 32.5),
    ],
)
def test_the_recorded_shapes_have_the_parameters_that_the_cards_state(model: str, billions: float) -> None:
    config = known(model).config
    assert config is not None
    total = 0
    for shape in dense_shapes(config).values():
        size = 1
        for length in shape:
            size *= length
        total += size
    assert total / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize("tied", [True, False])
def test_the_tensors_of_a_config_are_those_that_transformers_saves(tmp_path: Path, tied: bool) -> None:
    checkpoint = Checkpoint(write_model(tmp_path / "model", tie_word_embeddings=tied, num_key_value_heads=1))
    assert dense_shapes(checkpoint.config) == {name: checkpoint.shape(name) for name in checkpoint.weight_map}


def test_models_that_are_not_here_are_planned_from_recorded_facts_and_say_so() -> None:
    found = check(load_recipe(FIVE))
    assert not errors(found)
    notes = {finding.where: finding.what for finding in found if finding.what.startswith("planned from")}
    assert notes["anchor"] == "planned from recorded facts of Qwen/Qwen2.5-7B-Instruct"
    assert notes["expert 'math'"] == "planned from recorded facts of Qwen/Qwen2.5-Math-7B-Instruct"
    assert "expert 'structured'" not in notes  # branched from the anchor


def test_a_model_from_the_hub_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    config = known("Qwen/Qwen2.5-7B").config
    monkeypatch.setattr("fusion.plan.models.hub_config", lambda model: config)
    note = describe("anchor", "someone/Qwen2.5-7B-better").source()
    assert note is not None and note.what == "planned from the config of someone/Qwen2.5-7B-better on the hub"


def test_math_without_anchoring_is_an_error_and_names_its_length() -> None:
    found = check(load_recipe(FIVE, ["experts.math.anchor=null"]))
    (error,) = errors(found)
    assert error.startswith("expert 'math': rope_theta is 10000, the anchor's is 1e+06")
    assert any("was trained on at most 4096 positions, the anchor on 32768" in finding.what for finding in found)


@pytest.mark.parametrize("model", ["Qwen/CodeQwen1.5-7B", "Qwen/CodeQwen1.5-7B-Chat"])
def test_codeqwen_gets_the_answer(model: str) -> None:
    found = check(load_recipe(FIVE, [f"experts.coding.model={model}", "experts.coding.license=null"]))
    (error,) = errors(found)
    assert "CodeQwen1.5-7B" in error and "hidden 4096 against 3584" in error and "no tensor of it fits" in error
    assert error.endswith("use Qwen/Qwen2.5-Coder-7B" + ("-Instruct" if "Chat" in model else ""))
    assert any("tongyi-qianwen-research is not for commercial use" in finding.what for finding in found)


def test_a_folder_called_codeqwen_gets_the_answer_unless_the_anchor_is_one_too(tmp_path: Path, anchor: Path) -> None:
    code = write_model(tmp_path / "CodeQwen1.5-7B", hidden_size=128)
    (error,) = errors(findings(tmp_path, anchor, code))
    assert error.endswith("use Qwen/Qwen2.5-Coder-7B")
    assert not errors(findings(tmp_path, code, code))


def test_a_model_that_is_nowhere_is_an_error(tmp_path: Path, anchor: Path) -> None:
    (error,) = errors(findings(tmp_path, anchor, tmp_path / "nowhere"))
    assert error.startswith("expert 'math': model '") and "nowhere" in error
    with pytest.raises(UserError, match="neither a folder nor a hub id"):
        describe("anchor", "nowhere")


def test_a_teacher_that_is_nowhere_is_an_error(tmp_path: Path) -> None:
    (error,) = errors(check(load_recipe(FIVE, ["experts.math.anchor.teacher=nowhere"])))
    assert error.startswith("expert 'math': its teacher: model 'nowhere'")
