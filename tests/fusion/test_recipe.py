"""Recipes: the shipped ones load, and whatever is wrong with one is a sentence with the file and the YAML line."""

import re
from pathlib import Path

import pytest

from fusion.errors import UserError
from fusion.recipe_file import as_file, load_recipe, load_section
from fusion.sections.serving import Guarding

FOLDER = Path(__file__).parents[2] / "configs"
GUARD = FOLDER / "guard.yaml"
CONFIGS = sorted(set(FOLDER.glob("*.yaml")) - {GUARD})

RECIPE = """\
name: small
output: runs/small
anchor:
  model: some/anchor
experts:
  - name: general
    domain: general
    model: some/anchor
  - name: math
    domain: math
    model: some/math
domains:
  math:
    train: {generated: demo.math}
    held_out: {generated: demo.math, split: held_out}
    rules:
      - words: [sum]
  general:
    train: {generated: demo.general}
    held_out: {generated: demo.general, split: held_out}
routing:
  top_k: 1
serving:
  max_model_len: 512
  sampling:
    max_tokens: 128
  questions:
    - question: Who are you?
      domain: general
"""


def write(folder: Path, text: str = RECIPE) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def edited(*changes: tuple[str, str]) -> str:
    """RECIPE with each (old, new) applied once; lines that an error may name carry the comment `# here`."""
    text = RECIPE
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} is not unique in RECIPE"
        text = text.replace(old, new)
    return text


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_recipe(path, list(overrides))
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_for_another_process_is_the_same_in_the_same_order(path: Path) -> None:
    recipe = load_recipe(path, ["evaluation.rows=7"])
    with as_file(recipe) as file:
        again = load_recipe(file)
    assert again.model_dump_json() == recipe.model_dump_json()  # rules are tried in the order of the domains


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_recipe_loads(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert all(0 <= recipe.expert_of(domain) < len(recipe.experts) for domain in recipe.domains)


OVERRIDES = [
    (path, line) for path in CONFIGS for line in path.read_text("utf-8").split("\n") if re.match("# +--set ", line)
]


@pytest.mark.parametrize(("path", "line"), OVERRIDES, ids=lambda value: value if isinstance(value, str) else value.stem)
def test_every_override_that_a_config_shows_loads(path: Path, line: str) -> None:
    load_recipe(path, re.findall(r"--set (\S+)", line))


WRONG = {
    "unknown key": ([("  top_k: 1", "  top_k: 1\n  topk: 2  # here")], "routing.topk: unknown key"),
    "unknown section": ([("routing:", "rooting: {}  # here\nrouting:")], "rooting: unknown key"),
    "unknown key in a list": ([("    model: some/math", "    modell: some/math  # here")], "unknown key"),
    "missing section": ([("name: small", "name: small  # here"), ("anchor:\n  model: some/anchor\n", "")], "missing"),
    "missing key": ([("  - name: math", "  - purpose: sums  # here")], "experts.1.name: this key is missing"),
    "a teacher that nobody listens to": (
        [("    model: some/math", "    branch: {data: {generated: demo.math}, teacher: some/teacher}  # here")],
        "'teacher' is of no use with answers 'reference'",
    ),
    "more answers kept than sampled": (
        [
            (
                "    model: some/math",
                "    branch:  # here\n      data: {generated: demo.math}\n      answers: sampled\n"
                "      sampling: {samples: 2, keep: 3}  # here",
            )
        ],
        "keep 3 is more than the 2 samples",
    ),
    "no room for a question to be sampled": (
        [
            (
                "    model: some/math",
                "    branch:\n      data: {generated: demo.math}\n      answers: sampled\n"
                "      sampling: {max_tokens: 64, max_model_len: 64}  # here",
            )
        ],
        "max_tokens 64 leaves no room within max_model_len 64",
    ),
    "samples without text": (
        [
            (
                "    model: some/math",
                "    model: some/math\n    anchor: {method: logits, data: {generated: demo.math}, "
                "sampling: {samples: 5}}  # here",
            )
        ],
        "'sampling' is of no use with method 'logits'",
    ),
    "wrong type": ([("  top_k: 1", "  top_k: many  # here")], "routing.top_k: "),
    "wrong type of a section": ([("routing:\n  top_k: 1", "routing: 1  # here")], "routing: "),
    "wrong choice": ([("routing:", "gate_training:\n  method: guess  # here\nrouting:")], "gate_training.method: "),
    "duplicate key": ([("  top_k: 1", "  top_k: 1\n  top_k: 2  # here")], "'top_k' is given twice"),
    "not YAML": ([("  top_k: 1", "  top_k: [1  # here"), ("serving:", "serving:  # here")], "not YAML"),
    "bad regular expression": ([("words: [sum]", "pattern: '('  # here")], "not a regular expression"),
    "empty rule": ([("words: [sum]", "words: []  # here")], "a rule needs"),
    "two sources of data": (
        [("train: {generated: demo.math}", "train: {generated: demo.math, path: a.jsonl}  # here")],
        "name a 'generated' task, or",
    ),
    "model and branch": (
        [
            ("  - name: math", "  - name: math  # here"),
            ("    model: some/math", "    model: some/math\n    branch: {data: {generated: demo.math}}"),
        ],
        "expert 'math' needs exactly one of 'model' and 'branch'",
    ),
    "one expert": (
        [("experts:\n", "experts:  # here\n"), ("  - name: math\n    domain: math\n    model: some/math\n", "")],
        "experts: ",
    ),
    "duplicate expert names": (
        [("  - name: math", "  - name: general  # here")],
        "two experts are called 'general'",
    ),
    "expert of an unknown domain": (
        [("  - name: math\n    domain: math", "  - name: math  # here\n    domain: maths  # here")],
        "domain 'maths', which 'domains' does not have",
    ),
    "more choices than experts": ([("  top_k: 1", "  top_k: 3  # here")], "3 experts a token are more than the 2"),
    "more ways than experts": (
        [("  max_model_len: 512", "  max_model_len: 512\n  tensor_parallel_size: 4  # here")],
        "4 ways are more than the 2 experts, which vLLM refuses",
    ),
    "more cards than whole experts": (
        [
            (
                "  max_model_len: 512",
                "  max_model_len: 512\n  data_parallel_size: 4\n  enable_expert_parallel: true  # here",
            )
        ],
        "4 cards (tensor_parallel_size x data_parallel_size) are more than the 2 experts",
    ),
    "ranks over machines": (
        [
            (
                "  max_model_len: 512",
                "  max_model_len: 512\n  distributed_executor_backend: ray\n  data_parallel_size: 2  # here",
            )
        ],
        "2 ranks find each other on one machine alone",
    ),
    "a split that no generator has": (
        [("train: {generated: demo.math}", "train: {generated: demo.math, split: test}  # here")],
        "splits 'train' and 'held_out', not 'test'",
    ),
    "tests without a column": (
        [("train: {generated: demo.math}", "train: {path: a.jsonl, score: tests_passed}  # here")],
        "needs 'reference'",
    ),
    "two experts for one domain": (
        [("  - name: math\n    domain: math", "  - name: math\n    domain: general  # here")],
        "two experts are for domain 'general'",
    ),
    "an extra task called like a domain": (
        [("routing:", "evaluation:\n  extra:\n    math: {generated: demo.mixed}  # here\nrouting:")],
        "'math' is a domain already",
    ),
    "a shared expert that is nothing": (
        [("  top_k: 1", "  top_k: 1\n  shared_expert: maths  # here")],
        "'maths' is neither 'anchor' nor an expert",
    ),
    "no layer at all": (
        [("  top_k: 1", "  top_k: 1\n  moe_layers: []  # here")],
        "routing.moe_layers: ",
    ),
    "a layer before the first": (
        [("  top_k: 1", "  top_k: 1\n  moe_layers: [-1]  # here")],
        "routing.moe_layers.0: ",
    ),
    "an expert called anchor": (
        [("  - name: math", "  - name: anchor  # here")],
        "'anchor' names the anchor",
    ),
    "no room for a question": (
        [("    - question: Who are you?", "    - max_tokens: 512  # here\n      question: Who are you?")],
        "leaves no room for the question",
    ),
    "fallbacks in a circle": (
        [
            (
                "domains:\n",
                "domains:\n  a: {train: &d {generated: demo.math}, held_out: *d, fallback: b}  # here\n"
                "  b: {train: *d, held_out: *d, fallback: a}  # here\n",
            ),
        ],
        "run in a circle",
    ),
    "domain without an expert": (
        [("domains:\n", "domains:\n  law: {train: &d {generated: demo.math}, held_out: *d}  # here\n")],
        "domain 'law' has neither an expert nor a fallback",
    ),
    "fallback to nowhere": (
        [("domains:\n", "domains:\n  law: {train: &d {generated: demo.math}, held_out: *d, fallback: x}  # here\n")],
        "falls back to 'x'",
    ),
    "question of an unknown domain": (
        [
            ("    - question: Who are you?", "    - question: Who are you?  # here"),
            ("      domain: general", "      domain: art  # here"),
        ],
        "domain 'art', which 'domains' does not have",
    ),
    "no room for a prompt": (
        [
            ("  max_model_len: 512", "  max_model_len: 128  # here"),
            ("    max_tokens: 128", "    max_tokens: 128  # here"),
        ],
        "no room for a prompt",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_recipe_is_one_sentence_with_the_line(tmp_path: Path, case: str) -> None:
    changes, words = WRONG[case]
    text = edited(*changes)
    path = write(tmp_path, text)
    sentence = refused(path)
    assert words in sentence
    expected = [number for number, line in enumerate(text.splitlines(), 1) if "# here" in line]
    named = re.match(rf"{re.escape(str(path))}, line (\d+): ", sentence)
    assert named, sentence
    assert int(named.group(1)) in expected, sentence


@pytest.mark.parametrize("content", [b"", b"- a\n- b\n", b"just words\n"])
def test_a_recipe_that_is_no_mapping_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert f"{path}, line 1: a recipe is a mapping" in refused(path)


@pytest.mark.parametrize("content", [b"name: 2024-99-99\n", b"name: \xff\xfe\n", b"? [a, b]\n: c\n", b"name: a\x00b\n"])
def test_a_file_that_is_no_text_or_has_odd_keys_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    assert str(path) in refused(path)


def test_merged_yaml_keys_are_not_duplicates(tmp_path: Path) -> None:
    old = "held_out: {generated: demo.math, split: held_out}"
    path = write(
        tmp_path,
        edited(
            ("train: {generated: demo.math}", "train: &math {generated: demo.math}"),
            (old, "held_out: {<<: *math, split: held_out}"),
        ),
    )
    assert load_recipe(path).domains["math"].held_out.generated == "demo.math"


def test_the_readmes_own_recipe_loads(tmp_path: Path) -> None:
    text = Path("README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```yaml\n(name: mine\n.*?)```", text, re.DOTALL)
    assert [expert.name for expert in load_recipe(write(tmp_path, block)).experts] == ["general", "law"]


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    assert f"{tmp_path}/none.yaml does not exist" in refused(tmp_path / "none.yaml")


def test_overrides_reach_values_list_items_and_new_sections(tmp_path: Path) -> None:
    overrides = [
        "routing.top_k=2",
        "experts.math.license=mit",
        "experts.0.purpose=talk",
        "domains.math.rules.0.words=[plus, minus]",
        "evaluation.rows=7",
        "serving.sampling.temperature=0",
        "output=runs/a=b",
    ]
    recipe = load_recipe(write(tmp_path), overrides)
    assert recipe.routing.top_k == 2
    assert [expert.license for expert in recipe.experts] == [None, "mit"]
    assert recipe.experts[0].purpose == "talk"
    assert recipe.domains["math"].rules[0].words == ("plus", "minus")
    assert recipe.evaluation.rows == 7
    assert recipe.serving.sampling.temperature == 0
    assert recipe.serving.sampling.max_tokens == 128
    assert recipe.output == "runs/a=b"


def test_an_override_may_mend_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, edited(("  top_k: 1", "  top_k: 3")))
    assert load_recipe(path, ["routing.top_k=2"]).routing.top_k == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("routing.top_k=many", "routing.top_k: "),
        ("routing.topk=2", "routing.topk: unknown key"),
        ("routing.top_k=3", "3 experts a token are more than the 2"),
        ("routing.top_k", "write section.key=value"),
        ("=2", "write section.key=value"),
        ("experts.nobody.license=mit", "'experts' has no item 'nobody'"),
        ("experts.7.license=mit", "'experts' has no item '7'"),
        ("name.first=x", "'name' is a value, not a section"),
        ("routing.moe_layers=[1", "routing.moe_layers"),
        ("experts.math.branch.steps=5", "experts.1"),
    ],
)
def test_a_bad_override_is_named(tmp_path: Path, override: str, words: str) -> None:
    sentence = refused(write(tmp_path), override)
    assert f"--set {override}: " in sentence
    assert words in sentence


