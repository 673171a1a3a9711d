"""What the processes of a launch agree on, for a launch of one; of several: the commands' tests of processes."""

from accelerate import Accelerator

from dia_diffusion.distributed import first_on_each_machine


def test_one_process_does_the_work_once() -> None:
    calls: list[int] = []
    assert first_on_each_machine(Accelerator(cpu=True), lambda: calls.append(1) or len(calls)) == 1
    assert calls == [1]
