"""The order of work for a GPU; what needs one is tested where it is used."""

import pytest
import torch

from runtime.gpu import issued_ahead, to_device

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize("count", [0, 1, 2, 5])
@pytest.mark.parametrize("device", [CPU, GPU])
def test_work_is_issued_before_the_last_results_are_read(device, count):
    done = []

    def work():
        for number in range(count):
            done.append(("issued", number))
            yield number

    for number in issued_ahead(work(), device):
        done.append(("read", number))
    for number in range(count):
        next_is_issued_first = device == GPU and number + 1 < count
        read = done.index(("read", number))
        assert (("issued", number + 1) in done[:read]) == next_is_issued_first
        assert ("issued", number + 2) not in done[:read]
    assert [number for what, number in done if what == "read"] == list(range(count))


def test_a_tensor_stays_as_it_is_on_a_cpu():
    tensor = torch.arange(6).view(2, 3)
    assert to_device(tensor, CPU) is tensor
