from benchmarks.bench import Target


def test_a_dry_run_is_a_gpus_list_on_the_cpu():
    cpu, cuda, dry = Target("cpu"), Target("cuda"), Target("cpu", dry_run=True)
    assert (cpu.gpu, cuda.gpu, dry.gpu) == (False, True, True)
    assert (cpu.backend, cuda.backend, dry.backend) == ("auto", "triton", "triton")
    assert dry.device == "cpu"
