"""What `explain` finds, as plain data; imports no torch, so that a server can hold and show what another process found.

explanation = read_explanation(json.loads(path.read_text()))
"""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import TypeAdapter

Part = Literal["template", "system", "prompt", "answer"]
Third = Literal["early", "middle", "late"]
Channel = Literal["rules", "classifier", "likelihood"]


@dataclass(frozen=True)
class Token:
    """A token: `text` is what it adds to the text, `label` its name, which also tells a piece of a character (你 2/3).

    `part`: the chat template's own, the system message's, of any other message of the prompt, or of the answer with its
    end mark. Of a character's pieces the last has the text.
    """

    id: int
    text: str
    label: str
    part: Part


@dataclass(frozen=True)
class Shares:
    """Each expert's share, by name, of the routing weight of the tokens of prompt, answer (None without one), and all.

    Weights are those that are served: a token's top-k, scaled to sum 1. `prompt` are the tokens of that part alone,
    `everything` counts template and system message as well. A shared expert, which sees every token, has none.
    """

    prompt: dict[str, float]
    answer: dict[str, float] | None
    everything: dict[str, float]

    @property
    def judged(self) -> dict[str, float]:
        """Those of the answer, where there is one, otherwise of the prompt."""
        return self.prompt if self.answer is None else self.answer


@dataclass(frozen=True)
class LayerGroup:
    """A third of the sparse layers."""

    name: Third
    layers: list[int]
    shares: Shares


@dataclass(frozen=True)
class Deciding:
    """A token, by its position, at which the winner's lead rose, and by how much.

    The lead is the winner's probability less the best other expert's, mean over the sparse layers; the rise is against
    the lead at the token before, whatever part that is of.
    """

    token: int
    lead: float
    rise: float


@dataclass(frozen=True)
class Opinion:
    """What a label channel says of the question (likelihood: of the answer), and whether the tokens went there."""

    channel: Channel
    domain: str
    expert: str
    evidence: str
    probability: float | None
    agrees: bool


@dataclass(frozen=True)
class Explanation:
    """Where the tokens of one conversation went, in the sparse layers `layers`, by the checkpoint's own gates.

    Lists of lists are by layer (in the order of `layers`) and token: `probabilities` of all experts (softmax of the
    router logits), the top-k experts `chosen`, by number, and their `weights`.
    `winner` has most of the `judged` part (the answer, where there is one); `confidence` is the mean over that part's
    tokens and the layers of the greatest probability, `entropy` that of the probabilities' entropy over log(experts).
    """

    model: str
    experts: list[str]
    top_k: int
    layers: list[int]
    tokens: list[Token]
    probabilities: list[list[list[float]]]
    chosen: list[list[list[int]]]
    weights: list[list[list[float]]]
    judged: Literal["prompt", "answer"]
    winner: str
    confidence: float
    entropy: float
    shares: Shares
    shares_by_layer: list[Shares]
    groups: list[LayerGroup]
    decided_by: list[Deciding]
    opinions: list[Opinion]

    def as_dict(self) -> dict[str, Any]:
        """The explanation as JSON's types."""
        return asdict(self)


def read_explanation(data: dict[str, Any]) -> Explanation:
    """The explanation that `as_dict` gave `data` of. Raises pydantic's ValidationError where it is none."""
    return TypeAdapter(Explanation).validate_python(data)
