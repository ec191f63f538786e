"""The fused checkpoint's README.md: what it is made of, under which licences, by which versions."""

from typing import Any

from fusion.plan.licences import licences, non_commercial
from fusion.recipe import Recipe
from fusion.sections.data import DataSource


def model_card(recipe: Recipe, manifest: dict[str, Any]) -> str:
    """A Hugging Face model card in Markdown, from the recipe and the merge's manifest."""
    lines = [
        "---",
        f"license: {recipe.license or 'other'}",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [moe, qwen2_moe, mergekit, merge]",
        "---",
        f"# {recipe.name}",
        "",
        f"One `Qwen2MoeForCausalLM` with {len(recipe.experts)} routed experts, {recipe.routing.top_k} per token, on "
        f"the shared parts (attention, norms, embeddings, head) of {_shared(manifest)}.",
        "",
        "| expert | domain | made from | adapter | licence | shared parts | sha256 of its first shard |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    known = licences(recipe)
    for row in manifest["experts"]:
        shard = next((h for f, h in manifest["sha256"].items() if f.startswith(f"expert-{row['name']}.")), "")
        drift = "those shared" if row["anchored"] else f"drifted, from {row['differs_at']} on"
        made = "".join(f", {how}" for how in ("branched", "distilled") if row.get(how))
        origin = f"{row['model']}{made}"
        adapter = f"LoRA, {row['adapter']}" if row["adapter"] else ""
        stated = known.get(row["name"]) or row["license"] or "not stated"
        cells = (row["name"], row["domain"], origin, adapter, stated, drift, f"`{shard[:16]}`")
        lines.append("| " + " | ".join(cells) + " |")
    restricted = ", ".join(f"{name} ({licence})" for name, licence in known.items() if non_commercial(licence))
    lines += ["", f"Not for commercial use: {restricted}."] if restricted else []
    lines += ["", "Domains and the experts that serve them:", ""]
    for name, domain in recipe.domains.items():
        expert = recipe.experts[recipe.expert_of(name)]
        what = f"{name} ({domain.description})" if domain.description else name
        learnt = ""
        if expert.domain == name:
            for how, section in (("branched", expert.branch), ("led back to the anchor", expert.anchor)):
                learnt += f", {how} on {_data(section.data)}" if section else ""
        lines.append(f"- {what}: {expert.name}{learnt}")
    for model, origin in manifest.get("origins", {}).items():
        lines += ["", f"The weights of {model} came from Python packages ({origin['packages']}): {origin['form']}."]
    versions = ", ".join(f"{name} {number}" for name, number in manifest["versions"].items())
    lines += [
        "",
        f"Made with {versions}. All hashes are in `fusion.json`, the recipe is in `recipe.yaml`. The merge in "
        "mergekit's own terms is in `mergekit_moe_config.yml`; without a shared expert mergekit itself refuses it.",
        "",
        f"The gates, in `gates.safetensors`, are {_gates(manifest['gates'])}.",
        "",
        *(_HEALED if "healed" in manifest else []),
        "Load it with transformers (`AutoModelForCausalLM.from_pretrained`) or serve it with vLLM; no remote code.",
        "",
    ]
    return "\n".join(lines)


_HEALED = [
    "Healed: attention, norms and gates were trained end to end, with the experts' MLPs frozen, on each domain's rows "
    "as its own expert sees them. `qwen-fusion merge` on the recipe makes the plain merge again.",
    "",
]


def _shared(manifest: dict[str, Any]) -> str:
    method = manifest.get("shared", "anchor")
    made = (
        manifest["anchor"]
        if method == "anchor"
        else f"the experts, made one by {method} (anchor: {manifest['anchor']})"
    )
    healed = manifest.get("healed")
    return made + (f", attention and norms healed after the merge on {healed['tokens']:,} tokens" if healed else "")


def _data(source: DataSource) -> str:
    licence = "" if source.generated else f", {source.license or 'licence not stated'}"
    return f"{source.describe()}{licence}"


def _gates(gates: dict[str, Any]) -> str:
    if gates["method"] == "random":
        return "mergekit's random ones, not trained yet"
    return f"trained by {gates['method']} on {gates['tokens']:,} tokens labelled by {gates['labels']}"
