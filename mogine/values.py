"""How small values that every question makes anew are declared: frozen for mypy, quick at run time."""

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from dataclasses import dataclass as value
else:
    from dataclasses import dataclass

    T = TypeVar("T")

    def value(*, frozen: bool, slots: bool, kw_only: bool = False) -> Callable[[type[T]], type[T]]:
        """`dataclass(frozen=True)`, of which mypy sees to it that nobody changes a value.

        Python would guard every value at run time, too, which makes a class of ten fields four times as
        slow to create.
        """
        return dataclass(slots=slots, kw_only=kw_only, unsafe_hash=True)


__all__ = ["value"]
