"""What methods and parts there are, read from their code: the command `omniopd methods` and the pages of docs/methods/."""

from omniopd.catalogue.entries import Entry, entries, entry

__all__ = ["Entry", "entries", "entry"]
