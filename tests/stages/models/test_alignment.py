"""Alignment, checked with a toy model whose logits say which position and which token produced them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from duet.stages.models.alignment import align, input_ids, shared, supervised_positions


class ToyModel:
    """Row t of the output holds (t, the token read at t): an off-by-one anywhere changes the numbers."""

    def __call__(self, input_ids_BT: torch.Tensor) -> torch.Tensor:
        positions_BT = torch.arange(input_ids_BT.shape[1]).expand_as(input_ids_BT)
        return torch.stack([positions_BT, input_ids_BT], dim=-1)


def rows_for(prompts: list[list[int]], responses: list[list[int]]) -> list[list[int]]:
    batch = align(prompts, responses, pad_id=999)
    out = ToyModel()(batch.input_ids_BT)
    return out[batch.batch_index_N, batch.position_N].tolist()


def test_row_t_predicts_token_t_plus_1():
    # prompt 10 11 12, response 20 21 22: r_0 is predicted where 12 is read, r_1 where 20 is, r_2 where 21 is.
    assert rows_for([[10, 11, 12]], [[20, 21, 22]]) == [[2, 12], [3, 20], [4, 21]]
    assert input_ids([10, 11, 12], [20, 21, 22]).tolist() == [10, 11, 12, 20, 21]


@pytest.mark.parametrize("prefix_length", [0, 1, 50])
def test_teacher_and_student_read_the_same_tokens_whatever_the_prefix(prefix_length):
    prefix = list(range(100, 100 + prefix_length))
    question, response = [10, 11, 12], [20, 21]
    student, teacher = rows_for([question], [response]), rows_for([prefix + question], [response])
    assert [token for _, token in student] == [token for _, token in teacher] == [12, 20]
    assert [t - s for (t, _), (s, _) in zip(teacher, student, strict=True)] == [prefix_length] * 2


def test_batches_of_uneven_length_keep_row_order_and_never_touch_padding():
    rows = rows_for([[1], [2, 3, 4], [5, 6]], [[7], [8, 9, 10], [11, 12]])
    assert rows == [[0, 1], [2, 4], [3, 8], [4, 9], [1, 6], [2, 11]]
    batch = align([[1], [2, 3]], [[7], [8]], pad_id=999)
    assert batch.attention_mask_BT.tolist() == [[1, 0], [1, 1]]
    assert (batch.input_ids_BT[batch.batch_index_N, batch.position_N] != 999).all()


def test_one_position_is_the_prompts_last_row():
    assert list(supervised_positions(4, 1)) == [3]
    assert input_ids([1, 2, 3, 4], [5]).tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(("prompt_length", "positions"), [(0, 1), (1, 0)])
def test_empty_prompts_and_responses_are_refused(prompt_length, positions):
    with pytest.raises(ValueError, match="at least 1"):
        supervised_positions(prompt_length, positions)


def test_numpy_and_lists_give_the_same():
    a = align([[1, 2]], [[3, 4]], 0)
    b = align([np.array([1, 2], np.int32)], [np.array([3, 4], np.int32)], 0)
    assert torch.equal(a.input_ids_BT, b.input_ids_BT)


def test_sequences_that_are_shared_are_read_once_and_keep_all_their_positions():
    prompts, responses = [[1, 2], [1, 2], [3]], [[5, 6], [5, 7], [8]]
    whole = align(prompts, responses, pad_id=999)
    batch = shared(whole, np.array([0, 0, 1]))
    out = ToyModel()(batch.input_ids_BT)
    assert batch.input_ids_BT.tolist() == [[1, 2, 5], [3, 999, 999]]
    assert batch.attention_mask_BT.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert out[batch.batch_index_N, batch.position_N].tolist() == rows_for(prompts, responses)
    assert shared(whole, np.array([0, 1, 2])) is whole
