"""Reading keys of a Hugging Face config: whole numbers under one of several names.

Only what ``attention``, ``precision`` and ``model`` share. Which keys mean what is theirs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from planner.errors import PlannerError


class Keys:
    """A config whose missing keys are collected, so that one message can name them all.

    Args:
        config: as read; where it holds a ``text_config`` (multi-modal models), that counts.
        name: of the model, for messages.
    """

    def __init__(self, config: Mapping[str, Any], name: str) -> None:
        inner = config.get("text_config")
        self.config: Mapping[str, Any] = (
            {**config, **inner} if isinstance(inner, Mapping) else config
        )
        self.name = name
        self.missing: list[str] = []

    def get(self, *keys: str) -> Any:
        """The first of ``keys`` that is there and not null; None where there is none."""
        for key in keys:
            value = self.config.get(key)
            if value is not None:
                return value
        return None

    def whole(self, *keys: str, least: int = 1) -> int:
        """A whole number that has to be there. Missing: noted, and ``least`` meanwhile.

        Raises:
            PlannerError: something else than a whole number >= ``least``.
        """
        if self.get(*keys) is None:
            self.missing.append(" or ".join(keys))
            return least
        return self.whole_or(least, *keys, least=least)

    def whole_or(self, default: int, *keys: str, least: int = 0) -> int:
        """A whole number, or ``default`` where no key is there.

        Raises:
            PlannerError: something else than a whole number >= ``least``.
        """
        for key in keys:
            value = self.config.get(key)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise PlannerError(
                    f"{key} is {value!r} in the config of {self.name}, expected a whole number, "
                    f"{least} or more"
                )
            return value
        return default

    def check(self) -> None:
        """Refuses a config that lacks what was asked for.

        Raises:
            PlannerError: keys are missing; names all of them.
        """
        if self.missing:
            raise PlannerError(
                f"the config of {self.name} lacks {', '.join(self.missing)}: expected the "
                "config.json of a mixture-of-experts model as published on Hugging Face"
            )
