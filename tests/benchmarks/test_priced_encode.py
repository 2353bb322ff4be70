"""The benchmark of lengths at a price runs, and says what it says against the encode without them."""

from benchmarks.priced_encode import main


def test_prints_each_way_over_the_plain_one(capsys):
    main(["--seconds", "0.01"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["plain", "head", "price", "mean length"]
    assert ", 1.000 of plain, " in lines[0]
