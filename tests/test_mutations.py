"""The chapters' own checks see a broken formula. (That they pass without a fault is test_house's matter.)"""

from collections.abc import Iterator
from concurrent.futures import Future

import pytest
from conftest import side_by_side
from mutations.run import MUTATIONS, Mutation, Outcome, cells_of, replaced, run

# Those that are seen early in their chapters; `python tests/mutations/run.py` runs all.
QUICK = {"scale", "decibels", "attention", "schedule", "denoiser", "weight", "average", "heun", "frechet", "pattern"}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_formula_stands_once_in_its_chapter(mutation: Mutation):
    exported = [source for _, source in cells_of(mutation.chapter) if source.startswith("#| export")]
    assert replaced(exported, mutation) != exported


def test_a_formula_that_is_gone_is_named():
    with pytest.raises(ValueError, match="heun: .* stands 0 times"):
        replaced(["x_next = x_hat"], next(mutation for mutation in MUTATIONS if mutation.name == "heun"))


@pytest.fixture(scope="module")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[object, Future[Outcome]]]:
    yield from side_by_side(lambda mutation: run(mutation.chapter, mutation), request,
                            "test_a_check_of_the_chapter_fails", "mutation")


@pytest.mark.parametrize("mutation", [mutation for mutation in MUTATIONS if mutation.name in QUICK],
                         ids=lambda mutation: mutation.name)
def test_a_check_of_the_chapter_fails(mutation: Mutation, outcomes: dict[object, Future[Outcome]]):
    outcome = outcomes[mutation].result()
    assert outcome.caught, f"{mutation.equation} with {mutation.mutant!r}: {outcome.error or 'no check failed'}"
