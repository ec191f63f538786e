"""The command line: one short function per verb, which parses, calls and prints.

qwen-fusion run configs/demo.yaml
"""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from urllib.parse import urlsplit

import typer
from safetensors import SafetensorError

from fusion.errors import UserError, of_the_disk
from fusion.recipe import Recipe
from fusion.recipe_file import load_recipe, load_section
from fusion.sections.serving import Guarding, Question

if TYPE_CHECKING:
    from rich.console import Console

app = typer.Typer(
    help="Fuse fine-tuned models of one Qwen2.5 family into one mixture-of-experts model, train its gates, serve it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="YAML recipe, for example configs/demo.yaml")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="SECTION.KEY=VALUE", help="override one value of the recipe; may be repeated"),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress bars")]


def _is_address(url: str) -> bool:
    """Whether a URL names a server and no more."""
    try:
        parts = urlsplit(url)
        named = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, or too large a one
        return False
    return named and not any((parts.path, parts.query, parts.fragment, parts.username, parts.password))


def _silence(quiet: bool) -> None:
    """Switches progress bars off, here and in the processes that are started."""
    if quiet:
        os.environ["QWEN_FUSION_QUIET"] = "1"
    from fusion.progress import quiet as is_quiet

    if is_quiet():
        os.environ["TQDM_DISABLE"] = "1"  # other libraries' bars; read when tqdm is imported


def _load(path: Path, overrides: list[str] | None, quiet: bool = False) -> Recipe:
    _silence(quiet)
    return load_recipe(path, overrides)


def _print_json(value: object, target: str) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    if target == "-":
        sys.stdout.write(text + "\n")
    else:
        from fusion.checkpoint import write_text

        write_text(Path(target), text + "\n")


def _place(option: str, target: str, otherwise: str = "") -> Path:
    """The path of a file that is to be written. Raises UserError where there is no folder for it."""
    path = Path(target)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"{option} {target}: no such place for a file: name one in a folder that is there{otherwise}")
    return path


def _json_place(target: str | None) -> str | None:
    """Before any work is done: `--json` names a place for a file, or - for stdout."""
    if target and target != "-":
        _place("--json", target, ", or -")
    return target


Json = Annotated[
    str | None,
    typer.Option("--json", metavar="FILE", help="write as JSON; - for stdout", callback=_json_place),
]


@contextmanager
def _on_stdout(json_: str | None) -> Iterator["Console"]:
    """The console on stdout, for what a command is for, unless JSON goes there."""
    from fusion.progress import console

    console.stderr = json_ == "-"
    try:
        yield console
    finally:
        console.stderr = True


def _begin_workers(recipe: Recipe) -> None:
    """Where experts are trained side by side, what their processes import is imported beside this one's imports."""
    if recipe.branches_at_once > 1:
        from fusion.workers import worker_context

        worker_context()


@app.command()
def run(recipe: RecipePath, set_: Overrides = None, quiet: Quiet = False) -> None:
    """Do it all in order: plan, branch, merge, train-gates, evaluate, ask (anchor and heal where the recipe asks)."""
    loaded = _load(recipe, set_, quiet)
    _begin_workers(loaded)
    from fusion import road

    road.run(loaded)