def test_the_override_at_fault_is_named_among_several(tmp_path: Path) -> None:
    assert "--set routing.top_k=3: " in refused(write(tmp_path), "serving.port=9000", "routing.top_k=3")


def test_an_innocent_override_is_not_blamed_for_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, edited(("  top_k: 1", "  top_k: 3")))
    sentence = refused(path, "serving.port=9000")
    assert "--set" not in sentence
    assert str(path) in sentence


def test_an_override_reaches_one_place_where_yaml_shares_many(tmp_path: Path) -> None:
    text = edited(
        ("train: {generated: demo.math}", "train: &rows {generated: demo.math}"),
        ("held_out: {generated: demo.math, split: held_out}", "held_out: *rows"),
    )
    recipe = load_recipe(write(tmp_path, text), ["domains.math.held_out.split=held_out"])
    assert (recipe.domains["math"].train.split, recipe.domains["math"].held_out.split) == ("train", "held_out")


@pytest.mark.parametrize("given", ["0.3", "1.0", "maybe", "true", "[0.7]"])
def test_a_threshold_that_is_none_is_said_in_one_sentence(given: str) -> None:
    said = refused(Path("configs/demo.yaml"), f"gate_training.threshold={given}")
    assert "gate_training.threshold: " in said and "give a probability from 0.5 to below 1, or auto" in said


