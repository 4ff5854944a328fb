"""What tests/matrices.py leaves out of `make test` is never a value, or a pair of values, that
nothing else has."""

from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.matrices import cover

sizes = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(sizes, st.sampled_from([1, 2]), st.randoms(use_true_random=False))
def test_every_value_or_pair_is_in_a_cell_that_runs(sizes, strength, random):
    whole = [dict(zip("abcd", values, strict=False)) for values in product(*map(range, sizes))]
    cells = random.sample(whole, random.randint(1, len(whole)))
    parts = lambda cell: set(combinations(sorted(cell.items()), strength))
    run = [cells[i] for i in cover(cells, strength)]
    assert set().union(*map(parts, run)) == set().union(*map(parts, cells))


def test_a_product_takes_as_many_cells_as_its_longest_side():
    cells = [dict(a=a, b=b, c=c) for a, b, c in product(range(5), range(3), range(2))]
    assert len(cover(cells)) == 5 and len(cover(cells, 2)) <= 18


pytest_plugins = ["pytester"]


@pytest.mark.parametrize(("options", "passed"), [((), 4), (("--full",), 9)])
def test_a_run_leaves_cells_out_and_a_full_one_does_not(options, passed, pytester):
    pytester.makeini("[pytest]\nmarkers =\n  matrix\n  full")
    pytester.makeconftest(
        "from tests.conftest import pytest_addoption, pytest_collection_modifyitems"
    )
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.matrix
        @pytest.mark.parametrize("a", "xyz")
        @pytest.mark.parametrize("b", "uv")
        def test_of_a_and_b(a, b):
            pass

        @pytest.mark.parametrize("a", ["x", pytest.param("y", marks=pytest.mark.full)])
        def test_of_a(a):
            pass

        @pytest.mark.full
        def test_of_more():
            pass
        """
    )
    pytester.runpytest(*options).assert_outcomes(passed=passed, deselected=9 - passed)