@app.command()
def branch(
    recipe: RecipePath,
    expert: Annotated[str | None, typer.Option(help="train this expert alone")] = None,
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Train the anchor and the experts that the recipe says are to be made."""
    loaded = _load(recipe, set_, quiet)
    _begin_workers(loaded)
    from fusion import road_experts

    road_experts.branch(loaded, expert, force=expert is not None)


@app.command()
def anchor(
    recipe: RecipePath,
    expert: Annotated[str | None, typer.Option(help="anchor this expert alone")] = None,
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Lead drifted experts back to the anchor: distil them into the MLPs alone, so that a merge keeps them."""
    loaded = _load(recipe, set_, quiet)
    _begin_workers(loaded)
    from fusion import road_experts

    road_experts.anchor(loaded, expert, force=expert is not None)


@app.command()
def plan(
    recipe: RecipePath,
    hardware: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="what fits this machine: a profile of configs/hardware, or a YAML file"),
    ] = None,
    weights: Annotated[
        bool, typer.Option("--weights", help="also measure how far each expert's weights have moved (reads them all)")
    ] = False,
    json_: Json = None,
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Check that the models fit together, and say how large the fused one is and what fits. Reads no weights."""
    loaded = _load(recipe, set_, quiet)
    from fusion.plan.profile import load_profile

    profile = load_profile(hardware, recipe.parent) if hardware else None
    from fusion import road

    with _on_stdout(json_):
        road.plan(loaded, profile, weights, lambda result: _print_json(result, json_) if json_ else None)


@app.command()
def merge(recipe: RecipePath, set_: Overrides = None, quiet: Quiet = False) -> None:
    """Merge the experts into one sparse checkpoint (with random gates: train-gates comes next)."""
    loaded = _load(recipe, set_, quiet)
    from fusion.ahead import merged_parts, reading_ahead

    with reading_ahead(merged_parts(loaded)):
        import fusion.merge  # noqa: F401  the step's own, begun here
        from fusion import road

        road.plan(loaded)
        road.merge(loaded, force=True)


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="folder of a fused checkpoint")],
    json_: Json = None,
    quiet: Quiet = False,
) -> None:
    """Check a fused checkpoint again: hashes, index, shapes, finite numbers, its sources bit for bit, transformers."""
    _silence(quiet)
    from fusion.progress import console
    from fusion.verify import verify as check

    found = check(checkpoint)
    if json_:
        _print_json(found.as_dict(), json_)
    for problem in found.problems:
        console.print(f"  error: {problem}", highlight=False, soft_wrap=True)
    if found.problems:
        more = f", and {len(found.problems) - 1} more" if len(found.problems) > 1 else ""
        raise UserError(f"{checkpoint}: {found.problems[0]}{more}: merge it again, or copy it again")
    with _on_stdout(json_):
        console.print(f"[bold]verify[/bold]: {found.sentence()}", highlight=False, soft_wrap=True)


@app.command(name="add-expert")
def add_expert(
    recipe: RecipePath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="an expert of the recipe that the checkpoint lacks")],
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Put one more expert into the fused checkpoint: its shards are written, its gate row fitted, the rest stays."""
    loaded = _load(recipe, set_, quiet)
    from fusion.grow import add_expert as add

    add(loaded, name)


@app.command(name="remove-expert")
def remove_expert(
    recipe: RecipePath,
    name: Annotated[str, typer.Argument(metavar="NAME", help="an expert of the checkpoint")],
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Take an expert and its gate row out of the fused checkpoint; the rest stays."""
    loaded = _load(recipe, set_, quiet)
    from fusion.grow import remove_expert as remove
    from fusion.progress import console

    remove(loaded, name)
    if name in [expert.name for expert in loaded.experts]:
        said = f"take '{name}' out of {recipe} as well: `run` and `merge` would put it back"
        console.print(said, highlight=False, soft_wrap=True)


@app.command(name="train-gates")
def train_gates(
    recipe: RecipePath,
    method: Annotated[
        str | None,
        typer.Option(help="ridge, cross-entropy, likelihood, regression, lm, or auto (the best held out)"),
    ] = None,
    with_feedback: Annotated[
        bool, typer.Option("--with-feedback", help="learn from feedback too; gates that lose on any domain are refused")
    ] = False,
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Fit the gate of every layer on routing examples, layer by layer, and put the gates in place."""
    loaded = _load(recipe, [*(set_ or []), *([f"gate_training.method={method}"] if method else [])], quiet)
    from fusion import road

    road.train_gates(loaded, force=True, with_feedback=with_feedback)


feedback = typer.Typer(no_args_is_help=True, help="What people said of requests: list, export, import, remove.")
app.add_typer(feedback, name="feedback")


@feedback.command(name="list")
def feedback_list(
    recipe: RecipePath,
    limit: Annotated[int, typer.Option(min=1, help="of each kind, the newest")] = 20,
    json_: Json = None,
    set_: Overrides = None,
) -> None:
    """Show feedback, and requests that look misrouted although nobody has said so."""
    loaded = _load(recipe, set_)
    from serving.records.feedback import listed, markdown

    found = listed(loaded, limit)
    if json_:
        _print_json(found, json_)
    if json_ != "-":
        typer.echo(markdown(found))  # whole ids, for `feedback remove`


@feedback.command(name="export")
def feedback_export(
    recipe: RecipePath,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="default: exported-feedback.jsonl in the output folder")
    ] = None,
    misroutes: Annotated[
        bool, typer.Option("--misroutes", help="with requests that only look misrouted, by their label channels")
    ] = False,
    set_: Overrides = None,
) -> None:
    """Write feedback as rows to train on, one a question, with where each came from."""
    loaded = _load(recipe, set_)
    from fusion.progress import console
    from serving.records.feedback import export

    path = out or loaded.folder / "exported-feedback.jsonl"
    console.print(f"{len(export(loaded, path, misroutes))} rows in {path}", highlight=False, soft_wrap=True)


