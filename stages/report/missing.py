"""Parts of a report that cannot be made: said at their place and at the top, never dropped without a word.

A report is most wanted when something went wrong, so a damaged picture or a record that another version wrote must
never cost the rest of the page.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True)
class Missing:
    """A part that should be there and is not."""

    what: str
    why: str


@dataclass
class Gaps:
    """Collects the parts that could not be made."""

    found: list[Missing] = field(default_factory=list)

    def attempt(self, what: str, make: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        """What `make(*args, **kwargs)` returns, or None after noting why there is nothing."""
        try:
            return make(*args, **kwargs)
        except Exception as error:  # whatever is wrong with one part, the page tells of it and goes on
            text = str(error).strip("'\"") or "no further detail"
            self.found.append(Missing(what, f"{type(error).__name__}: {text}"[:400]))
            return None
