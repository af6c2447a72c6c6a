"""How much each section of a certificate measures: the one table of these numbers."""

from dataclasses import dataclass, field, fields

from tl_sparse.config import check, check_types


@dataclass(frozen=True)
class Effort:
    """How much is measured for a certificate.

    Attributes:
        pairs: the number of held-out pairs of prompts for which a section has no number of its own.
        subsets: the number of random subsets of the other nodes that are left as they are.
        subset_pairs: the number of pairs on which each of them is measured.
        adversaries: the number of adversaries without a limit; the most harmful counts.
        adversary_steps: the number of steps in which each adversary learns.
        adversary_pairs: the number of pairs on which the circuit is measured under each of them.
        budgets: how many nodes further adversaries may leave as they are, one adversary for each.
        corpus_rows: the number of rows of the corpus on which next tokens are compared.
        random_circuits: the number of random circuits of equal size that a section compares with.
        interchange_pairs: the number of pairs between which values are exchanged.
        tested_circuits: the number of random circuits in the tests of section 5a; below 29,
            these have no p-values.
        tested_pairs: the number of pairs on which these are measured.
        part_pairs: the number of pairs on which single nodes and edges are removed.
        random_parts: the number of random nodes, and of random edges, that parts are compared with.
        backup_candidates: the number of nodes outside that are measured as backups.
        other_task_pairs: the number of pairs of each of the other tasks.
        search_pairs: the number of pairs on which the circuits of other searches are measured.
        search_subsets: the number of random subsets around each of these.
        searches: whether stability and controls, which search for other circuits, are measured.
    """

    pairs: int = 256
    subsets: int = 64
    subset_pairs: int = 32
    adversaries: int = 3
    adversary_steps: int = 40
    adversary_pairs: int = 96
    budgets: list[int] = field(default_factory=lambda: [10, 30, 100, 300])
    corpus_rows: int = 32
    random_circuits: int = 4
    interchange_pairs: int = 24
    tested_circuits: int = 30
    tested_pairs: int = 24
    part_pairs: int = 48
    random_parts: int = 20
    backup_candidates: int = 20
    other_task_pairs: int = 32
    search_pairs: int = 128
    search_subsets: int = 16
    searches: bool = True

    def __post_init__(self) -> None:
        check_types(self)
        for number in fields(self):
            if number.type is int:
                value = getattr(self, number.name)
                check(value >= 1, number.name, value, "at least 1")
        budgets = self.budgets
        are_counts = all(type(budget) is int and budget >= 1 for budget in budgets)
        check(are_counts, "budgets", budgets, "whole numbers of at least 1")


#: About seven minutes on one core for a circuit of about 14 nodes in the bundled model. Stability
#: and controls, which search for other circuits, take more than half of them, and longer for
#: robust circuits.
FULL = Effort()
#: About half a minute of measuring for a circuit of about 20 nodes in the bundled model, on two
#: cores.
QUICK = Effort(
    pairs=128,
    subsets=16,
    subset_pairs=16,
    adversaries=1,
    adversary_steps=20,
    adversary_pairs=64,
    budgets=[30],
    corpus_rows=8,
    random_circuits=2,
    interchange_pairs=8,
    tested_circuits=30,
    tested_pairs=8,
    part_pairs=16,
    random_parts=12,
    backup_candidates=8,
    other_task_pairs=8,
    searches=False,
)
