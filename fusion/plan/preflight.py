"""Preflight: configs, tokenizers and safetensors headers of all models, compared; weights only by a small sample.

qwen-fusion plan configs/demo.yaml
"""

from fusion.adapter import Adapter
from fusion.architecture import dense_shapes, is_mlp, named_dtype, rope_theta, sparse_layers
from fusion.drift import by_group, chance, sampled, sentence, strength
from fusion.errors import UserError
from fusion.hub import is_hub_id, resolve_model
from fusion.plan.configs import anchor_alone, compare, lengths, padding, same_rope, usable, vocabulary_size
from fusion.plan.conversation import can_chat, compare_templates, compare_tokenizers
from fusion.plan.files import Tensors, dtype_lost, lacks_biases, read_files
from fusion.plan.findings import Finding, place_of_expert, worst_first
from fusion.plan.licences import check_licence, licence
from fusion.plan.models import Described, describe, describe_anchor, known
from fusion.plan.weights import not_finite
from fusion.recipe import Recipe
from fusion.sections.fusing import Expert
from fusion.sources import ModelSource, trained_expert
from serving.guard.schema import Checker, SchemaError


def check(recipe: Recipe, trained: bool = False) -> list[Finding]:
    """Every finding on the recipe's models, the worst first; with `trained`, on the experts it has branched as well.

    Before that, an expert left by an older run may belong to an older anchor, and will be trained again.
    """
    try:
        anchor = describe_anchor(recipe, trained)
    except UserError as error:
        return [Finding("error", "anchor.model", str(error))]
    found = usable(anchor)
    if found:  # nothing can be compared with it
        return worst_first(found)
    tensors, found = read_files(anchor)
    found += [*anchor_alone(anchor), *_anchor_weights(anchor, tensors), *_facts(anchor)]
    try:
        found += can_chat(anchor)
    except UserError as error:
        found.append(Finding("error", "anchor", str(error)))
    if recipe.anchor.model:
        found += check_licence(recipe, "anchor", None, licence(recipe.anchor.model, anchor.folder))
    for expert in recipe.experts:
        found += _check_expert(recipe, expert, anchor, tensors, trained) + _check_teachers(expert, anchor)
    found += _check_shared_expert(recipe, anchor)
    found += lengths(recipe, anchor) + _schemas(recipe) + _gguf(recipe)
    try:
        sparse_layers(anchor.config["num_hidden_layers"], recipe.routing.moe_layers)
    except UserError as error:
        what = str(error).removeprefix("routing.moe_layers ")
        fix = "name layers that the anchor has"
        found.append(Finding("error", "routing.moe_layers", what, "there is no such MLP to replace", fix))
    return worst_first(found)


def fused_dtype(anchor: Described, tensors: Tensors) -> str:
    """The fused model's dtype: the anchor's by its config, otherwise that of its final norm."""
    norm = tensors.get("model.norm.weight")
    return named_dtype(anchor.config) or str(norm.dtype if norm else "bfloat16").removeprefix("torch.")


def _check_expert(recipe: Recipe, expert: Expert, anchor: Described, ours: Tensors, trained: bool) -> list[Finding]:
    where = place_of_expert(expert.name)
    if expert.branch and (not trained or expert.branch.lora_rank):
        what = f"is branched from the anchor ({expert.branch.trainable}), so it will fit"
        return [Finding("note", where, what), *check_licence(recipe, where, expert.license, None)]
    try:
        model = describe(where, trained_expert(recipe, expert) if expert.branch else str(expert.model))
    except UserError as error:
        return [Finding("error", where, str(error))]
    found = check_licence(recipe, where, expert.license, licence(expert.model, model.folder))
    unusable = usable(model)
    if unusable:
        return found + unusable
    if model.folder is not None and model.folder == anchor.folder:  # its own findings are the anchor's
        return found + _check_adapter(recipe, expert, model, ours)
    theirs, broken = read_files(model)
    differing = compare(model, anchor)
    found += broken + differing + (_facts(model) if model.model != anchor.model else [])
    if known(model.model).instead and _has_error(differing):  # another model is named in its place: enough said
        return found
    found += _conversation(recipe, expert, model, anchor)
    mlps = {name: place for name, place in theirs.items() if is_mlp(name)}
    found += dtype_lost(model, mlps, fused_dtype(anchor, ours))
    found += _check_adapter(recipe, expert, model, {} if _has_error(broken) else theirs)
    return found + _drifted(recipe, expert, model, anchor, _other_biases(theirs, ours), not _has_error(found))


