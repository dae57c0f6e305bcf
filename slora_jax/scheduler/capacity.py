"""How many more requests fit now."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Capacity:
    """How many more requests of one length on one adapter could start now, and why so many.

    Attributes:
      requests: so many, beside those that run. Those that wait go first: they are not looked at.
      pages_each: pool pages of the prompt and the output of each.
      adapter_pages: pages of the adapter, taken once; 0 for the base model, and where running requests use it.
      pages_available: free pages, and those whose content nobody uses.
      sequences_available: sequences that a step may still have.
    """

    requests: int
    pages_each: int
    adapter_pages: int
    pages_available: int
    sequences_available: int


def capacity(pages_each: int, adapter_pages: int, pages_available: int, sequences_available: int) -> Capacity:
    """Of requests that take ``pages_each`` for prompt and output, at their full length."""
    by_pages = max(pages_available - adapter_pages, 0) // pages_each
    return Capacity(min(by_pages, sequences_available), pages_each, adapter_pages, pages_available, sequences_available)
