"""What `make test` keeps of a product of parameters holds every value and every pair of values."""

from itertools import combinations, product

import pytest

from tests.pairwise import covering, pairs


@pytest.mark.parametrize("sizes", [(1,), (5,), (2, 3), (31, 2, 4), (3, 3, 3, 3), (2, 2, 2, 2, 2, 2), (4, 1, 5)])
def test_every_pair_is_covered_and_few_rows_do_it(sizes):
    rows = list(product(*map(range, sizes)))
    chosen = covering(rows)
    assert len(set(chosen)) == len(chosen) and set(chosen) <= set(rows)
    left = {
        (one, two, a, b)
        for one, two in combinations(range(len(sizes)), 2)
        for a, b in product(range(sizes[one]), range(sizes[two]))
    }
    for row in chosen:
        left -= {(one, two, row[one], row[two]) for one, two in combinations(range(len(sizes)), 2)}
    assert not left
    assert all({row[at] for row in chosen} == set(range(size)) for at, size in enumerate(sizes))
    largest = sorted((*sizes, 1), reverse=True)
    assert len(chosen) <= 2 * largest[0] * largest[1]  # fewer than that product cannot do


@pytest.mark.slow  # `make check` leaves cases out
def test_every_product_of_this_run_keeps_its_pairs(request):
    """Of each test so decorated, the cases that were collected: with -k, -m or --soak they are fewer."""
    if any(request.config.getoption(name) for name in ("keyword", "markexpr", "--soak")):
        pytest.skip("not run: only some of the cases were collected")
    kept: dict = {}
    for item in request.session.items:
        if rows := getattr(getattr(item, "function", None), "pairwise", None):
            kept.setdefault(item.function, set()).update(pairs(rows[item.callspec.id]))
    for test, found in kept.items():
        assert found == set().union(*map(pairs, test.pairwise.values())), test.__name__
