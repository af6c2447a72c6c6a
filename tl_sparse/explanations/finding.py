"""Finding the expression of one node."""

from tl_sparse.circuits import Node
from tl_sparse.explanations.building import number
from tl_sparse.explanations.fitting import ENOUGH, Candidate, Target, best
from tl_sparse.explanations.measures import EXPLAINED
from tl_sparse.explanations.reads import through_writes
from tl_sparse.explanations.record import Shorter
from tl_sparse.explanations.search import search
from tl_sparse.explanations.structure import through_sources
from tl_sparse.explanations.subject import Subject
from tl_sparse.explanations.tables import position_functions, share_of, token_tables

#: Values depend on the token, or the position, alone if it explains so much of them.
ALONE = 0.999
#: What is enough for a function of the token, or of the position: other expressions refer to it.
ENOUGH_FOR_TOKENS, ENOUGH_FOR_POSITIONS = 0.997, 0.996
#: Where either explains less than this, expressions of it alone are not tried.
LEAST_SHARE = 0.3
#: So many shorter expressions are kept beside the one that is chosen.
MOST_SHORTER = 4


def candidates_for(target: Target, node: Node, subject: Subject) -> list[Candidate]:
    """Expressions for a node, of all kinds."""
    constant = target.candidate(number(target.mean))
    if target.is_constant:
        return [Candidate(constant.expression, 1.0)]
    wiring, vocabulary = subject.wiring, subject.samples.vocabulary
    found = [constant, *through_sources(target, node, wiring)]
    found += through_writes(target, node, wiring, vocabulary)
    if not wiring.sources(node) and share_of(target, target.positions) > LEAST_SHARE:
        found += position_functions(target)
    if share_of(target, target.tokens) > LEAST_SHARE:
        found += token_tables(target, "token", vocabulary)
    if all(each.score < EXPLAINED for each in found):
        found += search(target, node, wiring, vocabulary)
    return found


def chosen(candidates: list[Candidate], target: Target, node: Node, subject: Subject) -> Candidate:
    """The shortest expression that is good enough; else the best one for its size."""
    wiring = subject.wiring
    if wiring.sources(node) or wiring.writes(node):
        return best(candidates, ENOUGH)
    is_positional = share_of(target, target.positions) > share_of(target, target.tokens)
    return best(candidates, ENOUGH_FOR_POSITIONS if is_positional else ENOUGH_FOR_TOKENS)


def dependence(target: Target) -> str:
    """What the values of a node depend on, as far as the data tells."""
    if target.is_constant:
        return "nothing"
    if share_of(target, target.tokens) >= ALONE:
        return "token"
    if share_of(target, target.positions) >= ALONE:
        return "position"
    n_positions = int(target.positions.max()) + 1
    both = target.tokens * n_positions + target.positions
    distinct = both.unique().numel()
    # Where hardly any pair of token and position occurs twice, the data does not tell.
    is_known = distinct < 0.7 * len(both)
    if is_known and share_of(target, both) >= ALONE:
        return "token and position"
    return "earlier tokens"


def shorter_ones(candidates: list[Candidate], than: Candidate) -> list[Shorter]:
    """The best expressions of smaller sizes, each better than all that are shorter."""
    found = []
    most = 0.0
    for each in sorted(candidates, key=lambda each: (each.expression.size, -each.score)):
        if each.expression.size >= than.expression.size:
            break
        if each.score > most + 0.02:
            most = each.score
            found.append(Shorter(str(each.expression), each.expression.size, each.score))
    return found[-MOST_SHORTER:]
