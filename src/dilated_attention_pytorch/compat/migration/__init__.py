"""Moving a code base to the new names: what it uses, and what can be rewritten without a person."""

from .files import Change, Report, migrate_tree
from .uses import Use, uses_in

__all__ = ["Change", "Report", "Use", "migrate_tree", "uses_in"]