def _conversation(recipe: Recipe, expert: Expert, model: Described, anchor: Described) -> list[Finding]:
    """Tokenizer, vocabulary and chat template against the anchor's."""
    found: list[Finding] = []
    try:
        differing, same = compare_tokenizers(model, anchor)
        found += [*differing, *vocabulary_size(model, anchor, same, _needs_vocabulary(recipe, expert))]
        found += compare_templates(model, anchor, led_back=expert.anchor is not None)
    except UserError as error:  # a broken file
        found.append(Finding("error", model.name, str(error)))
    return found


def _needs_vocabulary(recipe: Recipe, expert: Expert) -> str:
    """What of the recipe needs the expert's vocabulary beside its MLPs; empty where nothing does."""
    shared, back = recipe.shared, expert.anchor
    if [shared.embeddings or shared.method, shared.head or shared.method] != ["anchor", "anchor"]:
        return "the shared parts are made of all experts' embeddings"
    if back and back.teacher is None and back.method == "logits":
        return "its logits are learnt on the way back to the anchor"
    if back and back.start == "transported":
        return "its head is compared with the anchor's, token by token (start: transported)"
    if recipe.heal and (back is None or back.teacher is None):
        return "its logits are learnt in healing"
    return ""


def _has_error(found: list[Finding]) -> bool:
    return any(finding.severity == "error" for finding in found)


def _facts(model: Described) -> list[Finding]:
    note = model.source()
    return [note] if note else []


def _anchor_weights(anchor: Described, tensors: Tensors) -> list[Finding]:
    """What the merge does to the anchor's own weights."""
    found = dtype_lost(anchor, tensors, fused_dtype(anchor, tensors))
    if lacks_biases(tensors):
        what = "its files hold no biases for q, k and v"
        why = "vLLM's Qwen2Moe always has them, so that the fused model gets zeros there, which compute the same"
        found.append(Finding("note", anchor.name, what, why))
    return found


def _check_adapter(recipe: Recipe, expert: Expert, model: Described, tensors: Tensors) -> list[Finding]:
    """An adapter against its base, by headers: without the base's `tensors` by the shapes that its config says."""
    if not expert.adapter:
        return []
    try:
        folder = resolve_model(expert.adapter, allow_download=False)
    except UserError as error:
        if not is_hub_id(expert.adapter):
            return [Finding("error", model.name, str(error))]
        what, why = f"adapter {expert.adapter} is not on this machine", "its shapes were not compared with its base"
        return [Finding("note", model.name, what, why, "download it, and plan again")]
    if not (folder / "adapter_config.json").is_file():
        what, why = f"adapter {folder} has no adapter_config.json", "nothing says how it is applied"
        return [Finding("error", model.name, what, why, "correct its path")]
    try:
        adapter = Adapter(folder)
        adapter.check_base({name: place.shape for name, place in tensors.items()} or dense_shapes(model.config))
    except UserError as error:
        return [Finding("error", model.name, str(error))]
    found = check_licence(recipe, model.name, None, licence(expert.adapter, folder))
    made_for, used_on = (name.rstrip("/").split("/")[-1].lower() for name in (adapter.base, str(expert.model)))
    if made_for and made_for != used_on:
        what = f"its adapter was made for {adapter.base}, and is used on {expert.model}"
        why = "shapes alone cannot tell whether it fits: on other weights it is noise"
        found.append(Finding("warning", model.name, what, why, f"set 'model' to {adapter.base}"))
    lost = sorted(name for name in adapter.targets if not is_mlp(name))
    if lost and expert.anchor is None:
        what = f"its adapter changes {len(lost)} tensors outside the MLPs ({lost[0]}, ...)"
        why = "so it is drifted, and only its MLP part survives the merge"
        fix = "train it on gate_proj, up_proj and down_proj alone, or give it an 'anchor' section"
        found.append(Finding("warning", model.name, what, why, fix))
    return found


