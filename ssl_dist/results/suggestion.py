"""Which evaluation suits a data set: the words of the command that is proposed for a run."""

from collections.abc import Mapping, Sequence

from ssl_dist.data.catalog import SplitRoles

WITHOUT_LABELS = ("retrieval", "clusters", "embedding")
_SHARE = ("--validation", "0.1")


def evaluators(splits: Mapping[str, bool], uses: SplitRoles, with_labels: Sequence[str]) -> list[str]:
    """Words behind `ssl-dist evaluate RUN`: the evaluators `with_labels` where they can measure something.

    splits: whether each is labelled. uses: their roles."""
    if not splits.get(uses.training):
        return [*WITHOUT_LABELS, "--split", uses.pretraining if uses.pretraining in splits else next(iter(splits))]
    return [*with_labels, *(() if splits.get(uses.evaluation) else _SHARE)]
