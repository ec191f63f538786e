"""All that a plan says of sizes, as plain data: what the fused model weighs, what a machine makes of it, and at what
price the same experts are served otherwise.

    findings, data = survey(recipe, describe_anchor(recipe).config, profile)
"""

from dataclasses import replace
from typing import Any

from fusion.plan.alternatives import alternatives
from fusion.plan.budget import budget, card_bytes, model_weights, planned_config, serving_layout
from fusion.plan.capacity import capacities, formats, served_dtype
from fusion.plan.estimates import estimate
from fusion.plan.findings import Finding
from fusion.plan.parallel import SPLIT, check_parallel
from fusion.plan.profile import HardwareProfile
from fusion.recipe import Recipe
from serving.engine import detect_hardware


def survey(
    recipe: Recipe, anchor_config: dict[str, Any], profile: HardwareProfile | None
) -> tuple[list[Finding], dict[str, Any]]:
    """Findings on the split over cards, and the sizes; without a profile those alone, and what this machine is.

    Where vLLM could not split the model as the recipe asks for, nothing is said of cards.
    """
    config = planned_config(recipe, anchor_config)
    weights = model_weights(config)
    findings = check_parallel(recipe, config, weights, profile)
    data: dict[str, Any] = {"budget": budget(recipe, anchor_config).as_dict()}
    if profile is None:
        here = detect_hardware()
        return findings, {**data, "machine": {"gpus": here.gpus, "cpu_cores": len(here.cores)}}
    data["hardware"] = profile.model_dump(mode="json")
    if any(finding.severity == "error" and finding.where in SPLIT for finding in findings):
        return findings, data
    layout = serving_layout(recipe.serving)
    cut, whole = (replace(layout, expert_parallel=parallel) for parallel in (False, True))
    dtype = served_dtype(recipe.serving, config["dtype"], profile.native_bfloat16)
    data["max_model_len"] = recipe.serving.max_model_len
    data["served_format"] = recipe.serving.quantization or dtype
    data["card_weights"] = [
        {
            "weight_format": weight_format,
            "tensor_parallel": card_bytes(weights, config, cut, weight_format, dtype),
            "expert_parallel": card_bytes(weights, config, whole, weight_format, dtype),
        }
        for weight_format in formats(profile, dtype)
    ]
    data["capacity"] = [row.as_dict() for row in capacities(recipe, config, weights, profile)]
    data["alternatives"] = [row.as_dict() for row in alternatives(recipe, anchor_config, profile)]
    data["estimate"] = estimate(recipe, anchor_config, profile).as_dict()
    return findings, data