@feedback.command(name="import")
def feedback_import(
    recipe: RecipePath,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="rows as `feedback export` writes them")],
    set_: Overrides = None,
) -> None:
    """Take in rows that were labelled elsewhere."""
    loaded = _load(recipe, set_)
    from fusion.progress import console
    from serving.records.feedback import take_in

    console.print(f"{take_in(loaded, file)} new rows from {file}", highlight=False, soft_wrap=True)


@feedback.command(name="remove")
def feedback_remove(
    recipe: RecipePath,
    request_id: Annotated[str, typer.Argument(metavar="REQUEST_ID", help="as `feedback list` shows it")],
    set_: Overrides = None,
) -> None:
    """Take all feedback on a request out of the store."""
    loaded = _load(recipe, set_)
    from fusion.progress import console
    from serving.records.feedback import remove

    console.print(f"{remove(loaded, request_id)} rows of feedback on {request_id} removed", highlight=False)


@app.command()
def rollback(recipe: RecipePath, set_: Overrides = None) -> None:
    """Put the gates back that train-gates replaced, also in a running server; a second time puts them forth again."""
    loaded = _load(recipe, set_)
    from fusion import road

    road.rollback(loaded)


@app.command()
def heal(recipe: RecipePath, set_: Overrides = None, quiet: Quiet = False) -> None:
    """Train attention, norms and gates of a merge of drifted experts end to end, its experts frozen."""
    loaded = _load(recipe, set_, quiet)
    from fusion import road

    road.heal(loaded, force=True)


