"""Weights of others: files of the official codes, torchvision and timm, read without running any code from them.

A file is a state_dict, or a dictionary that holds one. Its tensors go by the names of the network that wrote them; the
namings known here lead from a backbone's own names to those.
"""

# Where a tensor's own name starts with the first, it starts with the second in the file.
SELA = {"conv1.": "features.0.", "bn1.": "features.1."} | {f"layer{i}.": f"features.{i + 3}." for i in (1, 2, 3, 4)}
RELIC = {"conv1.": "0.", "bn1.": "1."} | {f"layer{i}.": f"{i + 3}." for i in (1, 2, 3, 4)} | {"features.": "0."}


def renamed(name: str, prefixes: dict[str, str]) -> str:
    """`name` with the first of the prefixes that it starts with replaced."""
    for own, theirs in prefixes.items():
        if name.startswith(own):
            return theirs + name.removeprefix(own)
    return name
