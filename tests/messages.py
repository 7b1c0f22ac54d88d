"""Patterns for messages: a test requires the key, the value and the remedy, not the wording."""

import re


def naming(*facts):
    """A pattern for `match` and `re.search`: these facts in this order, each as it stands and no part of a longer word
    or number."""
    return "(?s)" + ".*".join(rf"(?<!\w)(?<!\d\.){re.escape(str(fact))}(?!\w|\.\d)" for fact in facts)