def _drifted(
    recipe: Recipe, expert: Expert, model: Described, anchor: Described, biases: str, fits: bool
) -> list[Finding]:
    """Whether the expert has moved outside its MLPs, and what becomes of that.

    A sample of weights is read where both models are here and nothing else is wrong; `biases`: how it differs from the
    anchor in having them.
    """
    if expert.anchor:
        what = f"is led back to the anchor before the merge ({expert.anchor.method})"
        return [Finding("note", model.name, what)]
    fix = "give it an 'anchor' section, or leave it out"
    why = "its MLPs learnt behind another attention"
    made = not recipe.shared.is_anchor
    if not same_rope(model, anchor):
        theirs, ours = (rope_theta(described.config) for described in (model, anchor))
        what = f"rope_theta is {theirs:g}, the anchor's is {ours:g}"
        if made:
            without = "the shared q_proj and k_proj are made without it"
            return [Finding("warning", model.name, what, f"{why}, and {without}", fix)]
        return [Finding("error", model.name, what, why, fix)]
    if biases:
        return [Finding("warning", model.name, f"{biases}: it is drifted", why, fix)]
    if not fits:
        return []
    if model.folder is None or anchor.folder is None:
        if expert.adapter or model.model.lower() == anchor.model.lower():
            return []
        what = "is a fine-tune of its own, so it will have drifted"
        why = "how far is not known until its weights and the anchor's are here"
        fix = "give it an 'anchor' section, or plan again then (or with --weights)"
    else:
        rows, size = sampled(ModelSource("anchor", anchor.folder), ModelSource(model.name, model.folder))
        broken, moved = not_finite({expert.name: rows}), by_group(rows)
        if broken or strength(moved) == "anchored":
            return broken
        what = f"has moved outside its MLPs: {sentence(moved)}, by a sample of {size / 1e3:,.0f} kB"
        why, fix = chance(moved), "`plan --weights` measures all of it"
    if made or recipe.heal:
        how = "the shared parts are made of all experts'" if made else "the merge is healed"
        return [Finding("note", model.name, what, f"{why.split(':')[0]}, and {how}", fix)]
    return [Finding("warning", model.name, what, why, fix)]


def _other_biases(theirs: Tensors, ours: Tensors) -> str:
    """How an expert's files differ from the anchor's in holding q, k and v biases; empty where they do not."""
    if not theirs or not ours or lacks_biases(theirs) == lacks_biases(ours):
        return ""
    if lacks_biases(theirs):
        return "its files hold no biases for q, k and v, which the anchor has"
    return "its files hold biases for q, k and v, which the anchor does without"


def _check_teachers(expert: Expert, anchor: Described) -> list[Finding]:
    """Whether the models that an expert learns from can be had, and one of logits has all of the anchor's vocabulary.

    What else they are is their own affair.
    """
    where, found = place_of_expert(expert.name), []
    for teacher in (section.teacher for section in (expert.branch, expert.anchor) if section):
        if teacher:
            try:
                model = describe(where, teacher)
            except UserError as error:
                found.append(Finding("error", where, f"its teacher: {error}"))
                continue
            size, wanted = model.config.get("vocab_size"), anchor.config["vocab_size"]
            of_logits = expert.anchor is not None and expert.anchor.method == "logits"
            if of_logits and isinstance(size, int) and size < wanted:
                what = f"vocab_size of its teacher is {size}, the anchor's is {wanted}"
                why = "a teacher of logits needs all of the anchor's tokens, one of text any"
                found.append(Finding("error", where, what, why, padding(model, wanted)))
    return found


def _check_shared_expert(recipe: Recipe, anchor: Described) -> list[Finding]:
    """The shared expert where it is a model of its own; anchor and experts are checked as such."""
    name = recipe.routing.shared_expert
    if name is None or name == "anchor" or name in (expert.name for expert in recipe.experts):
        return []
    where = "routing.shared_expert"
    try:
        model = describe(where, name)
    except UserError as error:
        return [Finding("error", where, str(error))]
    found = check_licence(recipe, where, None, licence(name, model.folder)) + usable(model)
    if _has_error(found):
        return found
    return [*found, *read_files(model)[1], *compare(model, anchor), *_facts(model)]


def _schemas(recipe: Recipe) -> list[Finding]:
    found = []
    for number, question in enumerate(recipe.serving.questions):
        try:
            Checker(question.json_schema or {})
        except SchemaError as error:
            where = f"serving.questions.{number}.json_schema"
            found.append(Finding("error", where, str(error), "the guard refuses such a request", "mend the schema"))
    return found


def _gguf(recipe: Recipe) -> list[Finding]:
    """mergekit's own warning, which llama.cpp's conversion is known for."""
    count = len(recipe.experts)
    if count & (count - 1) == 0:
        return []
    what = f"{count} experts are no power of two"
    why = (
        "a GGUF export will not be usable in llama.cpp (mergekit's own warning); vLLM and transformers take any number"
    )
    return [Finding("note", "experts", what, why)]