@app.command()
def evaluate(
    recipe: RecipePath,
    json_: Json = None,
    force: Annotated[bool, typer.Option(help="measure again although nothing has changed")] = False,
    long: Annotated[bool, typer.Option("--long", help="loss and passkeys late in a long context instead")] = False,
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Compare anchor, own experts and the fused model under random, mergekit's and trained gates."""
    loaded = _load(recipe, set_, quiet)
    from rich.markdown import Markdown

    from fusion import road
    from fusion.evaluation import long_context
    from fusion.evaluation.table import markdown

    result = road.evaluate_long(loaded, force) if long else road.evaluate(loaded, force)
    with _on_stdout(json_) as console:
        console.print(Markdown(long_context.markdown(result) if long else markdown(result)))
    if json_:
        _print_json(result, json_)


@app.command()
def benchmark(
    recipe: RecipePath,
    tasks: Annotated[
        str | None, typer.Option(help="of configs/benchmarks, or lm-evaluation-harness's own, with commas between")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="rows of every task")] = None,
    against: Annotated[
        str | None,
        typer.Option(help="of experts, anchor, router, and the dense average, TIES, DARE, union; commas between"),
    ] = None,
    backend: Annotated[str | None, typer.Option(help="vllm or transformers")] = None,
    url: Annotated[str | None, typer.Option(metavar="URL", help="a server that serves the fused model")] = None,
    json_: Json = None,
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Run tasks of lm-evaluation-harness on the fused model, its experts and the anchor (benchmark.md, .json, .png)."""
    lists = {"tasks": tasks, "against": against}
    said = [f"benchmark.{key}=[{value}]" for key, value in lists.items() if value is not None]
    if limit is not None:
        said += [f"benchmark.limit={limit}", "benchmark.limits={}"]
    if backend is not None:
        said.append(f"benchmark.backend={backend}")
    if url is not None and not _is_address(url := url.rstrip("/")):
        raise UserError(f"--url {url}: give the address of a server and no path, for example http://127.0.0.1:8000")
    loaded = _load(recipe, [*(set_ or []), *said], quiet)
    from rich.markdown import Markdown

    from fusion.evaluation.benchmark_table import markdown
    from fusion.evaluation.benchmarks import benchmark as run_benchmark

    result = run_benchmark(loaded, url)
    with _on_stdout(json_) as console:
        console.print(Markdown(markdown(result)))
    if json_:
        _print_json(result, json_)


@app.command()
def quantize(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="folder of a fused model")],
    scheme: Annotated[str, typer.Option(help="fp8 (8-bit weights and activations) or w4a16 (4-bit weights)")],
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="RECIPE", help="whose rows calibrate and judge; default: the checkpoint's own"),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="default: CHECKPOINT-SCHEME")] = None,
    quiet: Quiet = False,
) -> None:
    """Write a fused model in 8 or 4 bits with llm-compressor, in an environment of its own, and say what that loses."""
    _silence(quiet)
    from rich.markdown import Markdown

    from fusion.progress import console
    from fusion.quantization.loss import markdown
    from fusion.quantization.quantize import quantize as write_quantized

    console.print(Markdown(markdown(write_quantized(checkpoint, scheme, recipe, out))))


@app.command()
def serve(
    recipe: RecipePath,
    host: Annotated[str | None, typer.Option(help="override serving.host")] = None,
    port: Annotated[int | None, typer.Option(help="override serving.port", min=0, max=65535)] = None,
    set_: Overrides = None,
) -> None:
    """Serve the fused model with vLLM behind the JSON guard, until Ctrl-C."""
    overrides = [*(set_ or []), *([f"serving.host={host}"] if host else [])]
    overrides += [f"serving.port={port}"] if port is not None else []
    loaded = _load(recipe, overrides)
    from serving.ask import serve_recipe

    serve_recipe(loaded)


@app.command()
def guard(
    upstream: Annotated[str, typer.Option(help="address of the server to guard, without /v1", show_default=False)],
    host: Annotated[str, typer.Option(help="address to listen on")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="port to listen on", min=0, max=65535)] = 8000,
    config: Annotated[
        Path | None, typer.Option(help="YAML with the keys of a recipe's serving.guard, for example configs/guard.yaml")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="one key of serving.guard; may be repeated")
    ] = None,
) -> None:
    """Guard an OpenAI-compatible server that runs already, until Ctrl-C."""
    from serving.guard.keys import OPERATOR_VARIABLE, UPSTREAM_VARIABLE, read_keys
    from serving.guard.settings import GuardSettings
    from serving.records.settings import recording_alone
    from serving.serve import guard as guard_server

    address = upstream.removesuffix("/").removesuffix("/v1")
    if not _is_address(address):
        raise UserError(f"--upstream {upstream} is no address: write http://HOST:PORT, without /v1")
    guarding = load_section(Guarding, config, set_, "configs/guard.yaml")
    keys = read_keys(guarding.api_keys_file)
    own = os.environ.get(UPSTREAM_VARIABLE)
    settings = GuardSettings(
        address,
        guarding,
        sampling=None,
        api_keys=keys,
        upstream_key=own,
        operator_keys=read_keys(guarding.operator_keys_file, OPERATOR_VARIABLE),
        recording=recording_alone(guarding.records),
    )
    guard_server(settings, host, port)


@app.command()
def ask(
    recipe: RecipePath,
    question: Annotated[str, typer.Argument(help="what to ask")],
    schema: Annotated[
        Path | None, typer.Option(help="JSON schema file that the answer must satisfy", exists=True, dir_okay=False)
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(help="at most this many tokens in the answer", min=1)] = None,
    temperature: Annotated[float | None, typer.Option(help="override serving.sampling.temperature", min=0)] = None,
    set_: Overrides = None,
) -> None:
    """Ask one question of the recipe's running server, or of one that is started for it."""
    loaded = _load(recipe, set_)
    from fusion.checkpoint import read_json
    from fusion.progress import console
    from fusion.report import experts_line
    from serving.ask import ask_all
    from serving.guard.schema import Checker, SchemaError

    wanted = read_json(schema) if schema else None
    if schema and not isinstance(wanted, dict):
        raise UserError(f"{schema} holds no JSON object: the schema of an answer is one")
    try:
        Checker(wanted or {})
    except SchemaError as error:
        raise UserError(f"{schema} is no schema for an answer ({error}): mend it") from None
    if not question.strip():
        raise UserError("the question is empty: give it some words")
    if max_tokens is not None and max_tokens >= loaded.serving.max_model_len:
        limit = loaded.serving.max_model_len
        raise UserError(
            f"--max-tokens {max_tokens} leaves no room for the question within max_model_len {limit}: lower it"
        )
    asked = Question(
        question=question,
        json_schema=wanted,
        max_tokens=max_tokens,
        temperature=temperature,
    )
    (answer,) = ask_all(loaded, [asked])
    sys.stdout.write(answer["answer"] + "\n")
    console.print(f"[dim]served by {experts_line(answer['experts'])}; {answer['attempts']} attempt(s)[/dim]")


@app.command()
def explain(
    recipe: RecipePath,
    prompt: Annotated[str | None, typer.Argument(help="what the model would be asked", show_default=False)] = None,
    file: Annotated[
        Path | None, typer.Option(help="a text file with the prompt, or .json with messages, in place of PROMPT")
    ] = None,
    with_answer: Annotated[
        bool, typer.Option("--with-answer", help="ask the model first, and explain its answer as well")
    ] = False,
    classifier: Annotated[
        bool, typer.Option("--classifier", help="hear the label classifier too, which learns from the training rows")
    ] = False,
    html: Annotated[str | None, typer.Option(metavar="FILE", help="write as a page that needs no other file")] = None,
    json_: Json = None,
    set_: Overrides = None,
    quiet: Quiet = False,
) -> None:
    """Show which expert takes which token of a prompt, layer by layer, and where that was decided."""
    loaded = _load(recipe, set_, quiet)
    from fusion.explain.conversation import of_file, of_prompt

    if prompt is not None and file is None:
        conversation = of_prompt(prompt)
    elif file is not None and prompt is None:
        conversation = of_file(file)
    else:
        raise UserError("give a prompt, or --file with one, and not both")
    if with_answer and conversation.answer is not None:
        raise UserError(f"--file {file} has an answer already: leave --with-answer out, or the answer")
    page_file = _place("--html", html) if html else None  # before the model is run
    from fusion.checkpoint import write_text
    from fusion.explain.asked import explain_asked
    from fusion.explain.page import page
    from fusion.explain.summary import summary

    explained = explain_asked(loaded, conversation, with_answer, classifier)
    with _on_stdout(json_) as console:
        console.print(summary(explained))
    if page_file:
        write_text(page_file, page(explained))
    if json_:
        _print_json(explained.as_dict(), json_)


def main() -> None:
    """The program: a user's mistake is one sentence and exit code 2."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries; what comes of them is told below
    try:
        sys.exit(app(standalone_mode=False) or 0)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except OSError as error:
        sys.stderr.write(f"error: {of_the_disk(error)}\n")
        sys.exit(2)
    except SafetensorError as error:  # a full disk, or weights that are none
        sys.stderr.write(f"error: {error}; see that the disk has room and the model's files are whole\n")
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        sys.stderr.write("interrupted; finished steps are kept\n")
        sys.exit(130)
    except Exception as error:
        if not hasattr(error, "format_message"):  # of the click that typer carries inside, whose classes are not public
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()  # type: ignore[attr-defined]
        else:
            sys.stderr.write(f"error: {error.format_message()} (--help says more)\n")
        sys.exit(2)


if __name__ == "__main__":
    main()
