"""Questions to a recipe's server that runs already: the guard in front of a scripted engine."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fusion.encoding import END
from fusion.errors import UserError
from fusion.explain.asked import explain_asked
from fusion.explain.conversation import Conversation
from fusion.merge import merge
from fusion.recipe import Recipe
from fusion.sections.serving import Question
from gate_training.trainer import train_gates
from serving.ask import STATE, ask_all
from serving.serve import ServerState, manifest_shards, write_state
from tests.recipes import make_recipe
from tests.serving.conftest import Guarded
from tests.serving.upstream import Status, completion

ASKED = ({"role": "system", "content": "Be short."}, {"role": "user", "content": "1+2="})


@pytest.fixture
def recipe(tmp_path: Path, anchor: Path, anchored_experts: dict[str, Path]) -> Recipe:
    """A recipe whose fused model has trained gates."""
    recipe = make_recipe(tmp_path, anchor, anchored_experts)
    train_gates(recipe, merge(recipe))
    return recipe


def runs_at(recipe: Recipe, url: str) -> None:
    """Leaves the note by which a running server is found."""
    shards = manifest_shards(recipe.fused)
    state = ServerState(os.getpid(), url, recipe.name, "http://127.0.0.1:9", False, str(recipe.fused), shards)
    write_state(recipe.folder / STATE, state)


def test_what_the_running_server_answers_is_explained(recipe: Recipe, guarded: Callable[..., Guarded]) -> None:
    guard = guarded(completion("3, I think."))
    runs_at(recipe, guard.url)
    found = explain_asked(recipe, Conversation(ASKED), with_answer=True)
    assert guard.upstream.requests[0]["messages"] == list(ASKED)
    assert "".join(token.text for token in found.tokens if token.part == "answer") == "3, I think." + END
    assert found.judged == "answer" and found.opinions[-1].channel == "likelihood"
    (asked,) = ask_all(recipe, [Question(question="1+2=")])
    assert (asked["answer"], asked["attempts"]) == ("3, I think.", 1)
    assert sum(asked["experts"].values()) == pytest.approx(1)


def test_a_server_that_refuses_is_a_sentence(recipe: Recipe, guarded: Callable[..., Guarded]) -> None:
    refusal = json.dumps({"error": {"message": "not today", "type": "x", "param": None, "code": 400}})
    runs_at(recipe, guarded(Status(400, refusal)).url)
    with pytest.raises(UserError, match="answered 400: not today"):
        explain_asked(recipe, Conversation(ASKED), with_answer=True)
