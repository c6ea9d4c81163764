"""The chapters' own checks see a broken formula. (That they pass without a fault is test_house's matter.)"""

import pytest
from mutations.run import MUTATIONS, Mutation, cells_of, replaced, run

# Those that are seen early in their chapters.
QUICK = {"scale", "decibels", "attention", "schedule", "denoiser", "weight", "average", "heun", "frechet", "pattern"}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_formula_stands_once_in_its_chapter(mutation: Mutation):
    exported = [source for _, source in cells_of(mutation.chapter) if source.startswith("#| export")]
    assert replaced(exported, mutation) != exported


def test_a_formula_that_is_gone_is_named():
    with pytest.raises(ValueError, match="heun: .* stands 0 times"):
        replaced(["x_next = x_hat"], next(mutation for mutation in MUTATIONS if mutation.name == "heun"))


@pytest.mark.apart
@pytest.mark.parametrize("mutation", [
    pytest.param(mutation, id=mutation.name, marks=[] if mutation.name in QUICK else pytest.mark.long)
    for mutation in MUTATIONS])
def test_a_check_of_the_chapter_fails(mutation: Mutation):
    outcome = run(mutation.chapter, mutation)
    assert outcome.caught, f"{mutation.equation} with {mutation.mutant!r}: {outcome.error or 'no check failed'}"
