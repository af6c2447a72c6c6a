"""Putting expressions together, so that equal ones are written alike."""

from tl_sparse.explanations.expressions import (
    And,
    Expression,
    Not,
    Number,
    Or,
    Product,
    Sum,
)


def number(value: float) -> Number:
    """A constant, rounded to four significant digits."""
    return Number(float(f"{value:.4g}"))


def add(*terms: Expression) -> Expression:
    """The sum, without nested sums."""
    flat: list[Expression] = []
    for term in terms:
        flat += term.terms if isinstance(term, Sum) else [term]
    return flat[0] if len(flat) == 1 else Sum(tuple(flat))


def times(*factors: Expression) -> Expression:
    """The product, without nested products, in which one constant comes first."""
    flat: list[Expression] = []
    constant = 1.0
    for factor in factors:
        for each in factor.factors if isinstance(factor, Product) else (factor,):
            if isinstance(each, Number):
                constant *= each.value
            else:
                flat.append(each)
    if not flat:
        return Number(constant)
    if constant != 1:
        flat.insert(0, Number(constant))
    return flat[0] if len(flat) == 1 else Product(tuple(flat))


def both(*arguments: Expression) -> Expression:
    """Whether all are true, without nested conjunctions."""
    flat: list[Expression] = []
    for argument in arguments:
        flat += argument.arguments if isinstance(argument, And) else [argument]
    return flat[0] if len(flat) == 1 else And(tuple(flat))


def either(*arguments: Expression) -> Expression:
    """Whether at least one is true, without nested disjunctions."""
    flat: list[Expression] = []
    for argument in arguments:
        flat += argument.arguments if isinstance(argument, Or) else [argument]
    return flat[0] if len(flat) == 1 else Or(tuple(flat))


def opposite(argument: Expression) -> Expression:
    """The opposite of a truth value, without a double negation."""
    return argument.argument if isinstance(argument, Not) else Not(argument)


def linear(constant: float, terms: list[tuple[float, Expression]]) -> Expression:
    """constant + Σ factor · expression, without terms that are 0."""
    written = [times(number(factor), term) for factor, term in terms if factor]
    if number(constant).value or not written:
        written.insert(0, number(constant))
    return add(*written)