def test_a_threshold_goes_with_what_fits_layer_by_layer() -> None:
    demo = Path("configs/demo.yaml")
    for given, kept in (("0.7", 0.7), ("auto", "auto"), ("null", None)):
        assert load_recipe(demo, [f"gate_training.threshold={given}"]).gate_training.threshold == kept
    for given in ("0.7", "auto"):
        said = refused(demo, f"gate_training.threshold={given}", "gate_training.method=lm")
        assert "leave one of the two out" in said


def test_the_guards_own_file_is_loaded_and_mistakes_in_it_are_a_sentence(tmp_path: Path) -> None:
    found = load_section(Guarding, GUARD, ["attempts=2"], "configs/guard.yaml")
    assert found.attempts == 2 and [rule.action for rule in found.policy.rules] == ["refuse", "redact"]
    assert load_section(Guarding, None, None, "") == Guarding()
    wrong = tmp_path / "guard.yaml"
    for text, said in (
        ("attempts: 0", "line 1: attempts"),
        ("log: requests\npolicy: {rules: [{side: input}]}", "looks for nothing"),
        ("unknown: 1", "unknown key"),
        ("- 1", "is a mapping of keys"),
    ):
        wrong.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=said):
            load_section(Guarding, wrong, None, "configs/guard.yaml")
    with pytest.raises(UserError, match=r"--set attempts=x: attempts"):
        load_section(Guarding, None, ["attempts=x"], "")


@pytest.mark.parametrize(
    ("serving", "tokens"),
    [
        ("max_model_len: 512", 256),
        ("max_model_len: 512\n  sampling: {temperature: 0.1}", 256),
        ("max_model_len: 32768", 8192),
        ("max_model_len: 512\n  sampling: {max_tokens: 100}", 100),
    ],
)
def test_half_of_a_short_context_is_for_the_answer(tmp_path: Path, serving: str, tokens: int) -> None:
    text = RECIPE[: RECIPE.index("serving:")] + f"serving:\n  {serving}\n"
    assert load_recipe(write(tmp_path, text)).serving.sampling.max_tokens == tokens
