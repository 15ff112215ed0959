"""The attention kernels over the pages that a query chooses, which a GPU gets as a copy."""

import pytest
import torch
from attending import GPU_RMS, relative_rms
from kvmix_kernels.attend.choice import gathered, with_all_pages, with_chosen_pages
from kvmix_kernels.attend.triton import attend, unsupported
from page_choices import hidden_by_choice, summarized_problem
from reference import dense_attention


@pytest.mark.parametrize("sharing", ["max", "layer"])
def test_equals_dense_attention_over_the_chosen_pages(sharing):
    torch.manual_seed(0)
    mask = torch.ones(2, 1, 1, 3 + 5 * 64 + 10, dtype=torch.bool)
    mask[0, ..., :90] = False
    problem = summarized_problem("affine", 5, 2, "range", sharing, 3, mask)
    read = gathered(with_chosen_pages(problem))
    assert unsupported(read) is None
    hidden, _ = hidden_by_choice(problem)
    key, value = with_all_pages(problem).key.dequantize(), problem.value.dequantize()
    expected = dense_attention(problem.query, key, value, 0.3, ~hidden & mask, None, None)
    assert relative_rms(attend(read)[0], expected) < GPU_RMS
