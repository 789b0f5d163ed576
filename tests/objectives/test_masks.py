"""Masks of several parts of a picture: which patches each part sees and predicts, whatever the order they lie in."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maect_jax.objectives.masking import (
    disjoint_masks,
    parallel_mask_ratio,
    parallel_masks,
    patches_to_keep,
    random_mask,
)


def visible(masks) -> list[set[int]]:
    return [set(row[: masks.keep].tolist()) for row in masks.places_km]


def predicted(masks) -> list[list[int]]:
    return [row[masks.keep :].tolist() for row in masks.places_km]


# ------------------------------------------------------------------------------------------------------ parallel masks

GRIDS_AND_PARTS = [(grid, k) for grid in range(2, 25) for k in range(2, grid**2 + 1) if grid**2 % k == 0]


@st.composite
def grid_and_parts(draw):
    return draw(st.sampled_from(GRIDS_AND_PARTS))


@settings(deadline=None)
@given(grid_and_parts())
def test_each_patch_is_seen_by_one_part_and_predicted_by_all_others(case):
    patches, parts = case[0] ** 2, case[1]
    masks = parallel_masks(patches, parts)
    assert masks.parts == parts and masks.patches == patches and masks.keep == patches // parts
    seen = np.bincount(masks.places_km[:, : masks.keep].ravel(), minlength=patches)
    asked = np.bincount(masks.places_km[:, masks.keep :].ravel(), minlength=patches)
    np.testing.assert_array_equal(seen, np.ones(patches))
    np.testing.assert_array_equal(asked, np.full(patches, parts - 1))
    for row in masks.places_km:
        np.testing.assert_array_equal(np.sort(row), np.arange(patches))


@pytest.mark.parametrize(("patches", "parts", "shared"), [(196, 4, 98), (256, 4, 128), (196, 7, 140), (196, 2, 0)])
def test_two_parts_have_a_share_of_one_minus_two_over_k_of_the_patches_hidden_from_both(patches, parts, shared):
    masks = parallel_masks(patches, parts)
    for a, b in combinations(predicted(masks), 2):
        assert len(set(a) & set(b)) == shared


def test_every_number_of_parts_that_divides_the_patches_gives_blocks_of_equal_size():
    for grid, parts in GRIDS_AND_PARTS:
        masks = parallel_masks(grid**2, parts)
        assert masks.keep * parts == grid**2
        assert masks.coverage == pytest.approx(parts / (parts - 1))


@settings(deadline=None)
@given(grid_and_parts(), st.floats(0.01, 1))
def test_a_share_of_each_block_is_predicted_and_by_all_parts_the_same(case, share):
    patches, parts = case[0] ** 2, case[1]
    keep = patches // parts
    masks = parallel_masks(patches, parts, share)
    whole = parallel_masks(patches, parts)
    of_block = masks.predicted / (parts - 1)
    assert of_block == max(1, round(keep * share))
    shown = set().union(*predicted(masks))
    assert len(shown) == of_block * parts
    assert visible(masks) == visible(whole)  # a smaller target hides no input
    for own, asked in zip(visible(masks), predicted(masks)):
        assert len(asked) == len(set(asked))
        assert set(asked) == shown - own


DIVISORS_16, DIVISORS_196 = "4, 8 or 16", "4, 7, 14, 28, 49, 98 or 196"


@pytest.mark.parametrize(
    ("patches", "parts", "fit"),
    [(16, 3, DIVISORS_16), (16, 17, DIVISORS_16), (196, 5, DIVISORS_196), (196, 1, DIVISORS_196)],
)
def test_parts_that_do_not_divide_the_patches_are_refused_with_numbers_that_do(patches, parts, fit):
    with pytest.raises(ValueError, match=f"^{parts} parts do not divide {patches} patches; {fit} do$"):
        parallel_masks(patches, parts)


# ------------------------------------------------------------------------------------------------------ disjoint masks

# `patches_to_keep` rounds down and so does the shift of the second mask: in what is hidden from some part the two
# errors have opposite signs, each below one patch.
ratios = st.floats(0.1, 0.9)


@settings(deadline=None)
@given(st.integers(4, 24), ratios, st.floats(0, 1))
def test_disjoint_masks_have_one_ratio_and_cover_what_is_asked_for(grid, ratio, extra):
    patches, covered = grid**2, ratio + extra * (1 - ratio)
    masks = disjoint_masks(patches, ratio, covered)
    first = random_mask(patches, ratio)
    assert masks.parts == 2 and masks.keep == first.keep == patches_to_keep(patches, ratio)
    np.testing.assert_array_equal(masks.places_km[0], first.places_km[0])
    for row in masks.places_km:
        np.testing.assert_array_equal(np.sort(row), np.arange(patches))
    a, b = visible(masks)
    hidden_from_some = patches - len(a & b)
    assert abs(hidden_from_some - min(covered, 2 * ratio) * patches) <= 1 + 1e-9
    assert masks.coverage == hidden_from_some / (patches - masks.keep)


@pytest.mark.parametrize(
    ("ratio", "covered", "union"),
    [(0.75, 1.0, 1.0), (0.75, 0.875, 0.875), (0.5, 1.0, 1.0), (0.25, 1.0, 0.5), (0.25, 0.375, 0.375)],
)
def test_the_union_of_hidden_patches_and_its_share_in_numbers_without_rounding(ratio, covered, union):
    """DMJD's m_pred over m_corr, where the rate that it scales is base * pictures * m_pred / m_corr."""
    masks = disjoint_masks(256, ratio, covered)
    hidden = [set(range(256)) - seen for seen in visible(masks)]
    assert [len(h) for h in hidden] == [ratio * 256] * 2
    assert len(hidden[0] | hidden[1]) == union * 256
    assert masks.coverage == union / ratio


@pytest.mark.parametrize("patches", [16, 64, 196, 256])
def test_at_three_quarters_the_second_part_sees_what_the_first_does_not(patches):
    a, b = visible(disjoint_masks(patches, 0.75))
    assert len(a) == len(b) == patches // 4 and not a & b


@settings(deadline=None)
@given(st.integers(4, 24), ratios, st.floats(0.01, 1))
def test_a_share_of_the_hidden_patches_is_predicted_by_each_of_two_disjoint_parts(grid, ratio, share):
    masks = disjoint_masks(grid**2, ratio, 1.0, share)
    assert masks.predicted == max(1, round((grid**2 - masks.keep) * share))
    for own, asked in zip(visible(masks), predicted(masks)):
        assert len(own) == masks.keep
        assert len(own | set(asked)) == masks.keep + masks.predicted


def test_one_part_covers_what_it_hides():
    assert random_mask(196, 0.75).coverage == 1
    assert random_mask(196, 0.75, 0.5).coverage == 1


@pytest.mark.parametrize("grid", [4, 6, 8, 12, 14, 16, 24, 28])
def test_the_ratio_of_parallel_masks_keeps_what_a_part_sees(grid):
    """Also where (K - 1) / K as a float would lose a patch, as for 7 parts of 196."""
    patches = grid**2
    for parts in (k for k in range(2, patches + 1) if patches % k == 0):
        ratio = parallel_mask_ratio(patches, parts)
        assert ratio == pytest.approx(1 - 1 / parts, rel=1e-12)
        assert patches_to_keep(patches, ratio) == parallel_masks(patches, parts).keep
