import pytest
import torch

from src.models.joint_embedding.queue import FeatureQueue


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values).unsqueeze(1).expand(-1, 2).clone()


def test_first_in_first_out_with_its_columns():
    queue = FeatureQueue(2, 6, columns=("index", "label"))
    assert torch.allclose(queue.features.norm(dim=1), torch.ones(6))
    assert queue.column("index").tolist() == [-1] * 6
    for step in range(4):
        first = 2.0 * step
        index = torch.tensor([2 * step, 2 * step + 1])
        queue.stage(rows(first, first + 1), index=index, label=-index)
        assert not queue.full or step == 3
        queue.enqueue()
    assert queue.full
    assert queue.features[:, 0].tolist() == [6, 7, 2, 3, 4, 5]  # 0 and 1 gave way
    assert queue.column("index").tolist() == [6, 7, 2, 3, 4, 5]
    assert queue.column("label").tolist() == [-6, -7, -2, -3, -4, -5]


def test_micro_batches_leave_the_queue_that_one_batch_leaves():
    whole, parts = FeatureQueue(2, 8), FeatureQueue(2, 8)
    parts.load_state_dict(whole.state_dict())
    for step in range(3):
        keys = torch.randn(4, 2)
        before = parts.features.clone()
        whole.stage(keys)
        for part in keys.split(1):
            parts.stage(part)
            assert torch.equal(parts.features, before)  # the other micro-batches see the same queue
        whole.enqueue()
        parts.enqueue()
        assert torch.equal(whole.features, parts.features), step
        assert whole.pointer == parts.pointer
    parts.enqueue()  # nothing held, nothing moves
    assert torch.equal(whole.features, parts.features)


def test_a_restored_queue_goes_on_where_the_other_was():
    queue, restored = FeatureQueue(2, 6, columns=("index",)), FeatureQueue(2, 6, columns=("index",))
    for target in (queue, None):
        queue.stage(rows(1, 2), index=torch.tensor([1, 2]))
        queue.enqueue()
        if target is not None:
            restored.load_state_dict(queue.state_dict())
    restored.stage(rows(1, 2), index=torch.tensor([1, 2]))
    restored.enqueue()
    for name, value in queue.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name]), name
    assert int(queue.filled) == 4


def test_staged_features_are_copies_without_gradient():
    queue, keys = FeatureQueue(2, 2), torch.ones(2, 2, requires_grad=True)
    queue.stage(keys)
    with torch.no_grad():
        keys.zero_()
    queue.enqueue()
    assert queue.features.tolist() == [[1, 1], [1, 1]]
    assert not queue.features.requires_grad


def test_a_size_that_is_no_multiple_of_the_batch_is_refused_by_its_key():
    queue = FeatureQueue(2, 6, key="model.memory")
    for refused in (lambda: queue.check_batch_size(4), lambda: (queue.stage(rows(*range(4))), queue.enqueue())):
        with pytest.raises(ValueError, match=r"model\.memory=6 .*multiple of the 4 images"):
            refused()
    with pytest.raises(ValueError, match=r"model\.queue_size=0"):
        FeatureQueue(2, 0)
    with pytest.raises(ValueError, match=r"columns \['index'\], got \[\]"):
        FeatureQueue(2, 6, columns=("index",)).stage(rows(1, 2))
