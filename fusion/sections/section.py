"""What all sections of a recipe are: immutable, with no key that they do not know."""

from pydantic import BaseModel, ConfigDict

NAME = r"^[a-z0-9][a-z0-9_-]*$"
Location = tuple[str | int, ...]  # the keys that lead to a value, items of lists by number


class Misfit(ValueError):
    """Sections that contradict each other, with the location of the one to change."""

    def __init__(self, location: Location, message: str):
        super().__init__(message)
        self.location = location


class Section(BaseModel):
    """A recipe section: immutable, and no key it does not know."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def place_of(places: dict[Location, str], location: Location) -> str:
    """The place of the deepest part of `location` that is known."""
    return next(places[location[:depth]] for depth in range(len(location), -1, -1) if location[:depth] in places)
