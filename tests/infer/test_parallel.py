"""A fit that two processes share is the fit of one."""

import math
import statistics
import time

import parallel_fits
import pytest
import torch
from processes import ROOT, torchrun

PROGRAM = ROOT / "tests" / "parallel_fits.py"


def together(folder, *names):
    """Return what each of two processes ends with that have run fits once."""
    result = torchrun(PROGRAM, folder, *names)
    assert result.returncode == 0, result.stderr
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("together")


@pytest.fixture(scope="module")
def of_one(folder):
    """Return what a fit of one process ends with that was interrupted, and went on."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # as in the other processes
    found = parallel_fits.interrupted(folder, parallel_fits.AutoDelta, "alone")
    torch.set_default_dtype(before)
    return found


@pytest.fixture(scope="module")
def ranks(folder, of_one):
    return together(folder)


@pytest.fixture(scope="module")
def long_ranks(tmp_path_factory):
    return together(tmp_path_factory.mktemp("long"), "elbos", "sharded")


@pytest.fixture(scope="module")
def alone():
    return parallel_fits.elbos()


def agree(one, other, **tolerance):
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(
            value, other[name], equal_nan=True, msg=lambda said, n=name: f"{n}: {said}", **tolerance
        )


@pytest.mark.parametrize("program", parallel_fits.SAME_AS_ALONE, ids=lambda program: program.__name__)
def test_a_fit_without_draws_is_that_of_one_process(program, ranks, tmp_path):
    first, second = (each[program.__name__] for each in ranks)
    agree(first, second, rtol=0, atol=0)
    agree(first, parallel_fits.run(program, tmp_path), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("program", [parallel_fits.draws, parallel_fits.conditional, parallel_fits.batch_norm])
def test_all_processes_end_with_the_same(program, ranks):
    first, second = (each[program.__name__].copy() for each in ranks)
    own = [each.pop("own_draws", None) for each in (first, second)]
    assert own[0] is None or not {*own[0]} & {*own[1]}
    agree(first, second, rtol=0, atol=0)


def test_laws_in_closed_form_are_those_of_one_process(ranks):
    alone = parallel_fits.conditional()
    for name in ("tensors.law", "loader.law"):
        together = ranks[0]["conditional"][name]
        assert together.argmax() == 1
        assert (together - alone[name]).abs().sum() / 2 < 0.05  # total variation


def test_metrics_are_means_over_processes_which_choose_and_stop_alike(ranks):
    first, second = (each["validation"] for each in ranks)
    agree(first, second, rtol=0, atol=0)
    noise = first["noise"]
    assert min(noise) > 0.5  # the mean of u and 1 + u
    assert max(noise) < 1.5
    assert first["best"] == noise.index(max(noise)) + 1
    assert len(noise) == min(first["best"] + 2, 20)


def test_held_out_data_are_scored_as_by_one_process(ranks):
    agree(ranks[0]["validation_of_points"], parallel_fits.validation_of_points(), rtol=1e-5, atol=1e-5)


def test_one_process_writes_what_is_logged(ranks):
    assert ranks[0]["logged"] == {"wrote": (True, True, True), "lines": 3}
    assert ranks[1]["logged"] == {"wrote": (False, False, False), "lines": 0}


def test_one_process_can_stop_all(ranks):
    assert [each["stopped_by_one"]["epochs"] for each in ranks] == [2, 2]


def test_of_an_iterable_data_set_each_process_reads_its_own_until_one_has_no_more(ranks):
    assert [each["rows_of_its_own"]["steps"] for each in ranks] == [9, 9]  # 20 and 15 rows, in batches of 5
    assert ranks[0]["rows_of_its_own"] == ranks[1]["rows_of_its_own"]


@pytest.mark.parametrize("name", ["interrupted_normals", "interrupted_points"])
def test_a_fit_goes_on_as_if_it_had_not_been_interrupted(name, ranks):
    for each in ranks:
        agree(each[name]["whole"], each[name]["goes_on"], rtol=0, atol=0)
        assert each[name]["elbo_on"] == pytest.approx(each[name]["elbo"], rel=1e-12)  # added up in other parts
    agree(ranks[0][name]["whole"], ranks[1][name]["whole"], rtol=0, atol=0)


def test_one_process_goes_on_from_the_checkpoint_of_two(folder, ranks):
    found = parallel_fits.resumed(folder, parallel_fits.AutoDelta, "points")
    whole = ranks[0]["interrupted_points"]
    assert found.pop("elbo") == pytest.approx(whole["elbo"], rel=1e-5)
    agree(found, whole["whole"], rtol=1e-5, atol=1e-5)
    assert math.isfinite(parallel_fits.resumed(folder, parallel_fits.AutoNormal, "normals")["elbo"][-1])


def test_two_processes_go_on_from_the_checkpoint_of_one(of_one, ranks):
    first, second = (each["goes_on_from_one"] for each in ranks)
    assert first.pop("elbo") == second.pop("elbo") == pytest.approx(of_one["elbo"], rel=1e-5)
    agree(first, of_one["whole"], rtol=1e-5, atol=1e-5)
    agree(first, second, rtol=0, atol=0)


def test_errors_say_what_processes_cannot_share(ranks):
    for said in (each["refused"] for each in ranks):
        assert "DistributedSampler; got Mine" in said["sampler"]
        assert "got batch_size=None" in said["no_batches"]
        assert "`batch_size` must be at least 2, a row for each process; got 1" in said["one_row"]
        assert "a law for each row" in said["by_row"]
        assert "a guide with a law of lengths for each row learns on one process" in said["by_group"]
        assert "on a disk that their machines share; they go on from steps [4, 0]" in said["own_disk"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["weights drawn", "points"])
def test_a_transformer_whose_parameters_are_shared_out_is_that_of_one_process(name, long_ranks):
    alone, parts = parallel_fits.sharded()[name], [each["sharded"][name] for each in long_ranks]
    for part in parts:
        torch.testing.assert_close(part["losses"], alone["losses"])
    assert sum(part["held"] for part in parts) == alone["held"]
    assert max(part["held"] for part in parts) < 0.6 * alone["held"]
    agree(parts[0]["whole"], alone["whole"], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["net", "autoencoder"])
def test_the_elbo_of_two_processes_is_within_the_noise_of_one(name, long_ranks, alone):
    """Four seeds each: z of the difference of the means; nets with other draws differ."""
    first, alone = zip(*alone[name], strict=True)
    together = [last for _, last in long_ranks[0]["elbos"][name]]
    spread = math.sqrt((statistics.variance(together) + statistics.variance(alone)) / 4)
    assert abs(statistics.mean(together) - statistics.mean(alone)) < 4 * spread
    assert spread < 0.05 * (statistics.mean(alone) - statistics.mean(first))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("error_on_one", "RuntimeError: the disk of this process is full"),
        ("infinite_on_one", "NonFiniteLossError: fit: the loss is nan; the value of site 'y'"),
    ],
)
def test_an_error_of_one_process_ends_all(name, error, tmp_path):
    started = time.monotonic()
    result = torchrun(PROGRAM, tmp_path, name)
    assert result.returncode != 0
    assert error in result.stderr
    assert time.monotonic() - started < 60
